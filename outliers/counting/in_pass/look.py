"""A second pass over the model for float32 values at resid: those near the median are counted by their bits.

What `counting.second_look` reads of a stored capture again, a pass that stores nothing computes again, once the medians of the
whole are known. Knows tensors and limits, nothing of bins.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.counting.in_pass.counter import BatchMarks
from outliers.counting.summary import FINE, add_up

SITE = "resid"
MASK = 0x7FFF_FFFF
PENDING_VALUES = 1_000_000
"""Distinct values that are held before they are added up."""


class LookCounter:
    """Takes the tensors of a pass, and keeps how often each magnitude occurs that lies between the limits of its layer."""

    def __init__(self, limits: NDArray[np.int64]) -> None:
        """limits: (layer, window, 2), the least and greatest bits without sign of each window; (1, 0) is an empty window."""
        self._limits = limits
        self._lengths: tuple[int, ...] = ()
        self._total, self._pending, self._held = np.zeros(0, FINE), list[NDArray[Any]](), 0

    def begin(self, batch: BatchMarks) -> None:
        """Make ready for the next forward pass."""
        self._lengths = batch.lengths

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Count one tensor of resid, (sequence, position, feature) float32; others are passed over."""
        _, site, layer = key
        windows = [(low, high) for low, high in self._limits[layer].tolist() if low <= high]
        if site != SITE or not windows:
            return
        for row, length in enumerate(self._lengths):
            bits = tensor[row, :length].view(torch.int32) & MASK
            inside = torch.zeros_like(bits, dtype=torch.bool)
            for low, high in windows:
                inside |= (bits >= low) & (bits <= high)  # infinity and NaN are above every limit
            values, counts = torch.unique(bits[inside], return_counts=True)
            found = np.zeros(values.numel(), FINE)
            found["layer"], found["bits"], found["count"] = layer, values.cpu().numpy(), counts.cpu().numpy()
            self._pending.append(found)
            self._held += found.size
        if self._held > PENDING_VALUES:
            self._add()

    def end(self) -> None:
        """All tensors of the batch were submitted."""

    def drain(self) -> NDArray[Any]:
        """FINE of all batches since the last call."""
        self._add()
        found, self._total = self._total, np.zeros(0, FINE)
        return found

    def _add(self) -> None:
        self._total = add_up(np.concatenate([self._total, *self._pending]))
        self._pending, self._held = [], 0

    def __enter__(self) -> LookCounter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass
