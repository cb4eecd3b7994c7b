"""Adds one layer of a forward pass to the routing table and to the sums, without padding.

Before: `watch` gives the layer. The rows of an expert are added in the order of their tokens, whatever the order in which the
model computed them, so that the same values give the same bits. Each expert, and each column of a sum over all tokens, belongs
to one thread. Knows tensors and arrays, nothing of models or files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.errors import SiteError
from outliers.experts.kernels import BFLOAT16, FLOAT16, FLOAT32, add_inputs, add_outputs, add_squares, order_slots
from outliers.experts.routed import Routed, Shared
from outliers.experts.sums import LADDER, PATTERNS, ExpertSums
from outliers.experts.table import MARGIN, NOBODY

KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
INFINITY = {BFLOAT16: 0x7F80, FLOAT16: 0x7C00, FLOAT32: 0x7F80_0000}
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
) -> None:
    """Add one layer of a batch to the sums, and write its table.

    table: field -> (layer, sequence, position, slot), see `table.FIELDS`. index: of the layer in table and sums. lengths: tokens
    of each sequence. positions: of the pass, padding included. threads: those of torch by default; the result is the same bits
    with any number. Raises SiteError if not each slot of each token has one row.
    """
    shapes = sums.shapes
    if routed.rows is None or routed.down_in is None or routed.output is None or routed.block is None:
        raise SiteError(f"the experts of layer {routed.layer} give their routing alone: there is nothing to add up")
    own = _Slots.ordered(routed, shapes.experts, lengths, positions)
    weights = _numpy(routed.weights).reshape(-1)
    factors = np.ones_like(weights) if routed.applied else weights
    threads = threads or torch.get_num_threads()
    pieces = threads * PIECES if threads > 1 else 1
    largest = [_Largest.none(own.places.size) for _ in range(2)]
    work = _inputs(sums, index, routed.down_in, own, largest[0], pieces)
    counted = (sums.energy[index, : shapes.experts], sums.nonfinite_outputs[index, : shapes.experts])
    work += _outputs(counted, routed.output, own, factors, largest[1], pieces)
    valid = _tokens(lengths, positions)
    shared = [
        _shared(sums, index, number, expert, _Slots.of(valid, len(routed.experts)), work)
        for number, expert in enumerate(routed.shared)
    ]
    work += _squares(sums.block[index], routed.block, valid, pieces)
    _run(work, threads)
    sums.rows[index] += own.rows_of(shapes.shared, valid.size)
    found = [_Rows(_numpy(routed.experts), weights.reshape(-1, shapes.slots), *largest), *shared]
    for field, values in _fields(found, _numpy(routed.margin)).items():
        _write(table[field][index], values, lengths, positions)


@dataclass
class _Largest:
    """The largest magnitude of each slot's row, float32, and its column, uint16."""

    tops: NDArray[np.float32]
    columns: NDArray[np.uint16]

    @classmethod
    def none(cls, slots: int) -> _Largest:
        return cls(np.full(slots, np.nan, np.float32), np.full(slots, NOBODY, np.uint16))


@dataclass
class _Slots:
    """Slots without padding, sorted by expert, token and slot; as `kernels.order_slots` sets them."""

    starts: NDArray[np.int64]
    slots: NDArray[np.int64]
    places: NDArray[np.int64]

    @classmethod
    def ordered(cls, routed: Routed, experts: int, lengths: tuple[int, ...], positions: int) -> _Slots:
        """Of the routed experts of a layer. Raises SiteError."""
        chosen, rows = _numpy(routed.experts), _numpy(routed.rows)
        found = cls(np.empty(experts + 1, np.int64), np.empty(chosen.size, np.int64), np.empty(chosen.size, np.int64))
        whole = len(chosen) == len(lengths) * positions and rows.size == chosen.size and max(lengths) <= positions
        if not whole or not order_slots(
            chosen, rows, np.array(lengths, np.int64), positions, found.starts, found.slots, found.places
        ):
            raise SiteError(
                f"layer {routed.layer} routes {len(chosen)} tokens to {chosen.shape[1]} of {experts} experts and computes "
                f"{rows.size} rows: each of the {len(lengths)} x {positions} tokens should have one row for each of its experts"
            )
        return found

    @classmethod
    def of(cls, valid: NDArray[np.int64], tokens: int) -> _Slots:
        """Of one expert that every token reaches."""
        return cls(np.array([0, valid.size]), valid, np.arange(tokens))

    def rows_of(self, shared: int, tokens: int) -> NDArray[np.int64]:
        """Tokens of each routed and each shared expert, (A,)."""
        return np.concatenate([np.diff(self.starts), np.full(shared, tokens)])

    def pieces(self, count: int) -> list[tuple[int, int]]:
        """Ranges of experts with about equal numbers of rows."""
        bounds = np.searchsorted(self.starts, np.linspace(0, self.starts[-1], count + 1)[1:-1])
        cuts = sorted({0, *bounds.tolist(), self.starts.size - 1})
        return list(pairwise(cuts))


@dataclass
class _Rows:
    """What the table says of the slots of some experts: experts and weights (token, slot), and the largest of each slot."""

    experts: NDArray[Any]
    weights: NDArray[np.float32]
    inputs: _Largest
    outputs: _Largest


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


def _inputs(sums: ExpertSums, index: int, values: torch.Tensor, own: _Slots, largest: _Largest, pieces: int) -> Work:
    """Work that adds the inputs of the routed experts; each piece has a histogram of its own, which `_run` adds last."""
    experts = sums.shapes.experts
    arrays = (
        (sums.total[index], sums.squares[index]),
        (sums.low[index], sums.high[index]),
        (sums.nonfinite[index, :experts], sums.hits[:, index, :experts]),
    )
    bits = _bits(values)
    return [_Inputs(bits, own, piece, arrays, sums.histogram[index], largest) for piece in own.pieces(pieces)]


@dataclass
class _Inputs:
    """One piece of work, and its histogram; counts are the same whatever the pieces."""

    bits: tuple[NDArray[Any], int]
    own: _Slots
    piece: tuple[int, int]
    arrays: tuple[Any, Any, Any]
    histogram: NDArray[np.int64]
    largest: _Largest
    counted: NDArray[Any] | None = None

    def __call__(self) -> None:
        bits, kind = self.bits
        self.counted = np.zeros(PATTERNS, counter_of(self.own.places.size * bits.shape[1]))
        slots = (self.own.slots, self.own.places, self.own.starts)
        largest = (self.largest.tops, self.largest.columns)
        tile = np.empty((2, bits.shape[1]), np.int16 if bits.itemsize == 2 else np.int32)
        add_inputs(bits, kind, _limits(kind), *slots, *self.piece, tile, *self.arrays, self.counted, *largest)

    def merge(self) -> None:
        """Add the piece's histogram to the layer's."""
        if self.counted is not None:
            self.histogram += self.counted.astype(np.int64)


def counter_of(values: int) -> Any:
    """The dtype of a histogram of that number of values: 32 bits where they suffice, for more of it stays in a core's cache."""
    return np.uint32 if values < 1 << 32 else np.uint64


def _outputs(
    counted: tuple[NDArray[np.float64], NDArray[np.int64]],
    values: torch.Tensor,
    own: _Slots,
    factors: NDArray[np.float32],
    largest: _Largest,
    pieces: int,
) -> Work:
    """Work that adds outputs. counted: energy (E, H), and rows that are not finite (E,)."""
    bits, kind = _bits(values)

    def added(piece: tuple[int, int]) -> Callable[[], None]:
        def run() -> None:
            slots = (own.slots, own.places, own.starts)
            add_outputs(bits, kind, INFINITY[kind], factors, *slots, *piece, *counted, largest.tops, largest.columns)

        return run

    return [added(piece) for piece in own.pieces(pieces)]


def _shared(sums: ExpertSums, index: int, number: int, expert: Shared, own: _Slots, work: Work) -> _Rows:
    """Add the work of one shared expert to `work`; its patterns are not in the layer's histogram."""
    at, tokens = sums.shapes.experts + number, own.places.size
    width = sums.shapes.shared_widths[number]
    row = slice(number, number + 1)
    arrays = (
        (sums.shared_total[index, row, :width], sums.shared_squares[index, row, :width]),
        (sums.shared_low[index, row, :width], sums.shared_high[index, row, :width]),
        (sums.nonfinite[index, at : at + 1], sums.hits[:, index, at : at + 1]),
    )
    largest = (_Largest.none(tokens), _Largest.none(tokens))
    weights = np.ones(tokens, np.float32) if expert.weight is None else _numpy(expert.weight)
    work.append(_Inputs(_bits(expert.down_in), own, (0, 1), arrays, np.zeros(PATTERNS, np.int64), largest[0]))
    counted = (sums.energy[index, at : at + 1], sums.nonfinite_outputs[index, at : at + 1])
    work += _outputs(counted, expert.output, own, weights, largest[1], 1)
    return _Rows(np.full((tokens, 1), at), weights, *largest)


def _squares(energy: NDArray[np.float64], values: torch.Tensor, valid: NDArray[np.int64], pieces: int) -> Work:
    bits, kind = _bits(values)

    def added(first: int, last: int) -> Callable[[], None]:
        def run() -> None:
            add_squares(bits, kind, INFINITY[kind], valid, first, last, energy)

        return run

    cuts = sorted({energy.size * n // pieces for n in range(pieces + 1)})
    return [added(first, last) for first, last in pairwise(cuts)]


def _run(work: Work, threads: int) -> None:
    """Do all pieces, in this thread and others; then join their histograms."""
    if threads == 1:
        for piece in work:
            piece()
    else:
        for done in [_pool(threads).submit(piece) for piece in work]:
            done.result()
    for piece in work:
        if isinstance(piece, _Inputs):
            piece.merge()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(threads, os.cpu_count() or 1), thread_name_prefix="experts")


def _limits(kind: int) -> NDArray[np.int64]:
    """Bits of infinity and of each magnitude of LADDER; each is a bfloat16 and a float16."""
    magnitudes: NDArray[Any] = np.array(LADDER, np.float16).view(np.uint16)
    if kind != FLOAT16:
        magnitudes = np.array(LADDER, np.float32).view(np.uint32) >> (16 if kind == BFLOAT16 else 0)
    return np.array([INFINITY[kind], *magnitudes], np.int64)


def _tokens(lengths: tuple[int, ...], positions: int) -> NDArray[np.int64]:
    """The tokens of a pass that are not padding."""
    return np.flatnonzero(np.arange(positions) < np.array(lengths)[:, None])


def _numpy(values: Any) -> NDArray[Any]:
    return np.asarray(values.detach().contiguous().cpu().numpy())


def _bits(values: torch.Tensor) -> tuple[NDArray[Any], int]:
    """(bits, kind) of a tensor, a view where it is contiguous and in host memory."""
    if values.dtype not in KINDS:
        raise SiteError(f"experts compute in {values.dtype}, which is not one of {', '.join(map(str, KINDS))}")
    whole = values.dtype == torch.float32
    signed = _numpy(values.detach().contiguous().view(torch.int32 if whole else torch.int16))
    return signed.view(np.uint32 if whole else np.uint16), KINDS[values.dtype]


def _write(table: NDArray[Any], values: NDArray[Any], lengths: tuple[int, ...], positions: int) -> None:
    """Write (token, slot) values into one layer of a field, (sequence, position, slot), without padding."""
    shaped = values.reshape(len(lengths), positions, -1)
    for row, length in enumerate(lengths):
        table[row, :length] = shaped[row, :length]
