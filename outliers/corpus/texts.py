"""The texts of a corpus as they are read: one at a time, from the file that holds them all.

The file is one JSON list of strings, as `json.dumps` writes it. Only the place of each text is kept in memory, so that a corpus
of any size takes a few bytes a sequence.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

_BLOCK_BYTES = 1 << 20
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')


class Texts(Sequence[str]):
    """The strings of a JSON list in a file, read when they are asked for. Raises OSError, ValueError where it is not one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts, self._stops = array("q"), array("q")
        for start, stop in _spans(path):
            self._starts.append(start)
            self._stops.append(stop)
        self._last: tuple[int, str] | None = None  # tokens of one sequence are asked for one after the other

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        last = self._last
        if last is not None and last[0] == index:
            return last[1]
        start, stop = self._starts[index], self._stops[index]
        with self._path.open("rb") as file:
            file.seek(start)
            text: str = json.loads(file.read(stop - start))
        self._last = index, text
        return text

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # compared by content, as a list is


def _spans(path: Path) -> Iterator[tuple[int, int]]:
    """Start and stop of each string, in bytes. A string that a block cuts is looked for again with the next block."""
    held, before = b"", 0
    with path.open("rb") as file:
        if file.read(1) != b"[":
            raise ValueError(f"{path} is not a list of texts")
        before = 1
        while block := file.read(_BLOCK_BYTES):
            held, end = held + block, 0
            for found in _STRING.finditer(held):
                yield before + found.start(), before + found.end()
                end = found.end()
            held, before = held[end:], before + end
    if held != b"]":
        raise ValueError(f"{path} ends after {before:,} bytes in the middle of a text")


class TextsWriter:
    """Writes texts as they come: the bytes of `json.dumps` of all of them."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._file.write(b"[")
        self._first = True

    def add(self, text: str) -> None:
        self._file.write((b"" if self._first else b", ") + json.dumps(text).encode())
        self._first = False

    def close(self) -> None:
        """The end of the list; it is on the disk then."""
        self._file.write(b"]")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Write all texts of a corpus."""
    writer = TextsWriter(path)
    for text in texts:
        writer.add(text)
    writer.close()
