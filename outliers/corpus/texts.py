"""Writes the texts of a corpus as they come: one JSON list of strings, with the bytes of `json.dumps` of all of them."""

from __future__ import annotations

import json
import os
from pathlib import Path


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
