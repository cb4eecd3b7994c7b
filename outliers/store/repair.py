"""Marks a capture that `verify --repair` changed: its results are not reused until it is complete and they were checked.

    <capture>/repaired.json    from the repair until a report of the capture has the same digest as before

Knows the mark, not the damage: the journal says which sequences to compute. `publish.outcome` does not answer from a marked
capture; the report compares the results and removes the mark.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from outliers.files.sealed import write_sealed
from outliers.study.parts import captures_of_shards
from outliers.workspace import Workspace

MARK = "repaired.json"


def mark_repaired(folder: Path, sequences: Iterable[int]) -> None:
    """Note that sequences of a capture were withdrawn. Raises OSError."""
    write_sealed(folder / MARK, {"sequences": sorted(sequences), "time": time.time()})


def is_repaired(workspace: Workspace, capture_id: str) -> bool:
    """Whether a capture, or a shard of it on this computer, is marked."""
    # only the existence of the file counts, also of a damaged one
    return any((folder / MARK).exists() for folder in _folders(workspace, capture_id))


def forget_repair(workspace: Workspace, capture_id: str) -> None:
    """Remove the mark: the capture is complete, and its results are the same."""
    for folder in _folders(workspace, capture_id):
        (folder / MARK).unlink(missing_ok=True)


def _folders(workspace: Workspace, capture_id: str) -> tuple[Path, ...]:
    parts = (own.capture(capture_id) for _, own in captures_of_shards(workspace, capture_id))
    return (workspace.capture(capture_id), *parts)
