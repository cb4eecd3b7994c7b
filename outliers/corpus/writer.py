"""Writes a corpus sequence by sequence into its folder, with the memory of one sequence; see `corpus.ids` for the files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from outliers.corpus.ids import FILES, INFO, NAMES, TEXTS, CorpusInfo, TokenNames, lengths_hash, put_corpus
from outliers.corpus.texts import TextsWriter
from outliers.files.atomic import write_atomic
from outliers.files.sealed import checksums, write_sealed
from outliers.workspace import Workspace


class CorpusWriter:
    """A corpus that is being made, in a folder without a name; `finish` puts it in place, and the end of the block removes the
    rest. `fill`: the id of padding, which the mask and not this id marks."""

    def __init__(self, workspace: Workspace, num_sequences: int, sequence_length: int, fill: int = 0) -> None:
        self._workspace, self._length, self._fill = workspace, sequence_length, fill
        workspace.corpora.mkdir(parents=True, exist_ok=True)
        self._made = Path(tempfile.mkdtemp(dir=workspace.corpora, prefix=".corpus-"))
        shape = (num_sequences, sequence_length)
        self._ids, self._starts = (_begin_array(self._made / f"{name}.npy", shape) for name in ("token_ids", "starts"))
        self._texts = TextsWriter(self._made / TEXTS)
        self._hasher = hashlib.sha256()
        self._lengths: list[int] = []
        self.largest_id = 0

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in (self._ids, self._starts):
            file.close()
        shutil.rmtree(self._made, ignore_errors=True)

    def add(self, ids: NDArray[np.int32], starts: NDArray[np.int32], text: str) -> None:
        """Add the next sequence, without padding. starts: where each token begins in `text`, in characters."""
        length = len(ids)
        self._hasher.update(np.ascontiguousarray(ids, "<i4").tobytes())
        self.largest_id = max(self.largest_id, int(ids.max()), self._fill if length < self._length else 0)
        self._lengths.append(length)
        for file, values, rest in ((self._ids, ids, self._fill), (self._starts, starts, 0)):
            row = np.full(self._length, rest, np.int32)
            row[:length] = values
            file.write(row.tobytes())
        self._texts.add(text)

    @property
    def num_tokens(self) -> int:
        """Tokens so far, padding left out."""
        return sum(self._lengths)

    @property
    def hashes(self) -> dict[str, str | None]:
        """`token_sha256` and `lengths_sha256` of all sequences."""
        lengths = np.array(self._lengths, np.int32)
        return {"token_sha256": self._hasher.hexdigest(), "lengths_sha256": lengths_hash(lengths, self._length)}

    def finish(self, info: CorpusInfo, names: TokenNames) -> None:
        """Put the folder in place, also of a damaged corpus; another process may have put the same ids there."""
        for file in (self._ids, self._starts):
            file.flush()
            os.fsync(file.fileno())
        np.save(self._made / "lengths.npy", np.array(self._lengths, np.int32))
        self._texts.close()
        write_atomic(self._made / NAMES, json.dumps(names.__dict__).encode())
        content: dict[str, Any] = {
            "info": info.model_dump(mode="json"),
            "largest_id": self.largest_id,
            "files": checksums(self._made, FILES),
        }
        write_sealed(self._made / INFO, content)
        put_corpus(self._made, self._workspace.corpora / info.key)


def _begin_array(path: Path, shape: tuple[int, int]) -> BinaryIO:
    """A file of `numpy.save` for int32 values, to which the rows are appended."""
    file = path.open("wb")
    descr = np.lib.format.dtype_to_descr(np.dtype(np.int32))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file
