"""Counts tensors by threads of this process, with the compiled loops that count a stored capture.

`submit` copies a tensor into memory of its own, as the staging buffer does, and returns; threads count what is whole. Each has
its own keys for each span, which are joined when the batch ends. A tensor is read from memory once; nothing is written.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.counting.accumulate import TILE_BYTES, Group, LayerCounts, Span, Tally, site_groups, zero_keys
from outliers.counting.bits import FORMATS
from outliers.counting.in_pass.counter import BITS, Arrivals, BatchMarks, PassShape
from outliers.counting.sequence_counts import OpenSequence, SequenceCounts
from outliers.counting.summary import Frame, Summary

MAX_WORKERS = 4
"""Threads that count: each holds the keys of a batch. Two count faster than two cores compute a model of any size."""
SPARE_SLOTS = 2
"""Slots besides those that are counted: one that is filled, one to go on with."""

Keys = tuple[dict[str, NDArray[Any]], dict[str, NDArray[np.bool_]]]


@dataclass
class _Row:
    """A sequence of the open batch: its spans, and what is counted of each."""

    spans: list[Span]
    found: list[LayerCounts]


@dataclass
class _Open:
    """A batch that is being counted. keys: of each worker, in the order of rows and spans."""

    marks: BatchMarks
    rows: list[_Row]
    left: int
    before: _Open | None
    keys: dict[int, list[Keys]] = field(default_factory=dict)
    closed: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def spans(self) -> Iterator[tuple[int, Span, LayerCounts]]:
        """(row, span, its counts), in order."""
        for number, row in enumerate(self.rows):
            for span, found in zip(row.spans, row.found, strict=True):
                yield number, span, found


@dataclass
class _Job:
    """A group of sites of one layer, whole in a slot."""

    batch: _Open
    group: int
    layer: int
    slot: torch.Tensor


class HostCounter:
    """`counter.Counter` on the processor."""

    def __init__(
        self, frame: Frame, shape: PassShape, *, begun: Summary | None = None, workers: int | None = None
    ) -> None:
        """begun: a Summary to go on from. workers: threads, at most MAX_WORKERS (default: one a core)."""
        self.frame, self.shape = frame, shape
        self.workers = min(MAX_WORKERS, workers or os.cpu_count() or 1)
        self._tally = Tally(frame, begun)
        self._groups = site_groups(frame.captured)
        self._arrivals = Arrivals(frame, self._groups, shape.aliases)
        self._dtype, self._bits = BITS[frame.dtype], FORMATS[frame.dtype].bits
        widest = max(width for _, width in frame.widths)
        self._tile_rows = max(4, TILE_BYTES // (widest * self._bits.itemsize) // 4 * 4)
        largest = max(
            len(self._arrivals.members(index)) * frame.width(group[0]) for index, group in enumerate(self._groups)
        )
        slots = self.workers + SPARE_SLOTS
        self._memory = torch.empty((slots, shape.batch_sequences * shape.positions * largest), dtype=self._dtype)
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for slot in self._memory:
            self._free.put(slot)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._filling: dict[tuple[int, int], torch.Tensor] = {}
        self._batch: _Open | None = None
        self._finished: queue.SimpleQueue[SequenceCounts] = queue.SimpleQueue()
        self._sequences: list[int] = []
        self._tokens = 0
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"counter-{number}", daemon=True)
            for number in range(self.workers)
        ]

    @property
    def total_bytes(self) -> int:
        """Bytes of the slots; the keys of the batch come to them."""
        return self._memory.nbytes

    def begin(self, batch: BatchMarks) -> None:
        """Make ready for the next forward pass. Raises the error of a thread."""
        self._check()
        layers = range(self.frame.num_layers)
        rows, unknown = [], np.zeros((0, 0), np.bool_)
        for sequence, length in zip(batch.sequences, batch.lengths, strict=True):
            spans = [Span(sequence, start, count, unknown, shares=0) for start, count in self.shape.spans(length)]
            rows.append(_Row(spans, [LayerCounts.zero(self.frame, layers) for _ in spans]))
        self._arrivals.begin()
        self._batch = _Open(batch, rows, len(self._groups) * len(layers), self._batch)

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Copy one tensor, and queue its group once it is whole. Raises the error of a thread, SiteError."""
        self._check()
        batch, (_, site, layer) = self._open(), key
        index, member = self._arrivals.place(site, layer, tensor, batch.marks)
        slot = self._filling.get((index, layer))
        if slot is None:
            slot = self._filling[index, layer] = self._free.get()
            self._check()
        self._part(slot, index, member, batch.marks).copy_(tensor.detach().view(self._dtype))
        if self._arrivals.arrived(index, layer, member):
            self._jobs.put(_Job(batch, index, layer, self._filling.pop((index, layer))))

    def end(self) -> None:
        """All tensors of the batch were submitted. Raises SiteError if one is missing, and the error of a thread."""
        self._check()
        self._arrivals.check_complete()
        self._sequences += self._open().marks.sequences
        self._tokens += sum(self._open().marks.lengths)

    def take(self) -> list[SequenceCounts]:
        """The counts of the sequences that are finished since the last call, in their order."""
        found = []
        while not self._finished.empty():
            found.append(self._finished.get())
        return found

    def drain(self) -> Summary:
        """Wait until all is counted; the Summary so far. Raises the error of a thread."""
        if self._batch is not None:
            self._batch.closed.wait()
        self._check()
        total = self._tally.finish()
        total.sequences = np.union1d(total.sequences, np.array(self._sequences, np.int64))
        total.tokens += self._tokens
        self._sequences, self._tokens = [], 0
        return total

    def __enter__(self) -> HostCounter:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        if self._error is not None and self._error is not error:
            if error is None:
                raise self._error
            error.add_note(f"a counting thread failed too: {self._error!r}")

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _open(self) -> _Open:
        if self._batch is None:
            raise RuntimeError("submit was called before begin")
        return self._batch

    def _part(self, slot: torch.Tensor, group: int, member: int, batch: BatchMarks) -> torch.Tensor:
        """A tensor's place in a slot, (sequence, position, feature)."""
        shape = (len(batch.sequences), max(batch.lengths), self.frame.width(self._groups[group][0]))
        size = int(np.prod(shape))
        return slot[member * size : (member + 1) * size].view(shape)

    def _work(self, number: int) -> None:
        rows = min(self._tile_rows, self.shape.span_positions, self.shape.positions)
        groups = [Group(self.frame, sites, rows) for sites in self._groups]
        spare = np.empty((rows, max(width for _, width in self.frame.widths)), self._bits)
        while (job := self._jobs.get()) is not None:
            try:
                # the keys of the batch before are still held; after an error nothing is counted
                if job.batch.before is not None:
                    job.batch.before.closed.wait()
                    job.batch.before = None
                if self._error is None:
                    self._count(job, number, groups[job.group], rows, spare)
            except BaseException as error:  # noqa: BLE001 - the next call raises it in the model's thread
                self._error = error if self._error is None else self._error
            finally:
                self._free.put(job.slot)
                self._counted(job.batch)

    def _count(self, job: _Job, worker: int, group: Group, rows: int, spare: NDArray[Any]) -> None:
        """Count the group of one layer for every sequence of the batch."""
        batch, members = job.batch, self._arrivals.members(job.group)
        parts = {
            site: self._part(job.slot, job.group, number, batch.marks).numpy().view(self._bits)
            for number, site in enumerate(members)
        }
        with batch.lock:
            keys = batch.keys.get(worker)
        if keys is None:
            keys = [zero_keys(self.frame, span.length) for _, span, _ in batch.spans()]
            with batch.lock:
                batch.keys[worker] = keys
        for (row, span, found), (own, touched) in zip(batch.spans(), keys, strict=True):
            for at in range(0, span.length, rows):
                stop = min(at + rows, span.length)
                values = {site: part[row, span.start + at : span.start + stop] for site, part in parts.items()}
                for site in group.sites:
                    if site not in values:
                        # the loops set values that are not finite to zero: each site has its own
                        copy = spare[: stop - at].reshape(-1)[: (stop - at) * self.frame.width(site)]
                        values[site] = copy.reshape(stop - at, -1)
                        values[site][:] = values[self.shape.aliases[site]]
                self._tally.count_tile(group, span, job.layer, at, values, own)
            self._tally.flush(group, span, job.layer, found, touched)

    def _counted(self, batch: _Open) -> None:
        """Note that a job is done; the last one of a batch closes it."""
        with batch.lock:
            batch.left -= 1
            if batch.left:
                return
        try:
            if self._error is None:
                self._close(batch)
        except BaseException as error:  # noqa: BLE001 - as above
            self._error = error
        finally:
            batch.keys.clear()
            batch.closed.set()

    def _close(self, batch: _Open) -> None:
        """Join the keys of the workers, and add what only all layers say. Batches are closed in order, and so are sums added."""
        marks = batch.marks.marks()
        for number, (row, span, _) in enumerate(batch.spans()):
            span.marks = marks[row, :, span.start : span.start + span.length]
            shares = [keys[number] for keys in batch.keys.values()]
            span.shares = len(shares)
            for keys, touched in shares:
                span.join(keys, touched)
            self._tally.close(span)
        for own, length in zip(batch.rows, batch.marks.lengths, strict=True):
            sequence = OpenSequence(self.frame, length)
            for span, found in zip(own.spans, own.found, strict=True):
                sequence.add(span, found, self._tally.summary)
            self._finished.put(sequence.counts())
