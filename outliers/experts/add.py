"""Adds one layer of a forward pass to the routing table and to the sums, without padding.

Before: `watch` gives the layer. The rows of an expert are added in the order of their tokens, whatever the order in which the
model computed them, so that the same values give the same bits. Each expert, and each column of a sum over all tokens, belongs
to one thread. Knows tensors and arrays, nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.errors import SiteError
from outliers.experts.kernels import add_inputs, add_outputs, add_squares
from outliers.experts.routed import Routed, Shared
from outliers.experts.rows import INFINITY, Largest, Slots, bits_of, counter_of, limits_of, numpy_of, pool_of, spans
from outliers.experts.stream import ExpertStream
from outliers.experts.sums import PATTERNS, ExpertSums
from outliers.experts.table import MARGIN

PIECES = 2
"""Pieces of work for each of several threads: experts have unequal loads, and a thread that is done takes the next piece."""


def add_layer(
    sums: ExpertSums,
    table: dict[str, NDArray[Any]],
    index: int,
    routed: Routed,
    lengths: tuple[int, ...],
    positions: int,
    threads: int | None = None,
    stream: ExpertStream | None = None,
) -> None:
    """Add one layer of a batch to the sums, and write its table.

    table: field -> (layer, sequence, position, slot), see `table.FIELDS`. index: of the layer in table and sums. lengths: tokens
    of each sequence. positions: of the pass, padding included. threads: those of torch by default; the result is the same bits
    with any number. stream: has added the routed experts to these sums already. Raises SiteError if not each slot of each token
    has one row.
    """
    shapes = sums.shapes
    if routed.block is None:
        raise _routing_alone(routed)
    weights = numpy_of(routed.weights).reshape(-1)
    threads = threads or torch.get_num_threads()
    pieces = threads * PIECES if threads > 1 else 1
    work: Work = []
    if stream is not None:
        own, largest = stream.finish()
    else:
        own = Slots.ordered(routed, shapes.experts, lengths, positions)
        largest = (Largest.none(own.places.size), Largest.none(own.places.size))
        work = _routed(sums, index, routed, own, largest, pieces)
    valid = _tokens(lengths, positions)
    shared = [
        _shared(sums, index, number, expert, Slots.of(valid, len(routed.experts)), work)
        for number, expert in enumerate(routed.shared)
    ]
    work += _squares(sums.block[index], routed.block, valid, pieces)
    _run(work, threads)
    sums.rows[index] += own.rows_of(shapes.shared, valid.size)
    found = [_Rows(numpy_of(routed.experts), weights.reshape(-1, shapes.slots), *largest), *shared]
    for field, values in _fields(found, numpy_of(routed.margin)).items():
        _write(table[field][index], values, lengths, positions)


def _routing_alone(routed: Routed) -> SiteError:
    return SiteError(f"the experts of layer {routed.layer} give their routing alone: there is nothing to add up")


@dataclass
class _Rows:
    """What the table says of the slots of some experts: experts and weights (token, slot), and the largest of each slot."""

    experts: NDArray[Any]
    weights: NDArray[np.float32]
    inputs: Largest
    outputs: Largest


def _fields(found: list[_Rows], margin: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Field -> (token, slot) values of the routed experts' slots, then of the shared ones."""

    def joined(pick: Callable[[_Rows], NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([pick(rows).reshape(rows.experts.shape) for rows in found], axis=1)

    return {
        "expert": joined(lambda rows: rows.experts),
        "expert_weight": joined(lambda rows: rows.weights),
        "expert_down_in": joined(lambda rows: rows.inputs.tops),
        "expert_down_in_column": joined(lambda rows: rows.inputs.columns),
        "expert_output": joined(lambda rows: rows.outputs.tops),
        "expert_output_channel": joined(lambda rows: rows.outputs.columns),
        MARGIN: margin[:, None],
    }


Work = list[Callable[[], None]]


def _routed(
    sums: ExpertSums, index: int, routed: Routed, own: Slots, largest: tuple[Largest, Largest], pieces: int
) -> Work:
    """Work that adds inputs and outputs of the routed experts."""
    if routed.down_in is None or routed.output is None:
        raise _routing_alone(routed)
    experts = sums.shapes.experts
    weights = numpy_of(routed.weights).reshape(-1)
    factors = np.ones_like(weights) if routed.applied else weights
    counted = (sums.energy[index, :experts], sums.nonfinite_outputs[index, :experts])
    return [
        *_inputs(sums, index, routed.down_in, own, largest[0], pieces),
        *_outputs(counted, routed.output, own, factors, largest[1], pieces),
    ]


def _inputs(sums: ExpertSums, index: int, values: torch.Tensor, own: Slots, largest: Largest, pieces: int) -> Work:
    """Work that adds the inputs of the routed experts; each piece has a histogram of its own, which `_run` adds last."""
    experts = sums.shapes.experts
    arrays = (
        (sums.total[index], sums.squares[index]),
        (sums.low[index], sums.high[index]),
        (sums.nonfinite[index, :experts], sums.hits[:, index, :experts]),
    )
    bits = bits_of(values)
    return [_Inputs(bits, own, piece, arrays, sums.histogram[index], largest) for piece in own.pieces(pieces)]


@dataclass
class _Inputs:
    """One piece of work, and its histogram; counts are the same whatever the pieces."""

    bits: tuple[NDArray[Any], int]
    own: Slots
    piece: tuple[int, int]
    arrays: tuple[Any, Any, Any]
    histogram: NDArray[np.int64]
    largest: Largest
    counted: NDArray[Any] | None = None

    def __call__(self) -> None:
        bits, kind = self.bits
        self.counted = np.zeros(PATTERNS, counter_of(self.own.places.size * bits.shape[1]))
        slots = (self.own.slots, self.own.places, self.own.starts)
        largest = (self.largest.tops, self.largest.columns)
        tile = np.empty((2, bits.shape[1]), np.int16 if bits.itemsize == 2 else np.int32)
        add_inputs(self.bits, limits_of(kind), slots, self.piece, tile, *self.arrays, self.counted, largest)

    def merge(self) -> None:
        """Add the piece's histogram to the layer's."""
        if self.counted is not None:
            self.histogram += self.counted.astype(np.int64)


def _outputs(
    counted: tuple[NDArray[np.float64], NDArray[np.int64]],
    values: torch.Tensor,
    own: Slots,
    factors: NDArray[np.float32],
    largest: Largest,
    pieces: int,
) -> Work:
    """Work that adds outputs. counted: energy (E, H), and rows that are not finite (E,)."""
    bits = bits_of(values)

    def added(piece: tuple[int, int]) -> Callable[[], None]:
        def run() -> None:
            slots = (own.slots, own.places, own.starts)
            tops = (largest.tops, largest.columns)
            add_outputs(bits, INFINITY[bits[1]], factors, slots, piece, counted, tops)

        return run

    return [added(piece) for piece in own.pieces(pieces)]


def _shared(sums: ExpertSums, index: int, number: int, expert: Shared, own: Slots, work: Work) -> _Rows:
    """Add the work of one shared expert to `work`; its patterns are not in the layer's histogram."""
    at, tokens = sums.shapes.experts + number, own.places.size
    width = sums.shapes.shared_widths[number]
    row = slice(number, number + 1)
    arrays = (
        (sums.shared_total[index, row, :width], sums.shared_squares[index, row, :width]),
        (sums.shared_low[index, row, :width], sums.shared_high[index, row, :width]),
        (sums.nonfinite[index, at : at + 1], sums.hits[:, index, at : at + 1]),
    )
    largest = (Largest.none(tokens), Largest.none(tokens))
    weights = np.ones(tokens, np.float32) if expert.weight is None else numpy_of(expert.weight)
    work.append(_Inputs(bits_of(expert.down_in), own, (0, 1), arrays, np.zeros(PATTERNS, np.int64), largest[0]))
    counted = (sums.energy[index, at : at + 1], sums.nonfinite_outputs[index, at : at + 1])
    work += _outputs(counted, expert.output, own, weights, largest[1], 1)
    return _Rows(np.full((tokens, 1), at), weights, *largest)


def _squares(energy: NDArray[np.float64], values: torch.Tensor, valid: NDArray[np.int64], pieces: int) -> Work:
    bits, kind = bits_of(values)

    def added(first: int, last: int) -> Callable[[], None]:
        def run() -> None:
            add_squares(bits, kind, INFINITY[kind], valid, first, last, energy)

        return run

    return [added(first, last) for first, last in spans(energy.size, pieces)]


def _run(work: Work, threads: int) -> None:
    """Do all pieces, in this thread and others; then join their histograms."""
    left = iter(work)

    def run() -> None:
        for piece in left:
            piece()

    others = [pool_of(threads).submit(run) for _ in range(1, min(threads, len(work)))]
    run()
    for other in others:
        other.result()
    for piece in work:
        if isinstance(piece, _Inputs):
            piece.merge()


def _tokens(lengths: tuple[int, ...], positions: int) -> NDArray[np.int64]:
    """The tokens of a pass that are not padding."""
    return np.flatnonzero(np.arange(positions) < np.array(lengths)[:, None])


def _write(table: NDArray[Any], values: NDArray[Any], lengths: tuple[int, ...], positions: int) -> None:
    """Write (token, slot) values into one layer of a field, (sequence, position, slot), without padding."""
    shaped = values.reshape(len(lengths), positions, -1)
    for row, length in enumerate(lengths):
        table[row, :length] = shaped[row, :length]
