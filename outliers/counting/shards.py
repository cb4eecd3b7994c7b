"""The summaries of the shards of a study, on this computer, until they are merged.

They are in `<workspace>/parts/<study_id>/<first>-<stop>/`, and `merge` joins them into exactly what one machine would have
counted. Several runs may work on one study: each shard has a lock, and the study has a lock for what is done to all of its
shards (`locks.locked`). Knows no machine.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from outliers.counting.summary_files import FORMATS, has_summary
from outliers.errors import CorruptCapture
from outliers.files.sealed import check_folder, drop_folder, read_sealed, write_sealed
from outliers.study.parts import LOCKS, Shard
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

RECORD = "part.json"


def folder_of(part: Shard, prepared: Prepared, workspace: Workspace) -> Path:
    """Folder for the summary of a shard on this computer."""
    return parts_folder(prepared, workspace) / f"{part.first}-{part.stop}"


def parts_folder(prepared: Prepared, workspace: Workspace) -> Path:
    """The folder of all shards of a study."""
    return workspace.root / "parts" / prepared.study_id


def draft_of(part: Shard, prepared: Prepared, workspace: Workspace) -> Path:
    """Folder for the summary of a shard until it is complete; not among the shards, which another run may remove."""
    return workspace.root / "parts" / f".{prepared.study_id}-{part.first}-{part.stop}"


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write how a shard was made, after its summary and next to it: this marks the shard as complete."""
    write_sealed(folder / RECORD, record)


def read_record(part: Shard, prepared: Prepared, workspace: Workspace) -> dict[str, Any]:
    """How a shard on this computer was made. Raises CorruptCapture."""
    path = folder_of(part, prepared, workspace) / RECORD
    found = read_sealed(path)
    if found is None:
        raise CorruptCapture(f"{path} is not what was written there: remove its folder, and the part is made again")
    return found


def place_shard(part: Shard, prepared: Prepared, workspace: Workspace) -> None:
    """Move the draft of a shard, with its record, to its folder, in one step. Call it under the study's lock."""
    target = folder_of(part, prepared, workspace)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft_of(part, prepared, workspace).rename(target)


def remove_shards(prepared: Prepared, workspace: Workspace) -> None:
    """Remove all shards of a study after they are merged. Call it under the study's lock."""
    shutil.rmtree(parts_folder(prepared, workspace), ignore_errors=True)


def study_lock(prepared: Prepared, workspace: Workspace) -> Path:
    """The lock to merge, place or remove the shards of a study."""
    return workspace.root / LOCKS / prepared.study_id


def shard_lock(part: Shard, prepared: Prepared, workspace: Workspace) -> Path:
    """The lock to make a shard; it is taken before the study's lock."""
    return workspace.root / LOCKS / f"{prepared.study_id}-{part.first}-{part.stop}"


def is_counted_here(part: Shard, prepared: Prepared, workspace: Workspace) -> bool:
    """Whether the summary of a shard is on this computer, complete and unchanged; errors of number formats may be missing."""
    folder = folder_of(part, prepared, workspace)
    return read_sealed(folder / RECORD) is not None and has_summary(folder)


def is_here(part: Shard, prepared: Prepared, workspace: Workspace) -> bool:
    """Whether all that a shard gives is on this computer, complete and unchanged: with --formats their errors too."""
    formats = folder_of(part, prepared, workspace) / FORMATS
    return is_counted_here(part, prepared, workspace) and (not prepared.spec.formats.formats or check_folder(formats))


def place_beside(part: Shard, prepared: Prepared, workspace: Workspace, made: Path, name: str) -> None:
    """Move a folder next to a shard's summary, under `name`, in one step. Call it under the study's lock."""
    target = folder_of(part, prepared, workspace) / name
    drop_folder(target)
    made.rename(target)
