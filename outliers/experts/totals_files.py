"""The totals of experts on disk: a file of the private summary, never published, sent from a machine that counted a part.

A file may come from another machine, so its arrays take no more memory than it has bytes, and every shape follows from the
shapes of the study's own capture.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.errors import CaptureError, CorruptCapture
from outliers.experts.sums import ExpertSums
from outliers.experts.table import ExpertShapes
from outliers.experts.totals import OUTPUT, ExpertTotals
from outliers.untrusted.npz import open_npz

EXPERTS = "experts.npz"
UNREADABLE = (
    ValueError,
    KeyError,
    IndexError,
    OSError,
    EOFError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise for an invalid archive."""
MAX_CELLS = 1 << 31
"""Cells of the largest array that a summary may claim: 1,024 layers x 1,024 experts x 2,048 columns."""

_PLAIN = tuple(f.name for f in fields(ExpertTotals) if f.name not in ("study_id", "shapes", "sums", "input_squares"))
_SUMS = tuple(f.name for f in fields(ExpertSums) if f.name not in ("shapes", "histogram"))
_SPARSE = ("margins", "sums.histogram")


def write_totals(folder: Path, totals: ExpertTotals) -> None:
    """Write experts.npz into a summary's folder, whole."""
    arrays: dict[str, NDArray[Any]] = {name: getattr(totals, name) for name in _PLAIN if name not in _SPARSE}
    arrays["margins"] = _sparse(totals.margins)
    frame = {"study_id": totals.study_id, "shapes": asdict(totals.shapes)}
    arrays["frame"] = np.array(json.dumps(frame))
    if totals.sums is not None:
        arrays |= {f"sums.{name}": getattr(totals.sums, name) for name in _SUMS}
        arrays["sums.histogram"] = _sparse(totals.sums.histogram)
    if totals.input_squares is not None:
        arrays["input_squares"] = totals.input_squares
    temporary = folder / f".{EXPERTS}"
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy takes a keyword for its own `allow_pickle`
    temporary.replace(folder / EXPERTS)


def has_totals(folder: Path) -> bool:
    """Whether a summary's folder holds the totals of experts."""
    return (folder / EXPERTS).exists()


def read_totals(folder: Path) -> ExpertTotals:
    """The totals in a summary's folder. Raises CaptureError if there are none, CorruptCapture if they can't be read."""
    path = folder / EXPERTS
    if not path.exists():
        raise CaptureError(f"there are no experts in {folder}: analyze first")
    try:
        with open_npz(path) as stored:
            frame = json.loads(str(stored["frame"]))
            shapes = _shapes(frame["shapes"])
            totals = ExpertTotals.zero(str(frame["study_id"]), shapes)
            for name in _PLAIN:
                if name not in _SPARSE:
                    setattr(totals, name, stored[name])
            _fill(totals.margins, stored["margins"])
            if shapes.values:
                totals.sums = _read_sums(shapes, stored)
            if "input_squares" in stored:
                totals.input_squares = stored["input_squares"]
            _check(totals)
            return totals
    except UNREADABLE as error:
        raise CorruptCapture(f"{path} can't be read: {error}; analyze again") from error


def _read_sums(shapes: ExpertShapes, stored: Any) -> ExpertSums:
    found = ExpertSums.zero(shapes)
    for name in _SUMS:
        value, wanted = stored[f"sums.{name}"], getattr(found, name)
        if value.dtype != wanted.dtype or (name != "sequences" and value.shape != wanted.shape):
            raise ValueError(f"sums.{name} is {value.dtype} {value.shape}, its frame has {wanted.dtype} {wanted.shape}")
        setattr(found, name, value)
    _fill(found.histogram, stored["sums.histogram"])
    return found


def _shapes(stored: dict[str, Any]) -> ExpertShapes:
    """Raises ValueError where they claim more than a model has."""
    shapes = ExpertShapes(**(stored | {name: tuple(stored[name]) for name in ("layers", "shared_widths")}))
    width = max(shapes.width, shapes.hidden, *shapes.shared_widths, 65_536)
    numbers = (shapes.experts, shapes.slots, shapes.width, shapes.hidden, len(shapes.layers))
    if min(numbers) < 1 or len(shapes.layers) * shapes.all_experts * width > MAX_CELLS * 8:
        raise ValueError(f"its frame is of {numbers}")
    return shapes


def _check(totals: ExpertTotals) -> None:
    """Raise ValueError where an array has not the shape and dtype that follow from the frame."""
    zero, count = ExpertTotals.zero(totals.study_id, totals.shapes), totals.sequences.size
    own = (len(totals.shapes.layers), totals.shapes.all_experts)
    wanted = {
        "sequences": (count,),
        "lengths": (count,),
        "per_sequence": (count, *own),
        "outputs": totals.outputs.shape,
    }
    for name in _PLAIN:
        value, neutral = getattr(totals, name), getattr(zero, name)
        if value.dtype != neutral.dtype or value.shape != wanted.get(name, neutral.shape):
            raise ValueError(f"{name} is {value.dtype} {value.shape}")
    if totals.outputs.ndim != 1 or totals.outputs.dtype != OUTPUT:
        raise ValueError(f"outputs are {totals.outputs.dtype}")
    squares, shapes = totals.input_squares, totals.shapes
    if squares is not None and squares.shape != (own[0], shapes.experts, shapes.hidden):
        raise ValueError(f"input_squares is {squares.shape}")


def _sparse(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(layer, bin, count) a column: few bins are used."""
    layer, place = np.nonzero(counts)
    return np.stack([layer, place, counts[layer, place]])


def _fill(counts: NDArray[np.int64], stored: NDArray[np.int64]) -> None:
    layer, place, count = stored
    counts[layer, place] = count
