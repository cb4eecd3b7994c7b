"""Rows of experts as the compiled loops take them: the bits of tensors, slots in order, what is largest of each, and threads.

Knows tensors and arrays, nothing of sums or of models.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.errors import SiteError
from outliers.experts.kernels import BFLOAT16, FLOAT16, FLOAT32
from outliers.experts.order_kernels import order_slots
from outliers.experts.routed import Routed
from outliers.experts.sums import LADDER
from outliers.experts.table import NOBODY

KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
INFINITY = {BFLOAT16: 0x7F80, FLOAT16: 0x7C00, FLOAT32: 0x7F80_0000}


@dataclass
class Largest:
    """The largest magnitude of each slot's row, float32, and its column, uint16."""

    tops: NDArray[np.float32]
    columns: NDArray[np.uint16]

    @classmethod
    def none(cls, slots: int) -> Largest:
        """Of slots whose values are not known."""
        return cls(np.full(slots, np.nan, np.float32), np.full(slots, NOBODY, np.uint16))


@dataclass
class Slots:
    """Slots without padding, sorted by expert, token and slot; as `order_kernels.order_slots` sets them."""

    starts: NDArray[np.int64]
    slots: NDArray[np.int64]
    places: NDArray[np.int64]

    @classmethod
    def ordered(cls, routed: Routed, experts: int, lengths: tuple[int, ...], positions: int) -> Slots:
        """Of the routed experts of a layer. Raises SiteError."""
        chosen, rows = numpy_of(routed.experts), numpy_of(routed.rows)
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
    def of(cls, valid: NDArray[np.int64], tokens: int) -> Slots:
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


@cache
def limits_of(kind: int) -> NDArray[np.int64]:
    """Bits of infinity and of each magnitude of LADDER; each is a bfloat16 and a float16."""
    magnitudes: NDArray[Any] = np.array(LADDER, np.float16).view(np.uint16)
    if kind != FLOAT16:
        magnitudes = np.array(LADDER, np.float32).view(np.uint32) >> (16 if kind == BFLOAT16 else 0)
    return np.array([INFINITY[kind], *magnitudes], np.int64)


def counter_of(values: int) -> Any:
    """The dtype of a histogram of that number of values: 32 bits where they suffice, for more of it stays in a core's cache."""
    return np.uint32 if values < 1 << 32 else np.uint64


def numpy_of(values: Any) -> NDArray[Any]:
    """A tensor as an array, a view where it is contiguous and in host memory."""
    own = values.detach()
    # numpy copies a small strided tensor faster than torch does
    return np.ascontiguousarray((own if own.device.type == "cpu" else own.cpu()).numpy())


def spans(count: int, pieces: int) -> list[tuple[int, int]]:
    """`count` things in at most that many ranges of about equal lengths, none of them empty."""
    return list(pairwise(sorted({count * n // pieces for n in range(pieces + 1)})))


def no_kind(dtype: torch.dtype) -> SiteError:
    """The error for a dtype that is not counted."""
    return SiteError(f"experts compute in {dtype}, which is not one of {', '.join(map(str, KINDS))}")


def bits_of(values: torch.Tensor) -> tuple[NDArray[Any], int]:
    """(bits, kind) of a tensor, a view where it is contiguous and in host memory."""
    if values.dtype not in KINDS:
        raise no_kind(values.dtype)
    whole = values.dtype == torch.float32
    own = values.detach()
    # each call of a method of a tensor costs a microsecond, and there are thousands of experts
    own = own if own.is_contiguous() else own.contiguous()
    own = own if own.device.type == "cpu" else own.cpu()
    signed = own.view(torch.int32 if whole else torch.int16).numpy()
    return signed.view(np.uint32 if whole else np.uint16), KINDS[values.dtype]


@cache
def pool_of(threads: int) -> ThreadPoolExecutor:
    """Threads for the compiled loops, which release the GIL."""
    return ThreadPoolExecutor(min(threads, os.cpu_count() or 1), thread_name_prefix="experts")
