"""The key-value metadata of a GGUF file, as Python values.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian: magic, version, counts, then key, type and
value after each other. The tensors' descriptions and data come after it and are not read. Every length is checked
against the file, so a file that is cut or damaged is an error and never a wrong value. Knows no key's meaning.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, Final

from outliers.errors import UnknownModel

_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
"""GGUF type -> struct letter."""
_BOOL, _STRING, _ARRAY = 7, 8, 9


class _Bytes:
    """A position in the file; reading beyond the end is a ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise ValueError(
                f"{count:,} bytes are declared at byte {self.at:,}, and the file ends at {len(self.data):,}"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, letter: str, count: int = 1) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{letter}")
        return layout.unpack(self.take(layout.size))

    def count(self) -> int:
        return int(self.numbers("Q")[0])

    def string(self) -> str:
        return self.take(self.count()).decode()

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0]
        if kind == _BOOL:
            return self.take(1) != b"\0"
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.numbers("I")[0], self.count())
        raise ValueError(f"{kind} is not a type of GGUF")

    def array(self, kind: int, count: int) -> list[Any]:
        if kind in _NUMBERS:
            return list(self.numbers(_NUMBERS[kind], count))
        if kind == _BOOL:
            return [byte != 0 for byte in self.take(count)]
        return [self.value(kind) for _ in range(count)]


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file: key -> number, bool, str, or a list of them. Raises UnknownModel."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Bytes(data))
    except (OSError, ValueError, struct.error, OverflowError, MemoryError, RecursionError) as error:
        raise UnknownModel(
            f"the header of {path.name} can't be read ({error}): the file is damaged or was not copied whole; fetch it again"
        ) from error


def _read(source: _Bytes) -> dict[str, Any]:
    magic, version = source.take(4), source.numbers("I")[0]
    if magic != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if version not in (2, 3):
        raise ValueError(f"version {version}; versions 2 and 3, little-endian, are read here")
    source.count()  # of tensors
    found: dict[str, Any] = {}
    for _ in range(source.count()):
        key = source.string()
        found[key] = source.value(source.numbers("I")[0])
    return found
