"""That a capture was taken back by `verify --repair`: nothing answers for it until it is whole and its results were checked.

    <capture>/repaired.json    there from the repair until a report of the capture has come to the digest it had

Knows the mark, not what was damaged: the journal says what is to be computed. Before it: `verify`. After it: `outcome`,
which then doesn't answer, and `reporting`, which compares and takes the mark away.
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
    """Note that sequences of a capture were taken back. Raises OSError."""
    write_sealed(folder / MARK, {"sequences": sorted(sequences), "time": time.time()})


def is_repaired(workspace: Workspace, capture_id: str) -> bool:
    """Whether a capture, or a part of it on this computer, was taken back and is to be computed again."""
    # that the file is there is all it says: a damaged one says it too
    return any((folder / MARK).exists() for folder in _folders(workspace, capture_id))


def forget_repair(workspace: Workspace, capture_id: str) -> None:
    """The capture is whole, and its results are what they were."""
    for folder in _folders(workspace, capture_id):
        (folder / MARK).unlink(missing_ok=True)


def _folders(workspace: Workspace, capture_id: str) -> tuple[Path, ...]:
    parts = (own.capture(capture_id) for _, own in captures_of_shards(workspace, capture_id))
    return (workspace.capture(capture_id), *parts)
