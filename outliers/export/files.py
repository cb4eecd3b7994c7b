"""Writes an export: whole or not at all, never over a file that is there, and never among results.

Results are what `publish` sends; an export holds numbers of each column, which stay with who asked for them.
"""

from __future__ import annotations

from pathlib import Path

from outliers.errors import BadInput, DiskFull
from outliers.export.formats import Exported
from outliers.files.atomic import NO_ROOM, write_atomic
from outliers.workspace import Workspace

RESULTS = ("manifest.json", "summary.json", "report.html")
"""Files of which a folder of results has one at least."""


def check_out(out: Path, workspace: Workspace, *, force: bool) -> None:
    """Refuse a place to write to before anything is read. Raises BadInput."""
    place = out.expanduser().absolute()
    if place.is_dir():
        raise BadInput(f"--out {out} is a folder: give the file's name too")
    if not place.parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {place.parent}; make it, or give another")
    real = place.resolve()
    if real.is_relative_to(workspace.results.resolve()) or any((real.parent / name).exists() for name in RESULTS):
        raise BadInput(f"--out {out} is among results, which may be published: give a place elsewhere")
    if place.exists() and not force:
        raise BadInput(f"--out {out} is there already: give another name, or --force to replace it")


def write_export(made: Exported, out: Path, *, force: bool) -> list[Path]:
    """Write the file and what belongs next to it; their paths. The caller has called `check_out`.

    Raises BadInput where a file next to it is there already, or where the place can't be written; DiskFull.
    """
    place = out.expanduser().absolute()
    files = {place.with_name(place.stem + ending): data for ending, data in made.beside.items()} | {place: made.content}
    there = [path for path in files if path != place and path.exists()]
    if there and not force:
        raise BadInput(f"{there[0]} is there already: give --out another name, or --force to replace it")
    try:
        for path, data in files.items():
            write_atomic(path, data)
    except OSError as error:
        kind = DiskFull if error.errno in NO_ROOM else BadInput
        raise kind(f"--out {out} can't be written: {error.strerror or error}") from error
    return [place, *(path for path in files if path != place)]
