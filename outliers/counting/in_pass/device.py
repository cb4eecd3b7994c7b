"""Counts tensors on the device where they are: nothing but counts leaves it.

Everything runs on the stream that computes the model, in the order of the hooks, so no tensor has to be guarded against being
freed or overwritten: the first site of a group is copied on the device until the other has come. When a batch ends, its keys
give the union counts and the largest tokens, and a megabyte of counts a sequence goes to the host. A model that is split over
several devices has totals and keys on each; the keys are joined at the end of a batch.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.counting.accumulate import Tally, cells_of, site_groups
from outliers.counting.bits import FORMATS, bits_to_float
from outliers.counting.in_pass import torch_ops
from outliers.counting.in_pass.counter import BITS, Arrivals, BatchMarks, PassShape
from outliers.counting.in_pass.state import KEY_BASE, DeviceState, Group, magnitudes_of
from outliers.counting.kernels.arguments import TopTokens
from outliers.counting.sequence_counts import SequenceCounts
from outliers.counting.summary import TOP_TOKENS, Frame, Summary
from outliers.spec import BLOCK, BLOCK_SITES

log = logging.getLogger(__name__)

MASSIVE_SITE = "resid"


class Operations(Protocol):
    """What counts a layer: `torch_ops`, or `triton_ops`."""

    def count_group(self, state: DeviceState, shape: PassShape, group: Group) -> None:
        """Add a group to the state of its device."""


class DeviceCounter:
    """`counter.Counter` on the devices of the tensors."""

    def __init__(
        self, frame: Frame, shape: PassShape, *, begun: Summary | None = None, operations: Operations | None = None
    ) -> None:
        """begun: a Summary to go on from. operations: those of torch by default."""
        self.frame, self.shape = frame, shape
        self._operations = operations or torch_ops
        self._tally = Tally(frame, begun)
        self._groups = site_groups(frame.captured)
        self._arrivals = Arrivals(frame, self._groups, shape.aliases)
        self._states: dict[torch.device, DeviceState] = {}
        self._held: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
        self._batch: BatchMarks | None = None
        self._finished: list[SequenceCounts] = []

    def begin(self, batch: BatchMarks) -> None:
        """Make ready for the next forward pass."""
        self._batch = batch
        self._held.clear()
        self._arrivals.begin()
        with torch.inference_mode():  # the tensors were made in the pass
            for state in self._states.values():
                state.begin()

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Keep a copy of a tensor on its device until its group is whole, then count the group. Raises SiteError."""
        _, site, layer = key
        if self._batch is None:
            raise RuntimeError("submit was called before begin")
        batch = self._batch
        index, member = self._arrivals.place(site, layer, tensor, batch)
        with torch.inference_mode():
            self._take(index, layer, member, tensor, batch)

    def _take(self, index: int, layer: int, member: int, tensor: torch.Tensor, batch: BatchMarks) -> None:
        bits = tensor.detach().view(BITS[self.frame.dtype])
        held = self._held.setdefault((index, layer), {})
        if not self._arrivals.arrived(index, layer, member):
            # the model may overwrite its tensor before the other site comes
            held[member] = bits.clone()
            return
        held[member] = bits
        del self._held[index, layer]
        device = held[0].device
        members = [held[number].to(device) for number in sorted(held)]
        stored, aliases = self._arrivals.members(index), self.shape.aliases
        tensors = tuple(members[stored.index(aliases.get(name, name))] for name in self._groups[index])
        self._count(index, layer, tensors, batch)

    def _count(self, index: int, layer: int, tensors: tuple[torch.Tensor, ...], batch: BatchMarks) -> None:
        sites, device = self._groups[index], tensors[0].device
        state = self._states.get(device)
        if state is None:
            state = self._states[device] = DeviceState(self.frame, self.shape, device, self._tally.summary)
            log.info("counting on %s takes %.0f MB of its memory", device, state.total_bytes / 1e6)
        self._operations.count_group(state, self.shape, Group(sites, layer, tensors, batch.lengths))
        state.layers.add(layer)
        if index == 0:
            state.tokens[layer] += sum(batch.lengths)
        if sites == (MASSIVE_SITE,):
            for row, (sequence, length) in enumerate(zip(batch.sequences, batch.lengths, strict=True)):
                self._massive(state, sequence, layer, tensors[0][row, :length])

    def _massive(self, state: DeviceState, sequence: int, layer: int, bits: torch.Tensor) -> None:
        """Values above 100 at resid, with the middle magnitudes of their tokens; waits for the device once a layer."""
        rules = state.rules
        magnitude = bits.int() & rules.mask
        magnitude = torch.where(magnitude < rules.infinity, magnitude, 0)  # (position, feature)
        rows, columns = torch.nonzero(magnitude > rules.massive, as_tuple=True)
        if not rows.numel():
            return
        tokens, of = torch.unique(rows, return_inverse=True)
        ordered = magnitude[tokens].sort(dim=1).values
        width = ordered.shape[1]
        lower, upper = (ordered[:, rank][of].long().cpu().numpy() for rank in ((width - 1) // 2, width // 2))
        values = bits[rows, columns].cpu().numpy().view(FORMATS[self.frame.dtype].bits)
        self._tally.add_massive(sequence, layer, (rows.cpu().numpy(), columns.cpu().numpy()), values, (lower, upper))

    def end(self) -> None:
        """Count what only all layers say. Raises SiteError if a tensor is missing."""
        self._arrivals.check_complete()
        if self._batch is None:
            raise RuntimeError("end was called before begin")
        batch, home = self._batch, next(iter(self._states.values()))
        marks = torch.from_numpy(batch.marks())  # (sequence, kind, position)
        with torch.inference_mode():
            for state in self._states.values():
                if state is not home:
                    _join(home, state)
            for row in range(len(batch.sequences)):
                self._finished.append(self._close(home, batch, row, marks[row].to(home.device)))
        total = self._tally.summary
        total.sequences = np.union1d(total.sequences, np.array(batch.sequences, np.int64))
        total.tokens += sum(batch.lengths)

    def _close(self, state: DeviceState, batch: BatchMarks, row: int, marks: torch.Tensor) -> SequenceCounts:
        frame, length, found = self.frame, batch.lengths[row], self._tally.summary
        union, legacy = {}, np.zeros(frame.block_width, np.int64)
        for site in frame.sites:
            members = BLOCK_SITES if site == BLOCK else (site,)
            keys = state.sites[members[0]].keys[row, :length]
            if len(members) == 2:
                keys = torch.maximum(keys, state.sites[members[1]].keys[row, :length])
            magnitudes = magnitudes_of(keys, frame.dtype)  # (position, feature)
            hits = [magnitudes >= int(limit) for limit in self._tally.limits.ladder]
            found.sites[site].union += _home(torch.stack([hit.sum(0) for hit in hits]))
            found.sites[site].first_union += _home(torch.stack([hit[0] for hit in hits]))
            union[site] = _home(hits[frame.deciding_step].sum(0))
            if site == BLOCK:
                legacy = _home((magnitudes >= state.rules.legacy).sum(0))
            if site == frame.site:
                self._add_tokens(batch.sequences[row], keys, hits[frame.deciding_step], marks[:, :length])
        tops = {site: _home(state.sites[site].tops[row]) for site in frame.captured}
        hooks = np.zeros(frame.block_width, np.int64)
        if frame.block_width:
            for site in BLOCK_SITES:
                hooks += (tops[site] >= state.rules.legacy).sum(axis=0)
        return SequenceCounts(
            sequence=batch.sequences[row],
            tokens=length,
            hits={site: _home(state.sites[site].own_hits[row]) for site in frame.sites},
            union=union,
            hooks=hooks,
            legacy_union=legacy,
            reach={site: bits_to_float(top.max(axis=1), frame.dtype) for site, top in tops.items()},
        )

    def _add_tokens(self, sequence: int, keys: torch.Tensor, hits: torch.Tensor, marks: torch.Tensor) -> None:
        """Add positions, marks and the largest tokens of the deciding site. keys, hits: (position, feature)."""
        frame, (length, width) = self.frame, keys.shape
        bins = torch.zeros((frame.bins, width), dtype=torch.int64, device=keys.device)
        bins.index_add_(0, torch.arange(length, device=keys.device) // frame.bin_positions, hits.long())
        marked = torch.stack([(hits & kind[:, None]).sum(0) for kind in marks])
        # by magnitude, then by position: a total order, so that a selection is the same however it is made
        places = torch.arange(length - 1, -1, -1, device=keys.device)[:, None]
        rank = torch.where(hits, (magnitudes_of(keys, frame.dtype) << 32) | places, -1)
        best = rank.topk(min(TOP_TOKENS, length), dim=0)  # (kept, feature)
        unsigned = np.uint64 if frame.dtype == "float32" else np.uint32
        chosen = keys.gather(0, best.indices).long() - KEY_BASE[frame.dtype]
        columns = np.where(_home(best.values) >= 0, _home(best.indices), -1).T
        top = TopTokens(np.zeros(width, np.int64), columns, _home(chosen).T.astype(unsigned))
        cells = cells_of(frame, sequence, 0, np.arange(width), top)
        self._tally.add_tokens(_home(bins), _home(marked), _home(hits[0]), cells)

    def take(self) -> list[SequenceCounts]:
        """The counts of the sequences that are finished since the last call, in their order."""
        found, self._finished = self._finished, []
        return found

    def drain(self) -> Summary:
        """Bring the totals to the host, and empty them on the devices; the Summary so far."""
        total = self._tally.finish()
        with torch.inference_mode():
            for state in self._states.values():
                state.flush(total.sites)
        return total

    def __enter__(self) -> DeviceCounter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._states.clear()


def _join(home: DeviceState, other: DeviceState) -> None:
    """Raise the keys of one device to those of another, and add what of the batch its layers have."""
    for site, mine in home.sites.items():
        own = other.sites[site]
        mine.keys = torch.maximum(mine.keys, own.keys.to(home.device))
        mine.own_hits += own.own_hits.to(home.device)
        mine.tops = torch.maximum(mine.tops, own.tops.to(home.device))


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    found: NDArray[Any] = tensor.cpu().numpy()
    return found


def _home(tensor: torch.Tensor) -> NDArray[np.int64]:
    """Integers or bools on the host, int64."""
    return _numpy(tensor).astype(np.int64)
