"""Turns text into token ids, once, on the control side: ids, and not text, go to machines.

Documents are taken in an order that the seed fixes, tokenized singly without special tokens, joined by EOS and cut into
sequences of equal length that do not overlap. With `packing=documents` each has a sequence of its own, with padding after
it. What the tokenizer puts before a text (mostly BOS) begins each sequence. The sha256 of the ids identifies them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from outliers.corpus.documents import DocumentSource
from outliers.corpus.ids import (
    Corpus,
    CorpusInfo,
    TokenNames,
    find_corpus,
    load_corpus,
    token_hash,
)
from outliers.corpus.tokenizing import Encoder
from outliers.corpus.writer import CorpusWriter
from outliers.errors import CorpusError, UnknownModel
from outliers.events.stream import Reporter
from outliers.model.source import ModelSource
from outliers.spec import LOCAL_PREFIX, CorpusSpec, digest, path_name
from outliers.workspace import Workspace

__all__ = ["Corpus", "CorpusInfo", "TokenNames", "load_corpus", "prepare_corpus", "token_hash", "write_corpus"]

CORPUS_VERSION = 2
"""Increased whenever the same text gives other ids, or another form on disk."""


@dataclass
class _Row:
    """One sequence without its prefix: ids and the text of each."""

    ids: list[int]
    pieces: list[str]


@dataclass
class _Made:
    """How many documents the sequences were made of so far."""

    documents: int = 0


def prepare_corpus(
    spec: CorpusSpec,
    source: ModelSource,
    workspace: Workspace,
    *,
    documents: DocumentSource | None = None,
    vocab_size: int | None = None,
    reporter: Reporter | None = None,
) -> CorpusInfo:
    """The corpus of `spec` as ids of the tokenizer of `source`, made if it isn't in the workspace yet, or damaged there.

    documents: the source that `spec` names, where it was found already. vocab_size: rows of the model's embedding.
    reporter: told how many sequences are tokenized, and how many tokens there are.
    Raises CorpusError where the text can't be read or gives fewer tokens than asked, UnknownModel for a tokenizer that can't
    be used or is of another model.
    """
    if documents is None:
        from outliers.corpus.hub_data import find_documents

        documents = find_documents(spec)
    key = digest(
        {
            "version": CORPUS_VERSION,
            "tokenizer": [source.id, source.revision],
            "documents": documents.identity,
            "shape": [spec.num_sequences, spec.sequence_length],
            "seed": spec.seed,
            "bos": spec.bos,
            "packing": spec.packing,
        }
    )[:16]
    found = find_corpus(key, workspace)
    if found is not None:
        _check_ids(found[1], vocab_size, source)
        info = found[0]
    else:
        info = _build(spec, documents, Encoder(source, workspace), key, workspace, vocab_size, source, reporter)
    if reporter is not None:
        what = "was tokenized before" if found else "is tokenized"
        reporter.log("info", f"{info.source} {what}: {info.num_tokens:,} tokens of {info.num_documents:,} documents")
    return info


def _check_ids(largest: int, vocab_size: int | None, source: ModelSource) -> None:
    if vocab_size is not None and largest >= vocab_size:
        raise UnknownModel(
            f"the tokenizer of {source.name} gives the id {largest:,}, and the model's embedding ends at {vocab_size - 1:,}: "
            "its tokenizer files are of another model, or its config says a wrong vocab_size"
        )


def _build(
    spec: CorpusSpec,
    documents: DocumentSource,
    encoder: Encoder,
    key: str,
    workspace: Workspace,
    vocab_size: int | None,
    source: ModelSource,
    reporter: Reporter | None,
) -> CorpusInfo:
    """Write the corpus into the workspace, sequence by sequence: no more than a document and a sequence is in memory."""
    prefix = encoder.prefix(spec.bos)
    if len(prefix) >= spec.sequence_length:
        raise CorpusError(
            f"this model's tokenizer begins a text with {len(prefix)} tokens, and a sequence has {spec.sequence_length}: ask "
            "for longer sequences, or --bos never"
        )
    made, make = _Made(), _joined if spec.packing == "joined" else _single
    # (id, whether its text is empty) in the order in which they come: all that the names depend on
    seen: dict[tuple[int, bool], None] = dict.fromkeys((number, True) for number in prefix)
    # padding has the EOS id here; the mask, and not an id, marks padding
    with CorpusWriter(workspace, spec.num_sequences, spec.sequence_length, encoder.eos or 0) as writer:
        rows = make(spec, documents, encoder, spec.sequence_length - len(prefix), made)
        for done, row in enumerate(rows, 1):
            pieces = [*([""] * len(prefix)), *row.pieces]
            starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])]).astype(np.int32)
            writer.add(np.array([*prefix, *row.ids], np.int32), starts, "".join(pieces))
            seen.update(dict.fromkeys(zip(row.ids, (not piece for piece in row.pieces), strict=True)))
            if reporter is not None:
                reporter.progress("tokenize", done, spec.num_sequences, "sequences")
        _check_ids(writer.largest_id, vocab_size, source)
        info = CorpusInfo.model_validate(
            {
                "source": documents.name,
                "public": documents.public,
                "key": key,
                "num_sequences": spec.num_sequences,
                "sequence_length": spec.sequence_length,
                "num_tokens": writer.num_tokens,
                "num_documents": made.documents,
                **writer.hashes,
            }
        )
        names = encoder.names([number for number, _ in seen], ["" if blank else " " for _, blank in seen], prefix)
        writer.finish(info, names)
    return info


def _joined(spec: CorpusSpec, documents: DocumentSource, encoder: Encoder, content: int, made: _Made) -> Iterator[_Row]:
    """Documents joined by EOS, cut into rows of `content` tokens."""
    needed, total = content * spec.num_sequences, 0
    ids: list[int] = []
    pieces: list[str] = []
    for text in documents.texts(spec):
        if not (text if isinstance(text, str) else text.first(1)):
            continue
        if total and encoder.eos is not None:
            ids.append(encoder.eos)
            pieces.append(encoder.eos_text)
            total += 1
        encoded = encoder.encode(text, needed - total)
        if not encoded.ids:
            continue
        ids.extend(encoded.ids)
        pieces.extend(encoded.pieces)
        total += len(encoded.ids)
        made.documents += 1
        # of the last document more tokens may be known than are needed
        whole = (len(ids) - max(0, total - needed)) // content * content
        for at in range(0, whole, content):
            yield _Row(ids[at : at + content], pieces[at : at + content])
        del ids[:whole], pieces[:whole]
        if total >= needed:
            return
    fit = total // content
    raise CorpusError(
        f"{_called(spec, documents)} gives {total:,} tokens; {spec.num_sequences} sequences of "
        f"{spec.sequence_length} need {needed:,}: ask for {f'at most {fit} sequences' if fit else 'shorter sequences'}, "
        "or give more text"
    )


def _single(spec: CorpusSpec, documents: DocumentSource, encoder: Encoder, content: int, made: _Made) -> Iterator[_Row]:
    """One document a row, cut at `content` tokens."""
    for text in documents.texts(spec):
        encoded = encoder.encode(text, content)
        if encoded.ids:
            made.documents += 1
            yield _Row(encoded.ids[:content], encoded.pieces[:content])
        if made.documents == spec.num_sequences:
            return
    raise CorpusError(
        f"{_called(spec, documents)} gives {made.documents:,} documents; {spec.num_sequences} sequences of one each were "
        f"asked: ask for at most {made.documents}, give more text, or join them (--packing joined)"
    )


def _called(spec: CorpusSpec, documents: DocumentSource) -> str:
    """A source for a person: a file or folder by its name, not by the hash that stands for it in results."""
    return path_name(spec.source) if documents.name.startswith(LOCAL_PREFIX) else documents.name


def write_corpus(corpus: Corpus, workspace: Workspace) -> None:
    """Put a corpus that is in memory in its folder of the workspace."""
    info = corpus.info
    with CorpusWriter(workspace, info.num_sequences, info.sequence_length) as writer:
        for row, length in enumerate(corpus.lengths.tolist()):
            ids, starts = (rows[row : row + 1][0, :length] for rows in (corpus.ids, corpus.starts))
            writer.add(ids, starts, corpus.texts[row])
        writer.finish(info, corpus.names)
