"""Reads a capture a layer at a time: each layer is loaded once and runs over every batch before the next one is.

A layer runs inside of the base model's own forward, with stand-ins for the others, on the hidden states that the layer before
has left on disk. Batches of a layer are journaled when the layer is done, or after JOURNAL_SECONDS; what was journaled is not
computed again. At the end the capture is what the whole pass makes, byte for byte.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from outliers.capture.by_layers.checkpoint import open_checkpoint
from outliers.capture.by_layers.experts import LayerExperts
from outliers.capture.by_layers.finish import finish
from outliers.capture.by_layers.record import LayerRecord, Plan
from outliers.capture.by_layers.spool import Spool
from outliers.capture.by_layers.standins import StandIns
from outliers.capture.by_layers.weights import LayeredModel
from outliers.capture.forward import Batch, HookedPass, Progress
from outliers.capture.library_errors import explained
from outliers.capture.load import PLAIN
from outliers.capture.perplexity import Head, losses
from outliers.capture.staging import StagingBuffer
from outliers.capture.work import MEMORY, Amount, Clock, Work
from outliers.store.durable import Unsynced

log = logging.getLogger(__name__)

JOURNAL_SECONDS = 60.0
"""A layer that takes longer is journaled in between: what a kill loses. A line a batch cost 10% of a capture of small batches,
one wait a layer 4%, in a prototype."""

Step = Callable[[str], None]
"""Called with the name of each step that was just done; an error that it raises ends the run there."""


def nothing(_: str) -> None:
    """The Step that does nothing."""


class _LayerBatch(Batch):
    """A batch in one layer: it is journaled with the layer."""

    def finish(self) -> None:
        pass


class _Unit(NamedTuple):
    """A batch that has run in a layer. line: what is known of it without its chunks."""

    number: int
    batch: Batch
    read: bool
    line: dict[str, Any]


@dataclass(frozen=True)
class LayeredSession:
    """The model is loaded a layer at a time. batches: each with whether its activations are read, or its perplexity alone."""

    work: Work
    batches: list[tuple[range, bool]]

    def run(self, asked: range, step: Step = nothing) -> dict[str, Any]:
        """Run every batch through every layer, and return what `extract` returns.

        asked: the sequences of the call. Raises PlanRefused where the layers of the model can't run one by one, and what a
        whole pass raises.
        """
        began = time.monotonic()
        record = LayerRecord.begin(self.work.files.root.parent, self._plan(asked))
        if record.done:
            log.info("going on by layers after %d of %d steps", record.done, record.plan.units)
        info, keep = self.work.prepared.model, not self.work.prepared.spec.compute.no_keep_weights
        head = record.plan.perplexity
        checkpoint = open_checkpoint(info, self.work.workspace, self.work.on_download(), keep=keep, head=head)
        fetched = time.monotonic()
        left = [layer for layer in range(record.plan.layers) if record.left(layer)]
        model = LayeredModel(info, self.work.workspace, checkpoint, self.work.devices.first, head=head, layers=left)
        loaded = time.monotonic()
        log.info(
            "loaded what is outside of the layers of %s on %s in %.1f s",
            *(info.source.name, self.work.devices.kind, loaded - fetched),
        )
        with self.work.staging(self.todo) as staging:
            _Layers(self.work, self.todo, record, model, staging, step).run()
        step("all layers are journaled")
        complete = LayerRecord.complete(self.work.files.root.parent, asked)
        if complete is None:
            raise RuntimeError("every layer has run, and lines of some are missing")
        finish(complete, self.work.journal, self.work.files, self.work.corpus, self.work.experts, step)
        return self.work.result(self._amount(), Clock(began, fetched, loaded, time.monotonic()), staging)

    @property
    def todo(self) -> int:
        """Sequences to read."""
        return sum(len(run) for run, _ in self.batches)

    def _amount(self) -> Amount:
        written = sum(self.work.journal.done[s]["bytes"] for run, read in self.batches if read for s in run)
        return Amount(self.todo, sum(self.work.tokens(run) for run, _ in self.batches), written)

    def _plan(self, asked: range) -> Plan:
        perplexity = self.work.prepared.spec.capture.perplexity
        # the layers above the last captured one are needed for the head alone
        layers = self.work.prepared.model.num_layers if perplexity else self.work.layout.layers[-1] + 1
        held = () if self.work.experts is None else tuple(self.work.experts.sums.sequences.tolist())
        return Plan(asked, tuple(self.batches), layers, held, perplexity)


class _Layers:
    """The layers of one capture, in order. todo: sequences to read."""

    def __init__(
        self, work: Work, todo: int, record: LayerRecord, model: LayeredModel, staging: StagingBuffer, step: Step
    ) -> None:
        self.work, self.todo, self.record, self.model, self.staging, self.step = (
            work,
            todo,
            record,
            model,
            staging,
            step,
        )
        self.plan, anatomy = record.plan, work.prepared.model.anatomy
        self.base = model.model.get_submodule(anatomy.backbone)
        self.modules = anatomy.modules(tuple(work.layout.stored), work.layout.layers)
        self.spool = Spool(record.folder)
        self.head = Head(model.model) if self.plan.perplexity else None
        self.experts = work.prepared.model.experts if work.watch() else None
        layers = self.base.get_submodule(anatomy.layers)
        self.standins = StandIns(layers.children(), work.prepared.model.source.name)
        self.standins.width = record.width

    def run(self) -> None:
        """Every layer that has batches left."""
        progress = self.work.progress(self.todo)
        progress.done = self.todo * self.record.done / self.plan.units
        for layer in range(self.plan.layers):
            if numbers := self.record.left(layer):
                self.model.load(layer)
                self.step(f"layer {layer} is loaded")
                with self._prepared(layer + 1):
                    _Layer(self, layer, numbers, progress).run()
                self.model.unload(layer)
            self.spool.drop(layer)
            self.step(f"layer {layer} is done")
        self.standins.detach()
        progress.done = self.todo
        progress.finished(0)

    @contextmanager
    def _prepared(self, layer: int) -> Iterator[None]:
        """Bring a layer's weights to this machine and into its cache of files while the block runs, if it is to run.

        From a file that was in no cache, six reads of 120 MB during products of matrices took 5.1 s instead of 9.6, once, on two
        cores that others used too.
        """
        if layer >= self.plan.layers or not self.record.left(layer):
            yield
            return
        failed: list[Exception] = []

        def prepare() -> None:
            try:
                self.model.prepare(layer)
            except Exception as error:  # noqa: BLE001 - raised in the model's thread
                failed.append(error)

        thread = threading.Thread(target=prepare, name="next-layer", daemon=True)
        thread.start()
        yield
        thread.join()
        if failed:
            raise failed[0]


class _Layer:
    """One layer over all batches that it has not run on."""

    def __init__(self, layers: _Layers, layer: int, numbers: list[int], progress: Progress) -> None:
        self.of, self.work, self.layer, self.numbers = layers, layers.work, layer, numbers
        self.last = layer == self.work.prepared.model.num_layers - 1
        self.modules = [module for module in layers.modules if module.layer == layer]
        self.progress = progress
        self.hooked = HookedPass(layers.base, self.modules, layers.staging, self.work.layout, self._on_site)
        self.experts = self._watched()
        self.unsynced = Unsynced(self.work.files.root)
        self.units: list[_Unit] = []
        self.journaled = time.monotonic()

    def run(self) -> None:
        try:
            for number in self.numbers:
                self._run(number)
                if time.monotonic() - self.journaled >= JOURNAL_SECONDS:
                    self._journal()
            self._journal()
        finally:
            self.hooked.detach()
            if self.experts is not None:
                self.experts.detach()

    def _run(self, number: int) -> None:
        """One batch through the layer. Raises MemoryFull, SiteError, PlanRefused, and the error of a writer."""
        run, read = self.of.plan.batches[number]
        lengths, standins, experts = self.work.lengths(run), self.of.standins, self.experts if read else None
        expected = len(self.modules) * len(run)
        batch = _LayerBatch(run, lengths, expected, self.work.journal, self.work.files, _unsynced=self.unsynced)
        line: dict[str, Any] = {}
        what = (
            f"layer {self.layer} of {self.work.prepared.model.source.name} over {len(run)} x {batch.positions} tokens"
        )
        with explained(what, MEMORY, PLAIN):
            ids = self.work.ids(run, batch.positions)
            if experts is not None:
                experts.begin(batch)
            standins.begin(
                self.layer, self._given(number), lambda hidden: line.update(hidden=self._keep(number, hidden))
            )
            hidden = self.hooked.forward(batch, ids, read=read)
            standins.finish()
            line["width"] = standins.width
            if experts is not None:
                line["table"] = experts.finish()
            if self.of.head is not None and self.last:
                line["losses"] = losses(self.of.head, hidden, ids, lengths)
        self.units.append(_Unit(number, batch, read, line))
        self.progress.finished(len(run) / self.of.plan.layers)
        self.of.step(f"batch {number} has run in layer {self.layer}")

    def _given(self, number: int) -> torch.Tensor | None:
        """What the layer gets: None for what the base itself gives to layer 0."""
        if self.layer == 0:
            return None
        described = self.of.record.line(self.layer - 1, number)["hidden"]
        return self.of.spool.read(self.layer, number, described, self.work.devices.first)

    def _keep(self, number: int, hidden: torch.Tensor) -> dict[str, Any] | None:
        """Spool what the next layer gets, if it runs."""
        if self.layer + 1 == self.of.plan.layers:
            return None
        return self.of.spool.write(self.layer + 1, number, hidden, self.unsynced)

    def _journal(self) -> None:
        """Make durable what the batches since the last time have written, and append their lines."""
        self.of.staging.flush()
        if self.experts is not None:
            self.experts.save()
        self.unsynced.sync()
        self.of.step(f"layer {self.layer} is on the disk")
        self.of.record.append(self.layer, [(unit.number, self._line(unit)) for unit in self.units])
        self.of.step(f"layer {self.layer} is journaled")
        self.units, self.unsynced, self.journaled = [], Unsynced(self.work.files.root), time.monotonic()

    def _line(self, unit: _Unit) -> dict[str, Any]:
        index = self.work.layout.layers.index(self.layer) if self.modules else 0
        sites = self.work.layout.stored if unit.read and self.modules else ()
        written = {site: [unit.batch.written[site, index, s] for s in unit.batch.sequences] for site in sites}
        return unit.line | {
            "crc32": {site: [[crc for crc, _ in chunks] for chunks in rows] for site, rows in written.items()},
            "sizes": {site: [[size for _, size in chunks] for chunks in rows] for site, rows in written.items()},
        }

    def _watched(self) -> LayerExperts | None:
        shapes, own = self.work.layout.experts, self.work.experts
        if self.of.experts is None or shapes is None or self.layer not in shapes.layers:
            return None
        return LayerExperts(
            self.of.base, self.of.experts, self.layer, self.work.layout, self.of.record.folder, self.of.plan, own
        )

    def _on_site(self, sequences: float) -> None:
        self.progress.during(sequences / self.of.plan.layers)
