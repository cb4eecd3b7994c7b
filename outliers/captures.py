"""The captures that a workspace holds: the gigabytes that nothing else frees."""

from __future__ import annotations

import fcntl
import shutil

from pydantic import BaseModel, ConfigDict

from outliers.errors import BadInput, Busy, CaptureError
from outliers.outcome import held_bytes
from outliers.store import Journal, layout_from, read_fingerprint
from outliers.workspace import Workspace


class Held(BaseModel):
    """One capture on disk; a damaged one has `of_sequences` 0."""

    model_config = ConfigDict(frozen=True)

    capture_id: str
    model: str
    done: int
    of_sequences: int
    bytes: int


def list_captures(workspace: Workspace) -> tuple[Held, ...]:
    """Every capture of a workspace, finished or not, by id."""
    folders = sorted(path for path in workspace.captures.glob("*") if path.is_dir())
    found = []
    for folder in folders:
        model, done, total = "damaged", 0, 0
        try:
            fingerprint = read_fingerprint(folder)
            if fingerprint is not None:
                model, total = str(fingerprint["fixed"].get("model", "?")), layout_from(fingerprint).num_sequences
                done = len(Journal.open(folder / "journal.jsonl").done)
        except CaptureError:
            pass  # shown as damaged, so that it can be removed
        found.append(Held(capture_id=folder.name, model=model, done=done, of_sequences=total, bytes=held_bytes(folder)))
    return tuple(found)


def remove_capture(workspace: Workspace, capture_id: str) -> int:
    """Remove one capture; returns the bytes that this frees. Raises BadInput for an unknown one, Busy for one in use."""
    folder = workspace.capture(capture_id)
    if folder.parent != workspace.captures or not folder.is_dir():
        known = ", ".join(held.capture_id for held in list_captures(workspace)) or "none"
        raise BadInput(f"there is no capture {capture_id} in {workspace.root}; there is: {known}")
    held = held_bytes(folder)
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"the capture {capture_id} is being written: end that study first") from error
        shutil.rmtree(folder)
    return held
