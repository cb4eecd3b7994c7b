"""The token ids of a corpus and the text of each, and their folder in the workspace.

    corpora/<key>/token_ids.npy, lengths.npy, starts.npy   see `Corpus`
    corpora/<key>/sequence_texts.json, token_names.json
    corpora/<key>/corpus.json                              the CorpusInfo, and the sha256 of the other files; sealed

A corpus that differs from what was written is never used: the control side makes it again, a machine refuses it. Nothing
here knows a tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from outliers.corpus.kinds import DELIMITER, KINDS, OTHER, SPECIAL, in_word, is_delimiter, kind_of
from outliers.corpus.rows import IntRows, RowFile, TextRows, Texts
from outliers.errors import CorpusError
from outliers.files.sealed import changed_files, read_sealed
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

INFO = "corpus.json"
ARRAYS = ("token_ids", "lengths", "starts")
TEXTS, NAMES = "sequence_texts.json", "token_names.json"
KNOWN_PIECES = 1 << 18
"""Distinct texts of tokens that are remembered while their kinds are looked for."""
FILES = (*(f"{name}.npy" for name in ARRAYS), TEXTS, NAMES)


class CorpusInfo(BaseModel):
    """The identity of a corpus; the ids are files in the workspace, see `load_corpus`."""

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
    """Hash of the sequences' lengths as little-endian int32; None if all have sequence_length."""


@dataclass(frozen=True)
class TokenNames:
    """Names of the tokens that a text does not show, by id.

    special: those with a role of their own, by their name. fragments: those that hold a part of a character, by their bytes.
    unseen: the texts of others that share their characters with the token after them.
    """

    special: Mapping[int, str] = field(default_factory=dict)
    fragments: Mapping[int, str] = field(default_factory=dict)
    unseen: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """A corpus, in its files or in memory.

    `ids`: (sequence, position) int32 of which some sequences are read at a time. `lengths`: (sequence,) int32, tokens that are
    not padding. `starts`: (sequence, position) int32, where each token begins in its sequence's text, in characters.
    `texts`: the text of each sequence. `names`: how the tokens are called that the text does not show.
    """

    info: CorpusInfo
    ids: IntRows
    lengths: NDArray[np.int32]
    starts: IntRows
    texts: Texts
    names: TokenNames = field(default_factory=TokenNames)

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """(sequence, position) int32: all ids in memory, for a small corpus."""
        return self.ids[:]

    @property
    def sequence_texts(self) -> tuple[str, ...]:
        """All texts in memory, for a small corpus."""
        return tuple(self.texts[sequence] for sequence in range(len(self.texts)))

    def token_id(self, sequence: int, position: int) -> int:
        """The id of one token."""
        return int(self.ids[sequence : sequence + 1][0, position])

    def start(self, sequence: int, position: int) -> int:
        """Where a token begins in its sequence's text, in characters."""
        return int(self.starts[sequence : sequence + 1][0, position])

    def piece(self, sequence: int, position: int) -> str:
        """The characters of the sequence's text that one token covers; empty if it shares them with the next token."""
        text, first = self.texts[sequence], self.start(sequence, position)
        last = position + 1 >= int(self.lengths[sequence])
        return text[first:] if last else text[first : self.start(sequence, position + 1)]

    def shown(self, sequence: int, position: int) -> str:
        """One token for a person: a special one by its name, a part of a character by its bytes, others by their text."""
        number = self.token_id(sequence, position)
        named = self.names.special.get(number) or self.names.fragments.get(number)
        return named or self._text(sequence, position)

    def _text(self, sequence: int, position: int) -> str:
        return self.piece(sequence, position) or self.names.unseen.get(self.token_id(sequence, position), "")

    def is_special(self, sequence: int, position: int) -> bool:
        """Whether a token has a role of its own, such as BOS or EOS."""
        return self.token_id(sequence, position) in self.names.special

    def is_delimiter(self, sequence: int, position: int) -> bool:
        """Whether a token's text is blank or punctuation alone; not so for special tokens and parts of characters."""
        number = self.token_id(sequence, position)
        if number in self.names.special or number in self.names.fragments:
            return False
        return is_delimiter(self._text(sequence, position))

    def delimiters(self, rows: range | None = None) -> NDArray[np.bool_]:
        """(sequence, position) bool, see `is_delimiter`; False for padding. rows: consecutive sequences (default: all)."""
        return np.asarray(self.kinds(rows) == DELIMITER)

    def kinds(self, rows: range | None = None) -> NDArray[np.int8]:
        """(sequence, position) int8: an index into `kinds.KINDS`, or OTHER, also for padding. rows: consecutive sequences
        (default: all).

        The first token of a sequence follows no character: where a document was cut within a word it is a word's start.
        """
        rows = range(len(self.lengths)) if rows is None else rows
        found = np.full((len(rows), self.ids.shape[1]), OTHER, np.int8)
        fragments = self.names.fragments
        known: dict[tuple[str, bool], int] = {}
        for row, sequence in enumerate(rows):
            length, text, own = int(self.lengths[sequence]), self.texts[sequence], slice(sequence, sequence + 1)
            ids, starts = self.ids[own][0, :length].tolist(), self.starts[own][0, :length].tolist()
            for position, (number, start, stop) in enumerate(zip(ids, starts, [*starts[1:], len(text)], strict=True)):
                if number in fragments or number in self.names.special:
                    continue
                piece = text[start:stop] or self.names.unseen.get(number, "")
                key = piece, start > 0 and in_word(text[start - 1])
                if key not in known:
                    known[key] = kind_of(piece, joined=key[1])
                found[row, position] = known[key]
            if len(known) > KNOWN_PIECES:
                known.clear()
        found[self.specials(rows)] = SPECIAL
        return found

    def marks(self, rows: range | None = None) -> NDArray[np.bool_]:
        """(sequence, kind, position) bool, the kinds in the order of `kinds.KINDS`. rows: consecutive sequences (default:
        all)."""
        return np.asarray(self.kinds(rows)[:, None] == np.arange(len(KINDS), dtype=np.int8)[:, None])

    def specials(self, rows: range | None = None) -> NDArray[np.bool_]:
        """(sequence, position) bool, see `is_special`; False for padding. rows: consecutive sequences (default: all)."""
        rows = range(len(self.lengths)) if rows is None else rows
        ids, chosen = np.array(sorted(self.names.special), np.int64), slice(rows.start, rows.stop)
        padding = np.arange(self.ids.shape[1])[None] >= self.lengths[chosen, None]
        return np.asarray(np.isin(self.ids[chosen], ids) & ~padding)


def token_hash(token_ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> str:
    """sha256 of the ids as little-endian int32, sequence after sequence, padding left out."""
    hasher = hashlib.sha256()
    for row, length in zip(token_ids, lengths, strict=True):
        hasher.update(np.ascontiguousarray(row[: int(length)], dtype="<i4").tobytes())
    return hasher.hexdigest()


def lengths_hash(lengths: NDArray[np.int32], positions: int) -> str | None:
    """sha256 of (sequence,) lengths as little-endian int32; None if every sequence has `positions` tokens."""
    if (lengths == positions).all():
        return None
    return hashlib.sha256(lengths.astype("<i4").tobytes()).hexdigest()


def find_corpus(key: str, workspace: Workspace) -> tuple[CorpusInfo, int] | None:
    """A corpus of the workspace, and its largest id; None if there is none or it is damaged."""
    folder = workspace.corpora / key
    found = _sealed(folder)
    if found is None:
        return None
    info, largest, expected = found
    if info.key != key or (changed := changed_files(folder, expected)):
        log.warning("%s is not what was written there (%s): it is made again", folder, ", ".join(changed) or INFO)
        return None
    return info, largest


def _sealed(folder: Path) -> tuple[CorpusInfo, int, dict[str, str]] | None:
    content = read_sealed(folder / INFO)
    if content is None:
        return None
    try:
        files = {name: str(content["files"][name]) for name in FILES}
        return CorpusInfo.model_validate(content["info"]), int(content["largest_id"]), files
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        log.warning("%s is of another version (%s): it is made again", folder / INFO, type(error).__name__)
        return None


def load_corpus(info: CorpusInfo, workspace: Workspace) -> Corpus:
    """The ids and texts that `info` names; raises CorpusError if they are missing, changed, or other ids."""
    folder = workspace.corpora / info.key
    found = _sealed(folder)
    if found is None:
        raise CorpusError(f"the corpus {info.source} is not in {folder} any more: run the study again")
    _, _, expected = found
    if changed := changed_files(folder, expected):
        raise CorpusError(f"{', '.join(changed)} in {folder} doesn't hash to what was written: run the study again")
    hasher, at = hashlib.sha256(), 0

    def hash_rows(block: NDArray[np.int32]) -> None:
        nonlocal at
        for row, length in zip(block, lengths[at : at + len(block)], strict=True):
            hasher.update(row[: int(length)].tobytes())
        at += len(block)

    try:
        lengths = np.load(folder / "lengths.npy", allow_pickle=False)
        token_ids, starts = RowFile(folder / "token_ids.npy", hash_rows), RowFile(folder / "starts.npy")
        texts = TextRows(folder / TEXTS)
        named = json.loads((folder / NAMES).read_bytes())
    except (OSError, ValueError, EOFError) as error:
        raise CorpusError(
            f"the corpus {info.source} can't be read from {folder}: {error}; run the study again"
        ) from error
    shape = (info.num_sequences, info.sequence_length)
    if token_ids.shape != shape or starts.shape != shape or lengths.shape != shape[:1] or len(texts) != shape[0]:
        raise CorpusError(f"the ids in {folder} are {token_ids.shape}, and {shape} were asked: run the study again")
    if (hashed := hasher.hexdigest()) != info.token_sha256:
        raise CorpusError(
            f"the ids in {folder} hash to {hashed[:12]}, not to {info.token_sha256[:12]}: run the study again"
        )
    names = TokenNames(**{kind: {int(number): name for number, name in named[kind].items()} for kind in named})
    return Corpus(info=info, ids=token_ids, lengths=lengths, starts=starts, texts=texts, names=names)


def put_corpus(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`; an existing folder is kept if it is whole, else removed."""
    for _ in range(2):
        try:
            made.rename(folder)
            return
        except OSError:
            if not folder.exists() and not folder.is_symlink():
                raise
        found = _sealed(folder) if folder.is_dir() else None
        if found is not None and not changed_files(folder, found[2]):
            return
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".damaged-"))
        folder.rename(aside / folder.name)
        shutil.rmtree(aside, ignore_errors=True)
    made.rename(folder)
