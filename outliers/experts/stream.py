"""Adds the experts of one layer to the sums while the model computes the next: little is held until the layer ends.

Eager experts are computed in the order of their numbers, each for its own tokens. Their values are counted while they are in
the processor's caches, and their memory is free for the next expert, as it is in a pass that is not watched. The rows of an
expert are added in the order of their tokens, so the bits are those of `add.add_layer`, which takes what `finish` gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.errors import SiteError
from outliers.experts.kernels import add_inputs, add_outputs
from outliers.experts.order_kernels import order_rows
from outliers.experts.routed import Routing
from outliers.experts.rows import INFINITY, Largest, Slots, bits_of, counter_of, limits_of, numpy_of, pool_of
from outliers.experts.sums import PATTERNS, ExpertSums

WAITING_BYTES = 4_000_000
"""Values for each thread, and once more, that are held until they are counted together. The sums and the histogram, 256 KB, leave
a core's cache while the model computes, and come back once for all that wait; these values still lie in the last cache."""

_Bits = tuple[NDArray[Any], int]


@dataclass
class _Expert:
    """One expert that waits: its number, and the bits of its inputs and outputs."""

    number: int
    inputs: _Bits
    outputs: _Bits


class ExpertStream:
    """The routed experts of one layer of one batch, one at a time."""

    def __init__(
        self,
        sums: ExpertSums,
        index: int,
        routing: Routing,
        lengths: tuple[int, ...],
        positions: int,
        threads: int | None = None,
    ) -> None:
        """sums, index, lengths, positions, threads: as in `add.add_layer`. Raises SiteError for another number of tokens."""
        self._layer, self._shapes = routing.layer, sums.shapes
        self._chosen = np.ascontiguousarray(numpy_of(routing.experts), np.int64)
        self._weights = numpy_of(routing.weights).reshape(-1)
        size, experts = self._chosen.size, sums.shapes.experts
        if len(self._chosen) != len(lengths) * positions or max(lengths) > positions:
            raise self._wrong(f"{len(self._chosen)} tokens in a pass of {len(lengths)} x {positions}")
        self._lengths, self._positions = np.array(lengths, np.int64), positions
        self._own = Slots(np.zeros(experts + 1, np.int64), np.empty(size, np.int64), np.full(size, -1, np.int64))
        self._largest = (Largest.none(size), Largest.none(size))
        self._arrays = (
            (sums.total[index], sums.squares[index]),
            (sums.low[index], sums.high[index]),
            (sums.nonfinite[index, :experts], sums.hits[:, index, :experts]),
        )
        self._counted = (sums.energy[index, :experts], sums.nonfinite_outputs[index, :experts])
        self._histogram = sums.histogram[index]
        self._threads = threads or torch.get_num_threads()
        counter = counter_of(size * sums.shapes.width)
        self._patterns = [np.zeros(PATTERNS, counter) for _ in range(self._threads)]
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._next = self._rows = self._held = 0

    def add(self, slots: torch.Tensor, tokens: torch.Tensor, down_in: torch.Tensor, output: torch.Tensor) -> None:
        """Add one expert. slots, tokens: (R,) int64, which slot of which token each row is. down_in: (R, I). output: (R, H).

        The tensors are the model's own. They are looked at and read before `add` returns, or before that of a later expert does,
        or `finish`: what is done for some experts together finds its code in the processor's caches. Raises SiteError for an
        expert that comes out of order, and rows that are not its own.
        """
        if not tokens.numel():
            return
        self._waiting.append((slots, tokens, down_in, output))
        self._held += down_in.nbytes + output.nbytes
        if self._held >= WAITING_BYTES * (1 + self._threads):
            self._count()

    def finish(self) -> tuple[Slots, tuple[Largest, Largest]]:
        """All experts are added: their slots, and the largest input and output of each. Raises SiteError where rows lack."""
        self._count()
        if self._rows != self._chosen.size:
            raise self._wrong(f"{self._rows} rows for {self._chosen.size} slots of its tokens")
        self._own.starts[self._next :] = self._own.starts[self._next]
        for patterns in self._patterns:
            self._histogram += patterns.astype(np.int64)
        return self._own, self._largest

    def _ordered(
        self, slots: torch.Tensor, tokens: torch.Tensor, down_in: torch.Tensor, output: torch.Tensor
    ) -> _Expert:
        """An expert whose slots have their places in the order of all."""
        rows, shapes = tokens.numel(), self._shapes
        if down_in.shape != (rows, shapes.width) or output.shape != (rows, shapes.hidden):
            raise self._wrong(
                f"{rows} rows of {tuple(down_in.shape)} inputs and {tuple(output.shape)} outputs, not {shapes.width} and "
                f"{shapes.hidden} values each"
            )
        places, picks = numpy_of(tokens), numpy_of(slots)
        expert = self._expert_of(int(places[0]), int(picks[0]))
        own, filled = self._own, int(self._own.starts[self._next])
        own.starts[self._next : expert + 1] = filled
        rows_of, order = (places, picks), (own.places, own.slots)
        end = order_rows(self._chosen, expert, rows_of, (self._lengths, self._positions), order, filled)
        if end < 0:
            raise self._wrong(f"rows of expert {expert} that are not of its tokens, or come twice")
        own.starts[expert + 1] = end
        self._next, self._rows = expert + 1, self._rows + rows
        return _Expert(expert, bits_of(down_in), bits_of(output))

    def _expert_of(self, token: int, slot: int) -> int:
        tokens, slots = self._chosen.shape
        expert = int(self._chosen[token, slot]) if 0 <= token < tokens and 0 <= slot < slots else -1
        if not self._next <= expert < self._shapes.experts:
            raise self._wrong(f"expert {expert} behind expert {self._next - 1} of {self._shapes.experts}")
        return expert

    def _count(self) -> None:
        """Count the experts that wait, each in one thread."""
        given, self._waiting, self._held = self._waiting, [], 0
        waiting = [self._ordered(*one) for one in given]
        if self._threads == 1:
            self._count_some(waiting, self._patterns[0])
            return
        pool = pool_of(self._threads)
        shares = [
            pool.submit(self._count_some, waiting[number :: self._threads], patterns)
            for number, patterns in enumerate(self._patterns)
        ]
        for share in shares:
            share.result()

    def _count_some(self, experts: list[_Expert], patterns: NDArray[Any]) -> None:
        slots = (self._own.slots, self._own.places, self._own.starts)
        tops = [(largest.tops, largest.columns) for largest in self._largest]
        for one in experts:
            span = (one.number, one.number + 1)
            bits, kind = one.inputs
            tile = np.empty((2, bits.shape[1]), np.int16 if bits.itemsize == 2 else np.int32)
            add_inputs(one.inputs, limits_of(kind), slots, span, tile, *self._arrays, patterns, tops[0])
            infinity = INFINITY[one.outputs[1]]
            add_outputs(one.outputs, infinity, self._weights, slots, span, self._counted, tops[1])

    def _wrong(self, what: str) -> SiteError:
        return SiteError(
            f"the experts of layer {self._layer} can't be added up as they are computed: {what}; --experts routing or --experts "
            "off reads less"
        )
