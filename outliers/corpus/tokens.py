"""Turns text into token ids, once, on the control side: ids, and not text, go to machines.

Documents are taken in an order that the seed fixes, tokenized singly without special tokens, joined by EOS and cut into
sequences of equal length that do not overlap. With `packing=documents` each has a sequence of its own, with padding after
it. What the tokenizer puts before a text (mostly BOS) begins each sequence. The sha256 of the ids identifies them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from outliers.corpus.documents import DocumentSource, find_documents
from outliers.corpus.ids import (
    Corpus,
    CorpusInfo,
    TokenNames,
    find_corpus,
    lengths_hash,
    load_corpus,
    token_hash,
    write_corpus,
)
from outliers.corpus.text_files import LongText
from outliers.corpus.tokenizing import Encoder
from outliers.errors import CorpusError, UnknownModel
from outliers.model.source import ModelSource
from outliers.spec import CorpusSpec, digest
from outliers.workspace import Workspace

__all__ = ["Corpus", "CorpusInfo", "TokenNames", "load_corpus", "prepare_corpus", "token_hash", "write_corpus"]

CORPUS_VERSION = 2
"""Increased whenever the same text gives other ids, or another form on disk."""


@dataclass
class _Stream:
    """Tokens of the joined documents: ids and the text of each."""

    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    documents: int = 0


@dataclass
class _Row:
    """One sequence without its prefix: ids and the text of each."""

    ids: list[int]
    pieces: list[str]


@dataclass
class _Rows:
    """All sequences, and how many documents they were made of."""

    rows: list[_Row]
    documents: int


def prepare_corpus(
    spec: CorpusSpec,
    source: ModelSource,
    workspace: Workspace,
    *,
    documents: DocumentSource | None = None,
    vocab_size: int | None = None,
) -> CorpusInfo:
    """The corpus of `spec` as ids of the tokenizer of `source`, made if it isn't in the workspace yet, or damaged there.

    documents: the source that `spec` names, where it was found already. vocab_size: rows of the model's embedding.
    Raises CorpusError where the text can't be read or gives fewer tokens than asked, UnknownModel for a tokenizer that can't
    be used or is of another model.
    """
    documents = documents or find_documents(spec)
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
        return found[0]
    corpus = _build(spec, documents, Encoder(source, workspace), key)
    _check_ids(int(corpus.token_ids.max()), vocab_size, source)
    write_corpus(corpus, workspace)
    return corpus.info


def _check_ids(largest: int, vocab_size: int | None, source: ModelSource) -> None:
    if vocab_size is not None and largest >= vocab_size:
        raise UnknownModel(
            f"the tokenizer of {source.name} gives the id {largest:,}, and the model's embedding ends at {vocab_size - 1:,}: "
            "its tokenizer files are of another model, or its config says a wrong vocab_size"
        )


def _build(spec: CorpusSpec, documents: DocumentSource, encoder: Encoder, key: str) -> Corpus:
    prefix = encoder.prefix(spec.bos)
    if len(prefix) >= spec.sequence_length:
        raise CorpusError(
            f"this model's tokenizer begins a text with {len(prefix)} tokens, and a sequence has {spec.sequence_length}: ask "
            "for longer sequences, or --bos never"
        )
    make = _joined if spec.packing == "joined" else _single
    rows = make(spec, documents, encoder, spec.sequence_length - len(prefix))
    shape = (spec.num_sequences, spec.sequence_length)
    # padding has the EOS id here; the mask, and not an id, marks padding
    ids, starts = np.full(shape, encoder.eos or 0, np.int32), np.zeros(shape, np.int32)
    lengths = np.zeros(spec.num_sequences, np.int32)
    texts = []
    for number, row in enumerate(rows.rows):
        row_ids, pieces = [*prefix, *row.ids], [*([""] * len(prefix)), *row.pieces]
        lengths[number] = len(row_ids)
        ids[number, : len(row_ids)] = row_ids
        starts[number, 1 : len(row_ids)] = np.cumsum([len(piece) for piece in pieces])[:-1]
        texts.append("".join(pieces))
    info = CorpusInfo(
        source=documents.name,
        public=documents.public,
        key=key,
        num_sequences=spec.num_sequences,
        sequence_length=spec.sequence_length,
        num_tokens=int(lengths.sum()),
        num_documents=rows.documents,
        token_sha256=token_hash(ids, lengths),
        lengths_sha256=lengths_hash(lengths, spec.sequence_length),
    )
    names = encoder.names(
        list(chain(prefix, *(row.ids for row in rows.rows))),
        list(chain([""] * len(prefix), *(row.pieces for row in rows.rows))),
        prefix,
    )
    return Corpus(info=info, token_ids=ids, lengths=lengths, starts=starts, sequence_texts=tuple(texts), names=names)


def _joined(spec: CorpusSpec, documents: DocumentSource, encoder: Encoder, content: int) -> _Rows:
    """Documents joined by EOS, cut into rows of `content` tokens."""
    needed = content * spec.num_sequences
    stream = _tokenize(documents.texts(spec), encoder, needed)
    if len(stream.ids) < needed:
        fit = len(stream.ids) // content
        raise CorpusError(
            f"{documents.name} gives {len(stream.ids):,} tokens; {spec.num_sequences} sequences of "
            f"{spec.sequence_length} need {needed:,}: ask for {f'at most {fit} sequences' if fit else 'shorter sequences'}, "
            "or give more text"
        )
    cuts = [slice(row * content, (row + 1) * content) for row in range(spec.num_sequences)]
    return _Rows([_Row(stream.ids[cut], stream.pieces[cut]) for cut in cuts], stream.documents)


def _single(spec: CorpusSpec, documents: DocumentSource, encoder: Encoder, content: int) -> _Rows:
    """One document a row, cut at `content` tokens."""
    rows: list[_Row] = []
    for text in documents.texts(spec):
        encoded = encoder.encode(text, content)
        if encoded.ids:
            rows.append(_Row(encoded.ids[:content], encoded.pieces[:content]))
        if len(rows) == spec.num_sequences:
            return _Rows(rows, len(rows))
    raise CorpusError(
        f"{documents.name} gives {len(rows):,} documents; {spec.num_sequences} sequences of one each were asked: ask for at "
        f"most {len(rows)}, give more text, or join them (--packing joined)"
    )


def _tokenize(texts: Iterator[str] | Iterator[str | LongText], encoder: Encoder, needed: int) -> _Stream:
    """Tokens of the documents joined by EOS, until there are `needed`."""
    stream = _Stream()
    for text in texts:
        if not (text if isinstance(text, str) else text.first(1)):
            continue
        if stream.ids and encoder.eos is not None:
            stream.ids.append(encoder.eos)
            stream.pieces.append(encoder.eos_text)
        encoded = encoder.encode(text, needed - len(stream.ids))
        if not encoded.ids:
            continue
        stream.ids.extend(encoded.ids)
        stream.pieces.extend(encoded.pieces)
        stream.documents += 1
        if len(stream.ids) >= needed:
            break
    return stream
