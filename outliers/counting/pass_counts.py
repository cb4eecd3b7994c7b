"""Counts a corpus in the forward pass: --store none. Nothing is written of a sequence but its counts, the first ones excepted.

Files, lines of the journal and phases are those of `rolling`, so a study may go on with the other store, with the same bits. A
window is what is counted between two checkpoints: the first is one batch, the later ones take about CHECKPOINT_SECONDS. A
process that is killed computes again what came after the last checkpoint.

The first sequences are stored too. What the pass counted of the first batch is compared with what the compiled loops count of
its stored bytes, in every run: a run that goes on feeds the stored bytes to its own counter. A difference ends the study.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outliers.counting.accumulate import Tally
from outliers.counting.analyze import WorkItem, add_item, journal_lines
from outliers.counting.in_pass.choose import open_counter
from outliers.counting.in_pass.compare import first_difference, first_difference_of_sequences
from outliers.counting.in_pass.counter import BITS, BatchMarks, Counter, PassShape
from outliers.counting.in_pass.look import LookCounter
from outliers.counting.rolling import RollingCounts
from outliers.counting.second_look import needs_look, window_bits
from outliers.counting.sequence_counts import SequenceCounts
from outliers.counting.summary import FINE, Summary, add_up
from outliers.counting.summary_files import CountsWriter, read_counts
from outliers.errors import BadInput, CountMismatch
from outliers.store.journal import COUNT, Counted

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
"""What a killed process computes again, about. A checkpoint drains the counter and writes the summary, some tens of megabytes."""


class PassCounts(RollingCounts):
    """The counts of a study whose sequences are counted in the forward pass. `extract` runs the batches of the `next` window
    between `begin` and `end`, with their tensors to `sink`, and gives the window to `take`."""

    _counter: Counter | LookCounter | None = None
    _device = "cpu"
    _window_began = 0.0
    _run = range(0)
    _losses: dict[int, tuple[float, int]]

    @property
    def stored(self) -> range:
        """The sequences that were counted, and must be on the disk: the next batch may have to store its own."""
        counted = self.line.upto if self.line.phase == COUNT else self.line.stop
        return range(self.kept.start, max(self.kept.start, min(self.kept.stop, counted)))

    def sink(self) -> Counter | LookCounter:
        """Takes the tensors of a batch that was begun."""
        if self._counter is None:
            raise RuntimeError("nothing counts yet: tensors are taken inside of `counting`")
        return self._counter

    @property
    def _batch(self) -> int:
        return self.prepared.spec.capture.batch_sequences

    @cached_property
    def _shape(self) -> PassShape:
        layout = self.layout
        return PassShape(self._batch, layout.positions, layout.chunk_positions, layout.aliases)

    def next(self) -> range | None:
        """The window until the next checkpoint; None at the end. The first is one batch, which is compared."""
        if not self.finished and self.line.phase == COUNT and self.line.upto == self.line.first:
            self.size = self._batch
        return super().next()

    @contextlib.contextmanager
    def counting(self, device: str) -> Iterator[None]:
        """What counts on a device, checked against what is stored, until the block ends. Raises CountMismatch."""
        self._device, self._losses = device, {}
        self.size, self._window_began = self._batch, time.monotonic()
        if self.finished:
            yield
            return
        if self.line.phase == COUNT:
            if self.line.upto > self.line.first:
                self._check_again()
            with self._open_counter(self.summary) as counter:
                self._counter = counter
                yield
        else:
            self._counter = self._look()
            yield

    def _open_counter(self, begun: Summary | None) -> Counter:
        return open_counter(self.tally.frame, self._shape, self._device, begun=begun, workers=self.workers)

    def _look(self) -> LookCounter:
        return LookCounter(window_bits(self.summary.fine_windows))

    def begin(self, run: range) -> None:
        """The next forward pass is of this batch."""
        lengths = tuple(int(length) for length in self.corpus.lengths[run.start : run.stop])
        self.sink().begin(BatchMarks(run, lengths, partial(self.corpus.marks, run)))
        self._run = run

    def end(self, losses: list[tuple[float, int]] | None) -> None:
        """The forward pass of the batch is done. losses: of each sequence, nats and the tokens they are over."""
        self.sink().end()
        if losses is not None:
            self._losses |= dict(zip(self._run, losses, strict=True))

    def take(self, window: range) -> None:
        """Put what is counted up to the end of a window on the disk, and note it in the journal. Raises CountMismatch."""
        self._pause("captured")
        if isinstance(counter := self.sink(), LookCounter):
            self.summary.fine = add_up(np.concatenate([self.summary.fine, counter.drain()]))
        else:
            self._take_counts(counter, window)
        before = self.line.phase
        line = self._after(window)
        self._save(line)
        self._pause("counted")
        self._note(line, window)
        if line.phase != before and not self.finished:
            self._counter = self._look()
        self._pace(window)

    def _take_counts(self, counter: Counter, window: range) -> None:
        total, sequences = counter.drain(), counter.take()
        if needs_look(total):
            # a pass knows no median of the whole: which values are near it is counted by a second one
            total.fine, total.fine_windows[:] = np.zeros(0, FINE), (1, 0)
        if self.line.upto == self.line.first:
            self._compare(total, sequences, window)
        writer = CountsWriter(self.place)
        for counts in sequences:
            counts.nll, counts.nll_tokens = self._losses.pop(counts.sequence, (0.0, 0))
            writer.add(counts)
        writer.flush()
        steps = len(self.wanted) * len(self.layout.layers)
        done = (window.stop - self.wanted.start) * len(self.layout.layers)
        self.reporter.progress("analyze", done, steps, "layers")

    def _pace(self, window: range) -> None:
        """Let the next window take about CHECKPOINT_SECONDS, at most twice as long as this one."""
        now = time.monotonic()
        each = max(1e-3, (now - self._window_began) / len(window))
        wanted = min(int(CHECKPOINT_SECONDS / each), 2 * len(window))
        self.size, self._window_began = max(1, wanted // self._batch) * self._batch, now

    def _begin(self) -> Counted:
        """As of rolling; the first batch of the range is stored whatever is kept of the whole corpus."""
        line = super()._begin()
        if line.kept >= line.first + self._batch:
            return line
        line = Counted(**(line.__dict__ | {"kept": min(line.stop, line.first + self._batch)}))
        self.journal.mark_counted(line, range(0))
        return line

    def _open(self, line: Counted) -> Counted:
        if self.layout.experts is not None:
            raise BadInput(
                f"the capture {self.prepared.capture_id} was begun with the experts of the model, which --store none does not "
                f"count: give --store rolling, or remove it with `outliers captures rm {self.prepared.capture_id}`"
            )
        return super()._open(line)

    def _tell_look(self) -> None:
        log.info(
            "values at resid are above 100: the model reads the corpus once more, for the values near the medians of its layers"
        )

    def _first_batch(self) -> range:
        return range(self.line.first, min(self.line.first + self._batch, self.line.stop))

    def _compare(self, total: Summary, sequences: list[SequenceCounts], window: range) -> None:
        """Raise CountMismatch where the counts of the first batch are not those of its stored bytes."""
        with tempfile.TemporaryDirectory(dir=self.place, prefix=".stored-") as name:
            item = self._item(window, Path(name))
            tally = Tally(self.tally.frame)
            add_item(tally, item, self.layout, self.workers)
            stored = tally.finish()
            counts = list(read_counts(Path(name), self.tally.frame))
        stored.sequences, stored.tokens = np.array(window, np.int64), int(item.lengths.sum())
        found = first_difference(total, stored) or first_difference_of_sequences(sequences, counts)
        if found is not None:
            raise CountMismatch(
                f"counting in the forward pass on {self._device} and counting the stored values of the same sequences "
                f"({window.start}:{window.stop}) differ in {found}: the study is not counted; give --store rolling, and report it"
            )
        log.info("what the pass counted of %d sequences is what their stored values give, bit for bit", len(window))

    def _item(self, window: range, target: Path) -> WorkItem:
        lengths = self.corpus.lengths[window.start : window.stop]
        return WorkItem(self.folder, self.tally.frame, tuple(window), lengths, self.corpus.marks(window), target)

    def _check_again(self) -> None:
        """Feed the stored bytes of the first batch to a counter of this run, and compare. Raises CountMismatch."""
        run = self._first_batch()
        lengths = tuple(int(length) for length in self.corpus.lengths[run.start : run.stop])
        lines = journal_lines(self.folder, run)
        with self._open_counter(None) as counter:
            counter.begin(BatchMarks(run, lengths, partial(self.corpus.marks, run)))
            for layer in range(len(self.layout.layers)):
                for site in self.layout.stored:
                    counter.submit((None, site, layer), self._stored_tensor(site, layer, run, lengths, lines))
            counter.end()
            total = counter.drain()
            self._compare(total, counter.take(), run)

    def _stored_tensor(
        self, site: str, layer: int, run: range, lengths: tuple[int, ...], lines: dict[int, dict[str, Any]]
    ) -> torch.Tensor:
        """The stored values of a site of a layer, (sequence, position, feature), padding 0. Raises CorruptCapture."""
        layout, dtype = self.layout, self.layout.dtype
        whole = torch.zeros((len(run), max(lengths), layout.widths[site]), dtype=getattr(torch, dtype))
        for row, (sequence, length) in enumerate(zip(run, lengths, strict=True)):
            chunks = layout.chunks_of(length)
            crcs = lines[sequence]["crc32"][site][layer * chunks : (layer + 1) * chunks]
            parts = [self.files.read(site, layer, sequence, n, int(crc)) for n, crc in enumerate(crcs)]
            values = np.concatenate(parts)[:length]
            signed = torch.from_numpy(np.ascontiguousarray(values).view(f"<i{layout.itemsize}"))
            whole[row, :length].view(BITS[dtype]).copy_(signed)
        return whole.to(self._device)
