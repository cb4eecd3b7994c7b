"""The rows of a corpus, read from its files when they are asked for: memory does not grow with the corpus.

A file is read once when it is opened, and a checksum of each row stays. So a row that changed on the disk since is an error,
and never other ids. Files are read, not mapped: a mapped file that is cut while it is read would end the process.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from outliers.errors import CorpusError

BLOCK_BYTES = 1 << 20
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
"""A string of JSON. Possessive: nothing is kept to go back to, which takes fifteen times the memory of a text of escapes."""


class IntRows(Protocol):
    """(sequence, position) int32 values of which some sequences are taken; a numpy array is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> NDArray[np.int32]: ...


class Texts(Protocol):
    """The text of each sequence; a tuple of strings is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, sequence: int, /) -> str: ...


class RowFile:
    """The rows of a .npy file of (sequence, position) int32.

    seen: called once with each block of rows, in order, while the file is opened. Raises ValueError where the file is not one.
    """

    def __init__(self, path: Path, seen: Callable[[NDArray[np.int32]], None] | None = None) -> None:
        self._file = path.open("rb", buffering=0)
        if np.lib.format.read_magic(self._file) != (1, 0):
            raise ValueError(f"{path.name} is not of version 1 of numpy's format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(self._file)
        if len(shape) != 2 or fortran or dtype != np.dtype("<i4"):
            raise ValueError(f"{path.name} holds {dtype} of shape {shape}, not rows of int32")
        self.shape: tuple[int, ...] = (int(shape[0]), int(shape[1]))
        self._start, self._row_bytes = self._file.tell(), 4 * self.shape[1]
        self._path = path
        self._sums: list[int] = []
        step = max(1, BLOCK_BYTES // max(1, self._row_bytes))
        for first in range(0, self.shape[0], step):
            block = self._read(first, min(first + step, self.shape[0]))
            self._sums += [zlib.crc32(row) for row in block]
            if seen is not None:
                seen(block)

    def __getitem__(self, rows: slice, /) -> NDArray[np.int32]:
        """(n, position) int32 of consecutive sequences, a new array. CorpusError where the file changed since it was opened."""
        first, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"rows are read one after the other, not every {step}th")
        found = self._read(first, max(first, stop))
        if [zlib.crc32(row) for row in found] != self._sums[first : max(first, stop)]:
            raise CorpusError(f"{self._path} changed while it was read: run the study again")
        return found

    def _read(self, first: int, stop: int) -> NDArray[np.int32]:
        size, at = (stop - first) * self._row_bytes, self._start + first * self._row_bytes
        data = read_exactly(self._file.fileno(), size, at, self._path)
        return np.frombuffer(data, "<i4").reshape(stop - first, self.shape[1])


class TextRows:
    """The strings of a JSON list of strings in a file, by their number. Raises ValueError where the file is not one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._path = path
        found = list(_strings(path))
        self._places = np.array([(at, size) for at, size, _ in found], np.int64).reshape(-1, 2)
        self._sums = [checksum for *_, checksum in found]

    def __len__(self) -> int:
        return len(self._sums)

    def __getitem__(self, sequence: int, /) -> str:
        """One text. IndexError beyond the last; CorpusError where the file changed since it was opened."""
        at, size = map(int, self._places[sequence])
        data = read_exactly(self._file.fileno(), size, at, self._path)
        if zlib.crc32(data) != self._sums[sequence]:
            raise CorpusError(f"{self._path} changed while it was read: run the study again")
        text: str = json.loads(data)
        return text


def _strings(path: Path) -> Iterator[tuple[int, int, int]]:
    """Where each string of a JSON list begins, its bytes with the quotation marks, and their checksum."""
    held, place, between = b"", 0, bytearray()  # bytes would be copied with each string: minutes for a million
    with path.open("rb") as file:
        # as much again as is held: a string of many blocks is not looked through anew with each of them
        while block := file.read(max(BLOCK_BYTES, len(held))):
            held += block
            at = 0
            while (opened := held.find(b'"', at)) >= 0 and (match := _STRING.match(held, opened)) is not None:
                between += held[at:opened]
                yield place + opened, match.end() - opened, zlib.crc32(match[0])
                at = match.end()
            rest = len(held) if opened < 0 else opened
            between += held[at:rest]
            held, place = held[rest:], place + rest
    # what is not in a string: brackets, commas, blanks
    if held or not re.fullmatch(rb"\s*\[\s*(,\s*)*\]\s*", between):
        raise ValueError(f"{path.name} is not a list of strings")


def read_exactly(descriptor: int, size: int, at: int, path: Path) -> bytearray:
    """`size` bytes of a file, from byte `at` on. CorpusError where the file ends before."""
    found = bytearray()
    while len(found) < size:
        more = os.pread(descriptor, size - len(found), at + len(found))
        if not more:
            raise CorpusError(f"{path} ends before its rows do: run the study again")
        found += more
    return found
