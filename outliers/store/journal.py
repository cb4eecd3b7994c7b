"""The journal of a capture, the only record of its finished sequences.

    {"sequence": 3, "crc32": {site: [...]}, "sizes": {site: [...]}, "bytes": ..., "line_crc32": ...}
    {"sequence": 3, "redo": true, "line_crc32": ...}
    {"counted": STUDY, "first": 0, "stop": 64, "upto": 16, "phase": "count", "kept": 4, "line_crc32": ...}

A line is appended and fsynced after the chunks it names and their folders; the last line of a sequence counts. A line with
`redo` withdraws the sequence, because `verify` found its chunks damaged. A line with `counted` says how far a study has counted
a range of sequences whose activations it frees (--store rolling): those are not done, and no line names them. It replaces the
lines of the sequences that it frees, so that the file does not grow with the corpus. Knows lines, nothing of chunks or shapes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import threading
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
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


ROLLING = "rolling"
"""Folder of a capture with what is counted of sequences that are freed (`counting.rolling`)."""
COUNT, LOOK, DONE = "count", "look", "done"
"""Phases of a study that counts windows of a capture: each window; each window again, for what only the whole shows; the
end."""


@dataclass(frozen=True)
class Counted:
    """How far a study has counted the sequences `first` to `stop`, of which those from `kept` on are freed once they are counted.

    upto: the first sequence that is not counted in this phase (`stop` where the phase is DONE).
    """

    counted: str
    first: int
    stop: int
    upto: int
    phase: str
    kept: int

    @property
    def key(self) -> tuple[str, int, int]:
        """A study and its range: one line for each."""
        return self.counted, self.first, self.stop

    @property
    def place(self) -> str:
        """The folder of what was counted, below the capture's."""
        return f"{ROLLING}/{self.counted}-{self.first}-{self.stop}"

    @property
    def state(self) -> str | None:
        """The folder of the summary so far, below the capture's; None where nothing is counted."""
        begun = self.phase != COUNT or self.upto > self.first
        return f"{self.place}/{self.phase}-{self.upto}" if begun else None

    @property
    def freed(self) -> range:
        """The sequences whose activations this study has freed, now or when it counted."""
        last = self.upto if self.phase == COUNT else self.stop
        return range(max(self.first, min(self.kept, last)), last)


class Journal:
    """Lines of finished sequences. `done`: sequence -> its last line; `damaged`: numbers of lines that can't be read; `counted`:
    how far studies have counted what they free.

    Lines that this object appends are kept in memory without the fields that name their chunks.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        self.path = path
        self._keep = keep
        self.done: dict[int, dict[str, Any]] = {}
        self.counted: dict[tuple[str, int, int], Counted] = {}
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

    @property
    def freed(self) -> set[int]:
        """Sequences that were counted and whose activations were freed, and not captured again."""
        return {s for line in self.counted.values() for s in line.freed if s not in self.done}

    def rewrite(self) -> None:
        """Replace the file by the lines that count, without the damaged ones."""
        lines = [*self.done.values(), *map(asdict, self.counted.values())]
        write_atomic(self.path, b"".join(sealed_line(entry) for entry in lines))
        self.damaged = []

    def mark_counted(self, counted: Counted, window: range) -> None:
        """Note, durably and in one step, how far a study has counted; sequences of `window` that it frees are not done any more.

        The file is replaced by its lines that count. Raises OSError, and then the file is as it was.
        """
        freed = [sequence for sequence in window if sequence in counted.freed]
        with self._lock:
            lines: dict[int, bytes] = {}
            for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
                entry = _parse(line.rstrip(b"\n"))
                if entry is None:
                    raise CorruptCapture(f"{self.path} has changed while it was written: {way_out(self.path.parent)}")
                if "counted" in entry:
                    continue
                if entry.get("redo") or entry["sequence"] in freed:
                    lines.pop(entry["sequence"], None)
                else:
                    lines[entry["sequence"]] = line
            self.counted[counted.key] = counted
            own = (sealed_line(asdict(one)) for one in self.counted.values())
            write_atomic(self.path, b"".join((*lines.values(), *own)))
            for sequence in freed:
                self.done.pop(sequence, None)

    def forget_counted(self, key: tuple[str, int, int]) -> None:
        """Withdraw what a study has counted, durably: it begins anew."""
        if self.counted.pop(key, None) is not None:
            self.append([{"counted": key[0], "first": key[1], "stop": key[2], "redo": True}])

    def _note(self, entry: dict[str, Any]) -> None:
        if "counted" in entry:
            self._note_counted(entry)
        elif entry.get("redo"):
            self.done.pop(entry["sequence"], None)
        else:
            self.done[entry["sequence"]] = entry if self._keep is None else self._keep(entry)

    def _note_counted(self, entry: dict[str, Any]) -> None:
        if entry.get("redo"):
            self.counted.pop((entry["counted"], entry["first"], entry["stop"]), None)
            return
        found = Counted(**{name: entry[name] for name in Counted.__dataclass_fields__})
        self.counted[found.key] = found


def sealed_line(entry: dict[str, Any]) -> bytes:
    """One line of a journal with its checksum, `line_crc32`. Equal entries give equal bytes."""
    body = {key: value for key, value in entry.items() if key != "line_crc32"}
    crc = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    return json.dumps(body | {"line_crc32": crc}, sort_keys=True).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The entry of one complete line; None if it is not what was written."""
    try:
        entry: dict[str, Any] = json.loads(line)
        named = entry["counted"] if "counted" in entry else entry["sequence"]
        sound = isinstance(named, str if "counted" in entry else int) and sealed_line(entry) == line + b"\n"
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry if sound else None
