"""Adds the experts of one layer to the sums while the model computes the next: little is held until the layer ends.

Eager experts are computed in the order of their numbers, each for its own tokens. Their values are counted while they are in
the processor's caches, and their memory is free for the next expert, as it is in a pass that is not watched. The rows of an
expert are added in the order of their tokens, so the bits are those of `add.add_layer`, which takes what `finish` gives.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.errors import SiteError
from outliers.experts.kernels import FLOAT32
from outliers.experts.routed import Routing
from outliers.experts.rows import (
    INFINITY,
    KINDS,
    Largest,
    Slots,
    counter_of,
    limits_of,
    no_kind,
    numpy_of,
    pool_of,
    spans,
)
from outliers.experts.stream_kernels import NOT_ITS_OWN, OUT_OF_ORDER, add_experts, order_experts
from outliers.experts.sums import PATTERNS, ExpertSums

WAITING_BYTES = 16_000_000
"""Values for each thread, and once more, that are held until they are counted together. To change from the model's products to
counting and back costs more than to read these values again: the sums and the histogram come back into a core's cache once for
all of them, and torch's threads are waited for once. At the widths of Qwen3-30B-A3B 16 MB took 3 to 7% of a pass less than 4 MB
(docs/performance.md)."""

PIECES = 4
"""Pieces of work for each thread. A thread of torch that waits for its next product takes half of a core from one of ours; the
others take the pieces that are left."""
EMPTY = {kind: np.empty(0, np.uint32 if kind == FLOAT32 else np.uint16) for kind in INFINITY}
"""Empty arrays: a compiled loop takes the dtype of bits from them."""

_Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""slots, tokens, down_in, output of an expert."""


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
        self._state = np.zeros(3, np.int64)
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
        self._waiting: list[_Given] = []
        self._dtypes = (torch.float32, torch.float32)
        self._held = 0

    def add(self, slots: torch.Tensor, tokens: torch.Tensor, down_in: torch.Tensor, output: torch.Tensor) -> None:
        """Add one expert. slots, tokens: (R,) int64, which slot of which token each row is. down_in: (R, I). output: (R, H).

        The tensors are the model's own. They are looked at and read before `add` returns, or before that of a later expert does,
        or `finish`: what is done for some experts together finds its code in the processor's caches. Raises SiteError for an
        expert that comes out of order, and rows that are not its own.
        """
        if not tokens.numel():
            return
        if self._dtypes != (down_in.dtype, output.dtype):
            self._count()
            self._dtypes = (down_in.dtype, output.dtype)
        self._waiting.append((slots, tokens, down_in, output))
        self._held += down_in.nbytes + output.nbytes
        if self._held >= WAITING_BYTES * (1 + self._threads):
            self._count()

    def finish(self) -> tuple[Slots, tuple[Largest, Largest]]:
        """All experts are added: their slots, and the largest input and output of each. Raises SiteError where rows lack."""
        self._count()
        following, rows, _ = self._state
        if rows != self._chosen.size:
            raise self._wrong(f"{rows} rows for {self._chosen.size} slots of its tokens")
        self._own.starts[following:] = self._own.starts[following]
        for patterns in self._patterns:
            self._histogram += patterns.astype(np.int64)
        return self._own, self._largest

    def _count(self) -> None:
        """Count the experts that wait, each of them in one thread."""
        kept, self._waiting, self._held = [self._readable(*one) for one in self._waiting], [], 0
        if not kept:
            return
        given = np.array([_described(*one) for one in kept], np.int64)
        numbers = self._ordered(given)
        pieces = iter(spans(len(kept), PIECES * self._threads if self._threads > 1 else 1))
        others = [
            pool_of(self._threads).submit(self._count_pieces, worker, pieces, kept, given, numbers)
            for worker in range(1, self._threads)
        ]
        self._count_pieces(0, pieces, kept, given, numbers)
        for other in others:
            other.result()

    def _readable(
        self, slots: torch.Tensor, tokens: torch.Tensor, down_in: torch.Tensor, output: torch.Tensor
    ) -> _Given:
        """An expert whose tensors a compiled loop can read by their addresses."""
        rows, shapes = tokens.shape[0], self._shapes
        if down_in.shape != (rows, shapes.width) or output.shape != (rows, shapes.hidden):
            raise self._wrong(
                f"{rows} rows of {tuple(down_in.shape)} inputs and {tuple(output.shape)} outputs, not {shapes.width} and "
                f"{shapes.hidden} values each"
            )
        if slots.shape != (rows,) or tokens.shape != (rows,) or not slots.dtype == tokens.dtype == torch.int64:
            raise self._wrong(f"{rows} rows of {tuple(slots.shape)} {slots.dtype} slots and {tokens.dtype} tokens")
        for dtype in (down_in.dtype, output.dtype):
            if dtype not in KINDS:
                raise no_kind(dtype)
        return _plain(slots), _plain(tokens), _plain(down_in), _plain(output)

    def _ordered(self, given: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of some experts, whose slots have their places in the order of all."""
        numbers, own = np.empty(len(given), np.int64), self._own
        order = (own.starts, own.places, own.slots)
        found = order_experts(self._chosen, given, (self._lengths, self._positions), order, self._state, numbers)
        expert = int(numbers[self._state[2]])
        if found == OUT_OF_ORDER:
            raise self._wrong(f"expert {expert} behind expert {self._state[0] - 1} of {self._shapes.experts}")
        if found == NOT_ITS_OWN:
            raise self._wrong(f"rows of expert {expert} that are not of its tokens, or come twice")
        return numbers

    def _count_pieces(
        self,
        worker: int,
        pieces: Iterator[tuple[int, int]],
        kept: list[_Given],
        given: NDArray[np.int64],
        numbers: NDArray[np.int64],
    ) -> None:
        """Count pieces until none is left. kept: the tensors, which live until this has ended, whatever the others do."""
        kinds = [KINDS[dtype] for dtype in self._dtypes]
        values = tuple((EMPTY[kind], kind, limits_of(kind)) for kind in kinds)
        tile = np.empty((2, self._shapes.width), np.int16 if values[0][0].itemsize == 2 else np.int32)
        order = (self._own.slots, self._own.places, self._own.starts)
        tops = tuple((largest.tops, largest.columns) for largest in self._largest)
        for piece in pieces:
            add_experts(
                given,
                numbers,
                piece,
                values,
                tile,
                order,
                self._weights,
                self._arrays,
                self._patterns[worker],
                self._counted,
                tops,
            )
        del kept

    def _wrong(self, what: str) -> SiteError:
        return SiteError(
            f"the experts of layer {self._layer} can't be added up as they are computed: {what}; --experts routing or --experts "
            "off reads less"
        )


def _described(slots: torch.Tensor, tokens: torch.Tensor, down_in: torch.Tensor, output: torch.Tensor) -> list[int]:
    """What `order_experts` and `add_experts` are given of an expert."""
    return [tokens.shape[0], tokens.data_ptr(), slots.data_ptr(), down_in.data_ptr(), output.data_ptr()]


def _plain(values: torch.Tensor) -> torch.Tensor:
    """The values in host memory, row by row."""
    own = values if values.is_contiguous() else values.contiguous()
    return own if own.is_cpu else own.cpu()
