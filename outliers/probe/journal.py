"""The journal of a probe: a line for each (change, sequence) that was measured.

    {"change": "zero 247", "sequence": 3, "nll": ..., "tokens": ..., "kl": ..., "top1_probability": ..., "agreement": ...,
     "line_crc32": ...}

Lines are appended and fsynced; a torn last line is cut off when it is opened, and a line that is not what was written counts
as absent, with those after it: they are measured again. Knows lines, nothing of models.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from outliers.files.atomic import sync_folder, write_all
from outliers.store.journal import sealed_line

log = logging.getLogger(__name__)

Key = tuple[str, int]
"""(change, sequence)."""


class ProbeJournal:
    """`done`: (change, sequence) -> its line. Made by `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[Key, dict[str, Any]] = {}

    @classmethod
    def open(cls, path: Path) -> ProbeJournal:
        """Read a journal, and cut off what can't be read."""
        journal = cls(path)
        content = path.read_bytes() if path.exists() else b""
        whole = 0
        for line in content.splitlines(keepends=True):
            entry = _parse(line)
            if entry is None:
                break
            journal.done[entry["change"], entry["sequence"]] = entry
            whole += len(line)
        if whole < len(content):
            log.warning("%s has %d bytes at its end that are not lines: cut off", path, len(content) - whole)
            with path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())
        return journal

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Record lines in one durable write. Raises OSError, and then none is recorded."""
        begun = self.path.exists()
        with self.path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                write_all(file.fileno(), b"".join(sealed_line(entry) for entry in entries))
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise
        if not begun:
            sync_folder(self.path.parent)
        for entry in entries:
            self.done[entry["change"], entry["sequence"]] = entry

    def lacks(self, change: str, sequences: range) -> bool:
        """Whether a sequence has no line of this change."""
        return any((change, sequence) not in self.done for sequence in sequences)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The entry of one complete line; None if it is not what was written."""
    try:
        entry: dict[str, Any] = json.loads(line)
        sound = isinstance(entry["sequence"], int) and isinstance(entry["change"], str) and sealed_line(entry) == line
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry if sound else None
