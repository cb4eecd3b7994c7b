"""The summaries of a study's parts, on this side, until they are merged.

They come to `<workspace>/parts/<study_id>/<first>-<stop>/`, and `merge` joins them into exactly what one machine would have
counted. Any number of runs may be at one study: a part is made under a lock of its own, and what is done to all of them
under the study's (`locks.locked`). It knows no machine.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from outliers.counting.summary_files import has_summary
from outliers.errors import CorruptCapture
from outliers.files.sealed import read_sealed, write_sealed
from outliers.study.parts import LOCKS, Shard
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

RECORD = "part.json"


def folder_of(part: Shard, prepared: Prepared, workspace: Workspace) -> Path:
    """Where a part's summary is on this side."""
    return parts_folder(prepared, workspace) / f"{part.first}-{part.stop}"


def parts_folder(prepared: Prepared, workspace: Workspace) -> Path:
    """The folder of all parts of a study."""
    return workspace.root / "parts" / prepared.study_id


def draft_of(part: Shard, prepared: Prepared, workspace: Workspace) -> Path:
    """Where a part's summary comes to, before it is whole; not among the parts, which another run may remove."""
    return workspace.root / "parts" / f".{prepared.study_id}-{part.first}-{part.stop}"


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """What is told of a part's making, beside its summary and after it: then the part is whole."""
    write_sealed(folder / RECORD, record)


def read_record(part: Shard, prepared: Prepared, workspace: Workspace) -> dict[str, Any]:
    """What is told of the making of a part that is here. Raises CorruptCapture."""
    path = folder_of(part, prepared, workspace) / RECORD
    found = read_sealed(path)
    if found is None:
        raise CorruptCapture(f"{path} is not what was written there: remove its folder, and the part is made again")
    return found


def place_shard(part: Shard, prepared: Prepared, workspace: Workspace) -> None:
    """A part's draft, which has its record, becomes the part: whole, in one step. Under the study's lock."""
    target = folder_of(part, prepared, workspace)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft_of(part, prepared, workspace).rename(target)


def remove_shards(prepared: Prepared, workspace: Workspace) -> None:
    """All that is here of a study's parts: they are in the whole. Under the study's lock."""
    shutil.rmtree(parts_folder(prepared, workspace), ignore_errors=True)


def study_lock(prepared: Prepared, workspace: Workspace) -> Path:
    """The lock of who joins, places or removes a study's parts."""
    return workspace.root / LOCKS / prepared.study_id


def shard_lock(part: Shard, prepared: Prepared, workspace: Workspace) -> Path:
    """The lock of who makes a part; it is taken before the study's."""
    return workspace.root / LOCKS / f"{prepared.study_id}-{part.first}-{part.stop}"


def is_here(part: Shard, prepared: Prepared, workspace: Workspace) -> bool:
    """Whether the summary of a part has come, whole and as it was written."""
    folder = folder_of(part, prepared, workspace)
    return read_sealed(folder / RECORD) is not None and has_summary(folder)
