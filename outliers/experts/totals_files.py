"""The totals of experts on disk: a file of the private summary, never published, sent from a machine that counted a part.

A file may come from another machine, so its arrays take no more memory than it has bytes, and every shape follows from the
shapes of the study's own capture.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.errors import CaptureError, CorruptCapture
from outliers.experts.sums import ExpertSums
from outliers.experts.table import ExpertShapes
from outliers.experts.totals import OUTPUT, ExpertTotals
from outliers.untrusted.npz import UNREADABLE, open_npz

EXPERTS = "experts.npz"
MAX_LAYERS = 1_024
"""Layers that a summary may claim. All other numbers of its frame are those of arrays that it holds."""

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


def read_totals(folder: Path, *, whole: bool = True) -> ExpertTotals:
    """The totals in a summary's folder. Raises CaptureError if there are none, CorruptCapture if they can't be read.

    whole: False for totals that are still added to, which have no sums.
    """
    path = folder / EXPERTS
    if not path.exists():
        raise CaptureError(f"there are no experts in {folder}: analyze first")
    try:
        with open_npz(path) as stored:
            frame = json.loads(str(stored["frame"]))
            shapes = _shapes(frame["shapes"], stored, whole=whole)
            totals = ExpertTotals.zero(str(frame["study_id"]), shapes)
            for name in _PLAIN:
                if name not in _SPARSE:
                    setattr(totals, name, stored[name])
            _fill(totals.margins, stored["margins"])
            if shapes.values and whole:
                totals.sums = _read_sums(shapes, stored)
            if "input_squares" in stored:
                totals.input_squares = stored["input_squares"]
            _check(totals)
            _check_places(totals, whole=whole)
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


def _shapes(stored: dict[str, Any], arrays: Any, *, whole: bool) -> ExpertShapes:
    """The shapes of a frame. Raises ValueError where they are not those of arrays in the file, whose bytes are there: what is
    allocated after this is a few times as large as the file."""
    shapes = ExpertShapes(**(stored | {name: tuple(stored[name]) for name in ("layers", "shared_widths")}))
    numbers = (shapes.experts, shapes.slots, shapes.width, shapes.hidden, *shapes.layers, *shapes.shared_widths)
    flags = (shapes.values, shapes.applied)
    if any(type(number) is not int for number in numbers) or any(type(flag) is not bool for flag in flags):
        raise ValueError("its frame is not of whole numbers")
    layers, everyone = len(shapes.layers), shapes.all_experts
    if not 1 <= layers <= MAX_LAYERS or min(numbers) < 0 or shapes.experts < 1:
        raise ValueError(f"its frame has {layers} layers, {shapes.experts} experts")
    wanted: dict[str, tuple[int, ...]] = {"weight_units": (layers, everyone)}
    if shapes.values and whole:
        wanted["sums.total"] = (layers, shapes.experts, shapes.width)
        wanted["sums.shared_total"] = (layers, shapes.shared, max(shapes.shared_widths, default=0))
        wanted["sums.energy"] = (layers, everyone, shapes.hidden)
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} is {arrays[name].shape}, its frame has {shape}")
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


def _check_places(totals: ExpertTotals, *, whole: bool) -> None:
    """Raise ValueError where a sequence, expert, position or channel lies outside the frame, or sums are of other tokens."""
    shapes, sequences, lengths = totals.shapes, totals.sequences, totals.lengths
    if (
        (np.diff(sequences) <= 0).any()
        or (sequences < 0).any()
        or (lengths < 1).any()
        or (totals.per_sequence < 0).any()
    ):
        raise ValueError("its sequences are not in order, or counts are below 0")
    if (totals.sums is not None) != (shapes.values and whole):
        raise ValueError("its sums are there where routing alone was read, or are not there")
    if totals.sums is not None:
        same = np.array_equal(totals.sums.sequences, sequences) and np.array_equal(totals.sums.rows, totals.tokens)
        if not same:
            raise ValueError("its sums are of other tokens than its routing")
    outputs = totals.outputs
    _check_inside("outputs", outputs["layer"], len(shapes.layers))
    _check_inside("outputs", outputs["expert"], shapes.all_experts)
    _check_inside("outputs", outputs["channel"], shapes.hidden)
    if not np.isfinite(outputs["magnitude"]).all() or np.isinf(totals.first_row).any():
        raise ValueError("an output is not finite")
    _check_tokens("outputs", totals, outputs["sequence"], outputs["position"])
    for name, place, width in (
        ("down_in", "column", max(shapes.width, *shapes.shared_widths, 1)),
        ("output", "channel", shapes.hidden),
    ):
        found = getattr(totals, f"{name}_max")
        known = ~np.isnan(found)
        if np.isinf(found).any() or (known & (totals.tokens == 0)).any():
            raise ValueError(f"{name}_max has a value without a token, or an infinite one")
        _check_inside(name, getattr(totals, f"{name}_{place}")[known], width)
        own = (getattr(totals, f"{name}_{part}")[known] for part in ("sequence", "position"))
        _check_tokens(name, totals, *own)


def _check_inside(name: str, values: NDArray[Any], limit: int) -> None:
    if values.size and (values.min() < 0 or values.max() >= limit):
        raise ValueError(f"{name} names {values.min()} to {values.max()} of {limit}")


def _check_tokens(name: str, totals: ExpertTotals, sequences: NDArray[Any], positions: NDArray[Any]) -> None:
    """Every (sequence, position) is one of a token."""
    if not sequences.size:
        return
    at = np.searchsorted(totals.sequences, sequences)
    _check_inside(name, at, totals.sequences.size)
    short = (positions < 0) | (positions >= totals.lengths[at])
    if (totals.sequences[at] != sequences).any() or short.any():
        raise ValueError(f"{name} names a token that is in none of its sequences")


def _sparse(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(layer, bin, count) a column: few bins are used."""
    layer, place = np.nonzero(counts)
    return np.stack([layer, place, counts[layer, place]])


def _fill(counts: NDArray[np.int64], stored: NDArray[np.int64]) -> None:
    layer, place, count = stored
    _check_inside("counts", layer, counts.shape[0])
    _check_inside("counts", place, counts.shape[1])
    counts[layer, place] = count
