"""The journal of a capture, the only record of its finished sequences.

    {"sequence": 3, "crc32": {site: [...]}, "sizes": {site: [...]}, "bytes": ..., "line_crc32": ...}
    {"sequence": 3, "redo": true, "line_crc32": ...}

A line is appended and fsynced after the chunks it names and their folders; the last line of a sequence counts. A line with
`redo` withdraws the sequence, because `verify` found its chunks damaged. Knows lines, nothing of chunks or shapes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outliers.errors import CorruptCapture
from outliers.files.atomic import sync_folder, write_all, write_atomic


def way_out(folder: Path) -> str:
    """The remedy for a damaged capture, for the end of a message."""
    return (
        f"`outliers verify {shlex.quote(str(folder))} --repair` marks what is damaged, and the same study then computes "
        "that alone again"
    )


_LONG = ("crc32", "sizes")
"""Fields of a line that have a number for each chunk of the sequence."""


class Journal:
    """Lines of finished sequences. `done`: sequence -> its last line; `damaged`: numbers of lines that can't be read.

    Lines that this object appends are kept in memory without the fields that name their chunks.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        self.path = path
        self._keep = keep
        self.done: dict[int, dict[str, Any]] = {}
        self.damaged: list[int] = []
        self._lock = threading.Lock()
        self._failed: OSError | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        repair: bool = False,
        tolerant: bool = False,
        keep: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> Journal:
        """Read the journal; a torn last line is dropped, and with `repair` cut off the file.

        keep: line -> what of it to keep in memory (default: all). Raises CorruptCapture for a damaged line, or with
        `tolerant` continues and notes its number.
        """
        journal = cls(path, keep)
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if repair and whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            entry = _parse(line)
            if entry is not None:
                journal._note(entry)
            elif tolerant:
                journal.damaged.append(number)
            else:
                raise CorruptCapture(f"line {number} of {path} is damaged: {way_out(path.parent)}")
        return journal

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Record finished sequences in one durable write. Raises OSError, and then none is recorded."""
        lines = b"".join(sealed_line(entry) for entry in entries)
        with self._lock:
            if self._failed is not None:
                raise self._failed
            begun = self.path.exists()
            with self.path.open("ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    write_all(file.fileno(), lines)
                    os.fsync(file.fileno())
                except OSError as error:
                    # no partial line may stay or be followed: it would be a damaged line in the middle of the file
                    self._failed = error
                    with contextlib.suppress(OSError):
                        file.truncate(size)
                    raise
            if not begun:
                sync_folder(self.path.parent)
            for entry in entries:
                # only a reader of the file needs checksums: here their memory would grow with the corpus
                self._note({name: value for name, value in entry.items() if name not in _LONG})

    def redo(self, sequences: list[int]) -> None:
        """Withdraw sequences, durably: they are not done any more."""
        self.append([{"sequence": sequence, "redo": True} for sequence in sequences])

    def rewrite(self) -> None:
        """Replace the file by the lines that count, without the damaged ones."""
        write_atomic(self.path, b"".join(sealed_line(entry) for entry in self.done.values()))
        self.damaged = []

    def _note(self, entry: dict[str, Any]) -> None:
        if entry.get("redo"):
            self.done.pop(entry["sequence"], None)
        else:
            self.done[entry["sequence"]] = entry if self._keep is None else self._keep(entry)


def sealed_line(entry: dict[str, Any]) -> bytes:
    """One line of a journal with its checksum, `line_crc32`. Equal entries give equal bytes."""
    body = {key: value for key, value in entry.items() if key != "line_crc32"}
    crc = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    return json.dumps(body | {"line_crc32": crc}, sort_keys=True).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The entry of one complete line; None if it is not what was written."""
    try:
        entry: dict[str, Any] = json.loads(line)
        sound = isinstance(entry["sequence"], int) and sealed_line(entry) == line + b"\n"
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry if sound else None
