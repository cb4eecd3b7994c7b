"""The sums of a capture's experts on disk, replaced whole with the sequences that they hold.

    <capture>/experts/<first>-<stop>.npz     sums of sequences of that range, those that are in it by name
    <capture>/experts/<first>-<stop>.json    its sequences, length and times, when it was written or read whole

A file is written under another name and renamed, so a killed process leaves the old sums or the new ones. They may be behind
the journal: the sequences that are missing in them are read again. Two files may hold the same sequence, where a capture was
read whole and in parts: `choose` takes each sequence once. Whether sums are there is asked before each step, and they may be
gigabytes: a file whose length and times are those that were noted when it was written, or read whole, is not read again. One
that turns out to be damaged when it is counted loses its note, so the next question reads it and finds it absent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from outliers.errors import CaptureError
from outliers.experts.sums import ExpertSums
from outliers.files.atomic import sync_folder
from outliers.files.sealed import read_sealed, write_sealed
from outliers.study.expert_shapes import SUMS, ExpertShapes
from outliers.untrusted.npz import UNREADABLE

log = logging.getLogger(__name__)

_T = TypeVar("_T")
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
    _note(path, sums)


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
        _drop_note(path)
        return None
    return sums


def held_in(path: Path, shapes: ExpertShapes) -> list[int] | None:
    """The sequences whose sums are in a file; None where they can't be used, as `read_sums`, which is called without a note."""
    note = read_sealed(_note_path(path))
    if note is not None and note == _noted(path, shapes, note.get("sequences", [])):
        return list(note["sequences"])
    sums = read_sums(path, shapes)
    if sums is None:
        return None
    _note(path, sums)
    return list(sums.sequences.tolist())


def _drop_note(path: Path) -> None:
    with contextlib.suppress(OSError):
        _note_path(path).unlink(missing_ok=True)


def _note_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _noted(path: Path, shapes: ExpertShapes, sequences: list[int]) -> dict[str, Any]:
    found = path.stat()
    # whatever writes into a file through the file system changes the second time, which no program sets
    stat = {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
    return {"sequences": sequences, "shapes": json.loads(json.dumps(asdict(shapes)))} | stat


def _note(path: Path, sums: ExpertSums) -> None:
    """Note a file that is whole. Where that can't be written the next question reads the file again."""
    with contextlib.suppress(OSError):
        write_sealed(_note_path(path), _noted(path, sums.shapes, sums.sequences.tolist()))


def choose(folder: Path, shapes: ExpertShapes, wanted: range) -> list[tuple[Path, ExpertSums]]:
    """The files whose sums are of the wanted sequences alone, each sequence once; the file of this very range first."""

    def read(path: Path) -> tuple[ExpertSums, list[int]] | None:
        sums = read_sums(path, shapes)
        return None if sums is None else (sums, sums.sequences.tolist())

    return _choose(folder, wanted, read)


def _choose(folder: Path, wanted: range, read: Callable[[Path], tuple[_T, list[int]] | None]) -> list[tuple[Path, _T]]:
    """read: gives what is wanted of a file, and the sequences in it; None where the file can't be used."""
    own = sums_path(folder, wanted)
    others = sorted((folder / SUMS).glob("*.npz"), key=_range_of)
    chosen: list[tuple[Path, _T]] = []
    taken: set[int] = set()
    for path in dict.fromkeys((own, *others)):
        first, stop = _range_of(path)
        if not path.exists() or first < wanted.start or stop > wanted.stop:
            continue
        found = read(path)
        held = set() if found is None else set(found[1])
        if found is None or not held or held & taken or not held <= set(wanted):
            continue
        chosen.append((path, found[0]))
        taken |= held
    return chosen


def _range_of(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    return (int(found[1]), int(found[2])) if found else (1 << 62, -1)


def load_sums(folder: Path, shapes: ExpertShapes, wanted: range) -> ExpertSums:
    """The sums of all wanted sequences of a capture. Raises CaptureError where some are missing."""
    total = ExpertSums.zero(shapes)
    for path in sorted(_held(folder, shapes, wanted), key=_range_of):
        sums = read_sums(path, shapes)  # one at a time: each may be gigabytes
        if sums is not None:
            total = sums if not total.sequences.size else total.joined(sums)
    missing = len(wanted) - total.sequences.size
    if missing:
        raise CaptureError(
            f"{folder} lacks the sums of its experts of {missing} of {len(wanted)} sequences: extract again to finish it"
        )
    return total


def has_sums(folder: Path, shapes: ExpertShapes, wanted: range) -> bool:
    """Whether the sums of all wanted sequences are there. A file is read only where it may have changed since it was whole."""

    return sum(_held(folder, shapes, wanted).values()) == len(wanted)


def _held(folder: Path, shapes: ExpertShapes, wanted: range) -> dict[Path, int]:
    """The files that `choose` takes, and how many sequences each holds."""

    def held(path: Path) -> tuple[int, list[int]] | None:
        sequences = held_in(path, shapes)
        return None if sequences is None else (len(sequences), sequences)

    return dict(_choose(folder, wanted, held))
