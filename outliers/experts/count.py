"""The routing table and the sums of a capture -> ExpertTotals of some sequences; the model is never loaded.

A sequence's table is read once, whole: a few kilobytes a token for all layers. The inputs of the experts are the stored
`mlp_in`, read a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.errors import CorruptCapture
from outliers.experts.inputs import add_inputs
from outliers.experts.sums import ExpertSums
from outliers.experts.sums_files import load_sums
from outliers.experts.table import ExpertShapes
from outliers.experts.totals import KINDS, OUTPUT, OUTPUTS_KEPT, WEIGHT_UNITS, ExpertTotals, largest_outputs
from outliers.store.chunks import ChunkFiles
from outliers.study.expert_shapes import SUMS
from outliers.study.layout import Layout

MLP_IN = "mlp_in"
LARGEST_WEIGHT = 2.0**31
"""Of a token; those of the known families are below 16 (DeepSeek scales by its routed_scaling_factor)."""


def count_experts(
    study_id: str,
    folder: Path,
    layout: Layout,
    lines: dict[int, dict[str, Any]],
    wanted: range,
    lengths: NDArray[np.int32],
    marks: NDArray[np.bool_],
    progress: Callable[[int], None],
) -> ExpertTotals:
    """The totals of the experts of the wanted sequences of a capture.

    lines: sequence -> its journal line. lengths: (sequence,) int32, tokens of each wanted one. marks: (sequence, kind,
    position) bool, `Corpus.marks` of them. progress: called with the number of finished sequences. Raises CaptureError,
    CorruptCapture.
    """
    if layout.experts is None:
        raise ValueError("the capture holds no experts")
    sums = load_sums(folder, layout.experts, wanted) if layout.experts.values else None
    totals = begin_totals(study_id, layout)
    add_sequences(totals, folder, layout, lines, wanted, lengths, marks, progress)
    return finish_totals(totals, sums, folder)


def begin_totals(study_id: str, layout: Layout) -> ExpertTotals:
    """Totals of no sequence, without sums, for `add_sequences`."""
    if layout.experts is None:
        raise ValueError("the capture holds no experts")
    shapes = layout.experts
    totals = ExpertTotals.zero(study_id, shapes)
    if shapes.values and MLP_IN in layout.widths:
        totals.input_squares = np.zeros((len(shapes.layers), shapes.experts, shapes.hidden))
    return totals


def finish_totals(totals: ExpertTotals, sums: ExpertSums | None, folder: Path) -> ExpertTotals:
    """Totals with the sums of the same sequences. Raises CorruptCapture where these are of other tokens."""
    totals.sums = sums
    if sums is not None and not np.array_equal(sums.rows, totals.tokens):
        raise CorruptCapture(
            f"{folder / SUMS} holds sums of other tokens than the routing of these sequences: remove that folder, and extract "
            "again"
        )
    return totals


def add_sequences(
    totals: ExpertTotals,
    folder: Path,
    layout: Layout,
    lines: dict[int, dict[str, Any]],
    wanted: range,
    lengths: NDArray[np.int32],
    marks: NDArray[np.bool_],
    progress: Callable[[int], None],
) -> None:
    """Add sequences, which come after those that the totals hold: then the bits are those of one count of all. Arguments as
    `count_experts`."""
    shapes, files = totals.shapes, ChunkFiles(folder, layout)
    per_sequence = np.zeros((len(wanted), len(shapes.layers), shapes.all_experts), np.int32)
    for row, sequence in enumerate(wanted):
        crcs, length = lines[sequence]["crc32"], int(lengths[row])
        table = {field: files.read_table(field, sequence, int(crcs[field][0]))[:, :length] for field in shapes.fields}
        per_sequence[row] = _add_sequence(totals, shapes, sequence, table, marks[row, :, :length])
        if totals.input_squares is not None:
            add_inputs(totals.input_squares, files, layout, sequence, crcs, table)
        progress(row + 1)
    totals.sequences = np.concatenate([totals.sequences, np.array(wanted, np.int64)])
    totals.lengths = np.concatenate([totals.lengths, lengths.astype(np.int64)])
    totals.per_sequence = np.concatenate([totals.per_sequence, per_sequence])


def _add_sequence(
    totals: ExpertTotals, shapes: ExpertShapes, sequence: int, table: dict[str, NDArray[Any]], marks: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Add one sequence, whose table has no padding; returns how many tokens reached each expert, (L, A)."""
    layers, everyone = len(shapes.layers), shapes.all_experts
    length = table["expert"].shape[1]
    experts = table["expert"].astype(np.int64)  # (layer, position, slot)
    if experts.size and int(experts.max()) >= everyone:
        raise ValueError(f"the table of sequence {sequence} names expert {int(experts.max())} of {everyone}")
    keys = experts + everyone * np.arange(layers)[:, None, None]
    size = layers * everyone

    def counted(chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(chosen.ravel(), minlength=size).reshape(layers, everyone)

    found = counted(keys)
    for kind, chosen in enumerate((np.arange(length) == 0, *marks[: len(KINDS) - 1])):
        totals.by_kind[kind] += counted(keys[:, chosen])
        totals.kinds[kind] += int(chosen.sum())
    _add_weights(totals, table["expert_weight"].ravel(), keys.ravel())
    _add_margins(totals, table["router_margin"])
    if shapes.values:
        _add_largest(totals, sequence, table, keys, size)
    return found


def _add_weights(totals: ExpertTotals, weights: NDArray[np.float32], keys: NDArray[np.int64]) -> None:
    """weights, keys: one each a slot; a key is an expert in (L, A), flat. What is not finite is counted and left out."""
    finite = np.abs(weights) < LARGEST_WEIGHT  # false for NaN
    own, values = keys[finite], weights[finite].astype(np.float64)
    whole = np.floor(values)
    units = np.rint((values - whole) * WEIGHT_UNITS)
    np.add.at(totals.weight_whole.reshape(-1), own, whole.astype(np.int64))
    np.add.at(totals.weight_units.reshape(-1), own, units.astype(np.int64))
    totals.weight_lost += np.bincount(keys[~finite], minlength=totals.weight_lost.size).reshape(
        totals.weight_lost.shape
    )
    totals.carry()


def _add_margins(totals: ExpertTotals, margins: NDArray[np.float32]) -> None:
    """margins: (layer, position, 1); NaN, where no expert was left out, is not counted."""
    for layer, values in enumerate(margins[..., 0]):
        bins = np.ascontiguousarray(values[~np.isnan(values)]).view(np.uint32) >> 16
        totals.margins[layer] += np.bincount(bins, minlength=totals.margins.shape[1])


def _add_largest(
    totals: ExpertTotals, sequence: int, table: dict[str, NDArray[Any]], keys: NDArray[np.int64], size: int
) -> None:
    """The largest values of each expert, its first row in this sequence, and the largest outputs of each layer."""
    length, slots = keys.shape[1:]
    position = np.broadcast_to(np.arange(length)[:, None], (length, slots))
    for name, field, place in (
        ("down_in", "expert_down_in", "expert_down_in_column"),
        ("output", "expert_output", "expert_output_channel"),
    ):
        values, where = table[field], table[place].astype(np.int64)
        largest = np.full(size, -np.inf, np.float32)
        np.maximum.at(largest, keys.ravel(), np.nan_to_num(values, nan=-np.inf).ravel())
        # positions ascend within a layer, so the first of equal ones is the first token's
        hit = values.ravel() == largest[keys.ravel()]
        index, first = np.unique(keys.ravel()[hit], return_index=True)
        at = np.flatnonzero(hit)[first]
        own = np.broadcast_to(position, keys.shape).ravel()
        totals.take(name, index, values.ravel()[at], where.ravel()[at], sequence, own[at])
    index, first = np.unique(keys.ravel(), return_index=True)
    rows = totals.first_row.reshape(-1)
    rows[index] = np.fmax(rows[index], table["expert_output"].ravel()[first])
    totals.outputs = largest_outputs(np.concatenate([totals.outputs, _outputs(sequence, table)]))


def _outputs(sequence: int, table: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """The OUTPUTS_KEPT largest outputs of each layer of one sequence."""
    magnitudes = table["expert_output"]  # (layer, position, slot)
    layers, _, slots = magnitudes.shape
    flat = np.nan_to_num(magnitudes.reshape(layers, -1), nan=-1.0)
    keep = min(OUTPUTS_KEPT, flat.shape[1])
    # all that equal the smallest kept one stay: the total order decides between them
    least = -np.partition(-flat, keep - 1, axis=1)[:, keep - 1]
    layer, at = np.nonzero((flat >= least[:, None]) & (flat >= 0))
    found = np.zeros(layer.size, OUTPUT)
    position, slot = np.divmod(at, slots)
    found["layer"], found["sequence"], found["position"] = layer, sequence, position
    found["expert"] = table["expert"][layer, position, slot]
    found["channel"] = table["expert_output_channel"][layer, position, slot]
    found["magnitude"] = magnitudes[layer, position, slot]
    found["weight"] = table["expert_weight"][layer, position, slot]
    return found
