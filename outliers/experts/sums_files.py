"""The sums of a capture's experts on disk, replaced whole with the sequences that they hold.

    <capture>/experts/<first>-<stop>.npz     sums of sequences of that range, those that are in it by name

A file is written under another name and renamed, so a killed process leaves the old sums or the new ones. They may be behind
the journal: the sequences that are missing in them are read again. Two files may hold the same sequence, where a capture was
read whole and in parts: `choose` takes each sequence once.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import fields
from functools import reduce
from pathlib import Path

import numpy as np

from outliers.errors import CaptureError
from outliers.experts.sums import ExpertSums
from outliers.files.atomic import sync_folder
from outliers.study.expert_shapes import SUMS, ExpertShapes
from outliers.untrusted.npz import UNREADABLE

log = logging.getLogger(__name__)

_NAME = re.compile(r"(\d+)-(\d+)\.npz")
_ARRAYS = tuple(f.name for f in fields(ExpertSums) if f.name != "shapes")


def sums_path(folder: Path, sequences: range) -> Path:
    """The file of the sums that a reading of these sequences makes. folder: of the capture."""
    return folder / SUMS / f"{sequences.start}-{sequences.stop}.npz"


def write_sums(path: Path, sums: ExpertSums) -> None:
    """Write sums whole; they and their name are on the disk then. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **{name: getattr(sums, name) for name in _ARRAYS})
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_sums(path: Path, shapes: ExpertShapes) -> ExpertSums | None:
    """The sums in a file; None where they can't be read or are of other shapes, and then their sequences are read again."""
    sums = ExpertSums.zero(shapes)
    try:
        with np.load(path, allow_pickle=False) as stored:  # zip's checksums are compared as the arrays are read
            for name in _ARRAYS:
                found, wanted = stored[name], getattr(sums, name)
                if found.dtype != wanted.dtype or (name != "sequences" and found.shape != wanted.shape):
                    raise ValueError(f"{name} is {found.dtype} {found.shape}")
                setattr(sums, name, found)
    except UNREADABLE as error:
        log.warning("%s can't be used (%s): its sequences are read again", path, error)
        return None
    return sums


def choose(folder: Path, shapes: ExpertShapes, wanted: range) -> list[tuple[Path, ExpertSums]]:
    """The files whose sums are of the wanted sequences alone, each sequence once; the file of this very range first."""
    own = sums_path(folder, wanted)
    others = sorted((folder / SUMS).glob("*.npz"), key=_range_of)
    chosen: list[tuple[Path, ExpertSums]] = []
    taken: set[int] = set()
    for path in dict.fromkeys((own, *others)):
        first, stop = _range_of(path)
        if not path.exists() or first < wanted.start or stop > wanted.stop:
            continue
        sums = read_sums(path, shapes)
        held = set() if sums is None else set(sums.sequences.tolist())
        if sums is None or not held or held & taken or not held <= set(wanted):
            continue
        chosen.append((path, sums))
        taken |= held
    return chosen


def _range_of(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    return (int(found[1]), int(found[2])) if found else (1 << 62, -1)


def load_sums(folder: Path, shapes: ExpertShapes, wanted: range) -> ExpertSums:
    """The sums of all wanted sequences of a capture. Raises CaptureError where some are missing."""
    found = sorted(choose(folder, shapes, wanted), key=lambda item: _range_of(item[0]))
    parts = [sums for _, sums in found] or [ExpertSums.zero(shapes)]
    total = reduce(ExpertSums.merged, parts)
    missing = len(wanted) - total.sequences.size
    if missing:
        raise CaptureError(
            f"{folder} lacks the sums of its experts of {missing} of {len(wanted)} sequences: extract again to finish it"
        )
    return total


def has_sums(folder: Path, shapes: ExpertShapes, wanted: range) -> bool:
    """Whether the sums of all wanted sequences are there."""
    return sum(sums.sequences.size for _, sums in choose(folder, shapes, wanted)) == len(wanted)
