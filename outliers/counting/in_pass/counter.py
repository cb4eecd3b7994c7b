"""What counts a forward pass: the seam between the hooks, which submit tensors, and the two ways of counting.

    host     threads of this process, by the compiled loops of `counting.kernels`
    device   on the device of the tensors, by Triton kernels or by torch's own operators

Knows no file and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.counting.sequence_counts import SequenceCounts
from outliers.counting.summary import Frame, Summary
from outliers.errors import SiteError

BITS = {"bfloat16": torch.int16, "float16": torch.int16, "float32": torch.int32}
"""The integers that a tensor's memory is read as; torch has few operators for unsigned ones."""


@dataclass(frozen=True)
class PassShape:
    """Sizes that a counter is made for.

    batch_sequences: of one pass, at most. positions: of a sequence, at most. span_positions: positions whose float moments are
    added up before they join the total, those of a chunk of a stored capture. aliases: site -> the site that is the same
    tensor, which is submitted once.
    """

    batch_sequences: int
    positions: int
    span_positions: int
    aliases: Mapping[str, str] = field(default_factory=dict)

    def spans(self, length: int) -> list[tuple[int, int]]:
        """(first position, positions) of the spans of a sequence of `length` tokens."""
        step = self.span_positions
        return [(start, min(step, length - start)) for start in range(0, length, step)]


@dataclass(frozen=True)
class BatchMarks:
    """The sequences of one forward pass.

    sequences: their numbers. lengths: tokens of each that are not padding. marks: gives (sequence, kind, position) bool, see
    `Corpus.marks`; called once the pass is queued, for finding them takes time.
    """

    sequences: range
    lengths: tuple[int, ...]
    marks: Callable[[], NDArray[np.bool_]]


class Counter(Protocol):
    """Counts batches one after the other: `begin`, the forward pass that submits every site of every layer, `end`.

    An error of a thread is raised by the next call. The end of the `with` block ends the threads.
    """

    def begin(self, batch: BatchMarks) -> None:
        """Make ready for the next forward pass."""

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Count one tensor. key: (anything, site, layer counted from 0 among the captured). tensor: (sequence, position,
        feature); it may change once this returns. Raises SiteError."""

    def end(self) -> None:
        """All tensors of the batch were submitted. Raises SiteError if one is missing."""

    def take(self) -> list[SequenceCounts]:
        """The counts of the sequences that are finished since the last call, in their order."""

    def drain(self) -> Summary:
        """Wait until all is counted; the Summary of all batches so far. What follows goes on from it."""

    def __enter__(self) -> Counter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class Arrivals:
    """Which tensors of a batch have come: the sites of a group are counted together once all of them are there."""

    def __init__(self, frame: Frame, groups: list[tuple[str, ...]], aliases: Mapping[str, str]) -> None:
        self._stored = [tuple(site for site in group if site not in aliases) for group in groups]
        for group, own in zip(groups, self._stored, strict=True):
            for site in group:
                if site not in own and aliases[site] not in own:
                    raise SiteError(f"the site {site} is the tensor of {aliases[site]}, which is not counted with it")
        self._of = {site: (index, own.index(site)) for index, own in enumerate(self._stored) for site in own}
        self._widths = dict(frame.widths)
        self._dtype = getattr(torch, frame.dtype)
        self._layers = frame.num_layers
        self._come: dict[tuple[int, int], set[int]] = {}
        self._done = 0

    def begin(self) -> None:
        """Forget the last batch."""
        self._come, self._done = {}, 0

    def place(self, site: str, layer: int, tensor: torch.Tensor, batch: BatchMarks) -> tuple[int, int]:
        """(group, member) of a tensor. Raises SiteError if it does not belong to the batch, or has come before."""
        if site not in self._of or not 0 <= layer < self._layers:
            raise SiteError(f"the site {site} of layer {layer} is not one of the counted ones")
        index, member = self._of[site]
        rows, positions = len(batch.sequences), max(batch.lengths)
        wanted = (rows, positions, self._widths[site])
        if tuple(tensor.shape) != wanted or tensor.dtype != self._dtype:
            raise SiteError(
                f"the site {site} of layer {layer} came as {tuple(tensor.shape)} of {tensor.dtype}, and {wanted} of "
                f"{self._dtype} are counted"
            )
        if member in self._come.setdefault((index, layer), set()):
            raise SiteError(f"the site {site} of layer {layer} came twice in one batch")
        return index, member

    def arrived(self, index: int, layer: int, member: int) -> bool:
        """Note a tensor; returns whether its group is complete."""
        come = self._come[index, layer]
        come.add(member)
        complete = len(come) == len(self._stored[index])
        self._done += complete
        return complete

    def check_complete(self) -> None:
        """Raise SiteError if a tensor of the batch is missing."""
        wanted = len(self._stored) * self._layers
        if self._done < wanted:
            raise SiteError(f"{wanted - self._done} of {wanted} layers never came whole: a site was not submitted")

    def members(self, index: int) -> tuple[str, ...]:
        """The sites of a group that are submitted."""
        return self._stored[index]
