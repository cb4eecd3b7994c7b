"""What the processes of one capture say to each other: one JSON object a line, each way a pipe.

    to a worker      a Start, then a Share
    from a worker    ready; journal: lines of finished sequences; log; progress: tokens so far; done: a result; failed: an error

Only the process that started the others writes the journal: a worker hands its lines over once their chunks are on the disk.
Knows no model and no torch.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from outliers.capture.library_errors import memory_message
from outliers.errors import OutliersError, from_record
from outliers.events.event import Level
from outliers.store.journal import Journal
from outliers.study.prepare import Prepared

Kind = Literal["ready", "journal", "log", "progress", "done", "failed"]


class Start(BaseModel):
    """What a worker needs to choose its devices."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prepared: Prepared
    workspace: str


class Share(BaseModel):
    """What one worker reads: `batches` as (first, stop, whether their activations are read), all of the sequences `span`.

    Of the sums of experts: `goes_on`, whether those in the file of the span count, and `held`, the sequences of the batches
    whose values are in the sums already.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    span: tuple[int, int]
    batches: tuple[tuple[int, int, bool], ...]
    goes_on: bool = False
    held: tuple[int, ...] = ()


class Sender:
    """A worker's end: a Reporter whose messages go to the process that started it. Threads may share it.

    OSError where that process is gone.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, kind: Kind, **fields: Any) -> None:
        """Write one message whole."""
        line = json.dumps({"kind": kind, **fields}).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]

    def log(self, level: Level, message: str) -> None:
        """A line for a person."""
        self.send("log", level=level, message=message)

    def progress(self, step: str, done: int, total: int | None, unit: str) -> None:
        """Tokens that this worker has read."""
        if step == "extract":
            self.send("progress", done=done)


class SentJournal(Journal):
    """The journal of a capture as a worker has it: read from the file; what it appends is written by another process."""

    def __init__(self, path: Path, sender: Sender) -> None:
        super().__init__(path)
        self.done = Journal.open(path).done
        self._sender = sender

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Hand over finished sequences, whose chunks are on the disk."""
        self._sender.send("journal", entries=entries)
        for entry in entries:
            self._note(entry)


def as_message(error: Exception) -> dict[str, Any] | None:
    """An error as a worker sends it; None for one that only a traceback explains."""
    if isinstance(error, OutliersError):
        return {"error": type(error).__name__, "message": str(error)}
    if (said := memory_message(error)) is not None:
        return {"error": "MemoryError", "message": said}
    if isinstance(error, OSError):
        return {
            "error": "OSError",
            "message": error.strerror or str(error),
            "errno": error.errno,
            "file": error.filename,
        }
    return None


def as_error(message: dict[str, Any]) -> Exception:
    """The error of `as_message`, to be raised here as if it had happened here."""
    if message["error"] == "MemoryError":
        return MemoryError(message["message"])
    if message["error"] == "OSError":
        return OSError(message["errno"], message["message"], *([message["file"]] if message["file"] else []))
    return from_record(message["error"], message["message"])
