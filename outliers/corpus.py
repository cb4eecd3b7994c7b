"""Text -> token ids, once, on the control side: ids and not text cross every boundary.

Documents are taken in an order that the seed fixes, tokenized singly without special tokens, joined by EOS and cut
into sequences of equal length that do not overlap; or, where asked, each has a sequence of its own and padding after it.
BOS begins each sequence where the tokenizer would put one.
The ids are named by their sha256. Knows tokenizers, nothing of models. Sources are in `documents`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from outliers.documents import DocumentSource, find_documents
from outliers.errors import CorpusError
from outliers.files import write_atomic
from outliers.models import ModelSource, load_tokenizer
from outliers.spec import CorpusSpec, digest
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

CORPUS_VERSION = 1
"""Raised when the same text would give other ids."""


class CorpusInfo(BaseModel):
    """What names a corpus; the ids themselves are files in the workspace, see `load_corpus`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Public name: never a path."""
    public: bool
    """Whether its text may be shown by default."""
    key: str
    num_sequences: int
    sequence_length: int
    num_tokens: int
    num_documents: int
    token_sha256: str
    lengths_sha256: str | None = None
    """Of the sequences' lengths as little-endian int32; None where all have sequence_length."""


@dataclass(frozen=True)
class Corpus:
    """A corpus in memory.

    `token_ids`: (sequence, position) int32. `lengths`: (sequence,) int32, tokens that are not padding.
    `starts`: (sequence, position) int32, where each token begins in its sequence's text, in characters.
    `sequence_texts`: the text of each sequence.
    """

    info: CorpusInfo
    token_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    starts: NDArray[np.int32]
    sequence_texts: tuple[str, ...]

    def piece(self, sequence: int, position: int) -> str:
        """The text of one token."""
        text, first = self.sequence_texts[sequence], int(self.starts[sequence, position])
        last = position + 1 >= int(self.lengths[sequence])
        return text[first:] if last else text[first : int(self.starts[sequence, position + 1])]

    def is_delimiter(self, sequence: int, position: int) -> bool:
        """Whether a token's text is blank or punctuation alone."""
        text = self.piece(sequence, position).strip()
        return all(unicodedata.category(character).startswith("P") for character in text)

    def delimiters(self) -> NDArray[np.bool_]:
        """(sequence, position) bool, see `is_delimiter`; padding is none."""
        marks = np.zeros(self.token_ids.shape, np.bool_)
        for sequence, length in enumerate(self.lengths):
            marks[sequence, :length] = [self.is_delimiter(sequence, position) for position in range(int(length))]
        return marks


@dataclass
class _Stream:
    """Tokens of the joined documents: ids and the text of each."""

    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    documents: int = 0


@dataclass
class _Row:
    """One sequence without BOS: ids and the text of each."""

    ids: list[int]
    pieces: list[str]


@dataclass
class _Rows:
    """All sequences, and how many documents they were made of."""

    rows: list[_Row]
    documents: int


def token_hash(token_ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> str:
    """sha256 of the ids as little-endian int32, sequence after sequence, padding left out."""
    hasher = hashlib.sha256()
    for row, length in zip(token_ids, lengths, strict=True):
        hasher.update(np.ascontiguousarray(row[: int(length)], dtype="<i4").tobytes())
    return hasher.hexdigest()


def prepare_corpus(spec: CorpusSpec, source: ModelSource, workspace: Workspace) -> CorpusInfo:
    """The corpus of `spec` as ids of the tokenizer of `source`, made if it isn't in the workspace yet.

    Raises CorpusError where the text can't be read or gives fewer tokens than asked.
    """
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
    memo = workspace.corpora / key / "corpus.json"
    if memo.exists():
        return CorpusInfo.model_validate_json(memo.read_bytes())
    corpus = _build(spec, documents, load_tokenizer(source, workspace), key)
    _write(corpus, workspace)
    return corpus.info


def load_corpus(info: CorpusInfo, workspace: Workspace) -> Corpus:
    """The ids and texts that `info` names; CorpusError where they are gone or are not these ids."""
    folder = workspace.corpora / info.key
    try:
        token_ids = np.load(folder / "token_ids.npy", allow_pickle=False)
        lengths = np.load(folder / "lengths.npy", allow_pickle=False)
        starts = np.load(folder / "starts.npy", allow_pickle=False)
        texts = json.loads((folder / "sequence_texts.json").read_text())
    except (OSError, ValueError) as error:
        raise CorpusError(f"the corpus {info.source} is not in {folder} any more: run the study again") from error
    found = token_hash(token_ids, lengths)
    if found != info.token_sha256:
        raise CorpusError(
            f"the ids in {folder} hash to {found[:12]}, not to {info.token_sha256[:12]}: remove that folder and run again"
        )
    return Corpus(info=info, token_ids=token_ids, lengths=lengths, starts=starts, sequence_texts=tuple(texts))


def _build(spec: CorpusSpec, documents: DocumentSource, tokenizer: Any, key: str) -> Corpus:
    bos = _bos_id(tokenizer, spec.bos)
    make = _joined if spec.packing == "joined" else _single
    rows = make(spec, documents, tokenizer, spec.sequence_length - (bos is not None))
    shape = (spec.num_sequences, spec.sequence_length)
    # padding has the EOS id here; the mask, not an id, says what is padding
    ids, starts = np.full(shape, tokenizer.eos_token_id or 0, np.int32), np.zeros(shape, np.int32)
    lengths = np.zeros(spec.num_sequences, np.int32)
    texts = []
    for number, row in enumerate(rows.rows):
        row_ids, pieces = (row.ids, row.pieces) if bos is None else ([bos, *row.ids], ["", *row.pieces])
        lengths[number] = len(row_ids)
        ids[number, : len(row_ids)] = row_ids
        starts[number, 1 : len(row_ids)] = np.cumsum([len(piece) for piece in pieces])[:-1]
        texts.append("".join(pieces))
    equal = bool((lengths == spec.sequence_length).all())
    info = CorpusInfo(
        source=documents.name,
        public=documents.public,
        key=key,
        num_sequences=spec.num_sequences,
        sequence_length=spec.sequence_length,
        num_tokens=int(lengths.sum()),
        num_documents=rows.documents,
        token_sha256=token_hash(ids, lengths),
        lengths_sha256=None if equal else hashlib.sha256(lengths.astype("<i4").tobytes()).hexdigest(),
    )
    return Corpus(info=info, token_ids=ids, lengths=lengths, starts=starts, sequence_texts=tuple(texts))


def _joined(spec: CorpusSpec, documents: DocumentSource, tokenizer: Any, content: int) -> _Rows:
    """Documents joined by EOS, cut into rows of `content` tokens."""
    needed = content * spec.num_sequences
    stream = _tokenize(documents.texts(spec), tokenizer, needed)
    if len(stream.ids) < needed:
        fit = len(stream.ids) // content
        raise CorpusError(
            f"{documents.name} gives {len(stream.ids):,} tokens; {spec.num_sequences} sequences of "
            f"{spec.sequence_length} need {needed:,}: ask for {f'at most {fit} sequences' if fit else 'shorter sequences'}, "
            "or give more text"
        )
    cuts = [slice(row * content, (row + 1) * content) for row in range(spec.num_sequences)]
    return _Rows([_Row(stream.ids[cut], stream.pieces[cut]) for cut in cuts], stream.documents)


def _single(spec: CorpusSpec, documents: DocumentSource, tokenizer: Any, content: int) -> _Rows:
    """One document a row, cut at `content` tokens."""
    rows: list[_Row] = []
    for text in documents.texts(spec):
        ids, pieces = _encode(tokenizer, text)
        if ids:
            rows.append(_Row(ids[:content], pieces[:content]))
        if len(rows) == spec.num_sequences:
            return _Rows(rows, len(rows))
    raise CorpusError(
        f"{documents.name} gives {len(rows):,} documents; {spec.num_sequences} sequences of one each were asked: ask for at "
        f"most {len(rows)}, give more text, or join them (--packing joined)"
    )


def _bos_id(tokenizer: Any, policy: str) -> int | None:
    """The id that begins each sequence, or None; `auto` is what the tokenizer itself does with a text."""
    number = tokenizer.bos_token_id
    if policy == "never":
        return None
    if policy == "always":
        if number is None:
            raise CorpusError("bos 'always' was asked, and this model's tokenizer has no BOS token")
        return int(number)
    first = tokenizer("a").input_ids[:1]
    return int(number) if number is not None and first == [number] else None


def _tokenize(texts: Iterator[str], tokenizer: Any, needed: int) -> _Stream:
    """Tokens of the documents joined by EOS, until there are `needed`."""
    stream = _Stream()
    eos = tokenizer.eos_token_id
    for text in texts:
        if not text:
            continue
        if stream.ids and eos is not None:
            stream.ids.append(int(eos))
            stream.pieces.append(str(tokenizer.eos_token))
        ids, pieces = _encode(tokenizer, text)
        if not ids:
            continue
        stream.ids.extend(ids)
        stream.pieces.extend(pieces)
        stream.documents += 1
        if len(stream.ids) >= needed:
            break
    return stream


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[str]]:
    """Ids of one document without special tokens, and the text of each."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded.offset_mapping]
    # pieces tile the document: no character is lost between tokens or shown twice
    edges = [0, *starts[1:], len(text)]
    return list(encoded.input_ids), [text[a:b] for a, b in itertools.pairwise(edges)]


def _write(corpus: Corpus, workspace: Workspace) -> None:
    """The folder of a corpus appears whole, corpus.json last; another process may be first with the same ids."""
    folder = workspace.corpora / corpus.info.key
    workspace.corpora.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=workspace.corpora, prefix=".corpus-"))
    np.save(made / "token_ids.npy", corpus.token_ids)
    np.save(made / "lengths.npy", corpus.lengths)
    np.save(made / "starts.npy", corpus.starts)
    write_atomic(made / "sequence_texts.json", json.dumps(corpus.sequence_texts).encode())
    write_atomic(made / "corpus.json", corpus.info.model_dump_json(indent=1).encode())
    try:
        made.rename(folder)
    except OSError:
        shutil.rmtree(made)
        if not (folder / "corpus.json").exists():
            raise
