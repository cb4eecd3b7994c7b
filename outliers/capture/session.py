"""A model that is loaded for a capture: runs batches through it, and what its hooks see goes to the disk.

Knows the modules of the sites and the staging buffer; `extract` says which batches, and when.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from outliers.capture.experts import ExpertPass
from outliers.capture.forward import Batch, HookedPass, Sink
from outliers.capture.library_errors import explained
from outliers.capture.load import PLAIN, fetch_weights, load_model
from outliers.capture.perplexity import Head, losses
from outliers.capture.work import MEMORY, Amount, Clock, Work, measure

log = logging.getLogger(__name__)


@dataclass
class _Read:
    """What a session has read so far."""

    sequences: int = 0
    tokens: int = 0
    bytes: int = 0
    open: list[int] = field(default_factory=list)
    """Sequences whose bytes are not added yet."""


@dataclass(frozen=True)
class _Both:
    """Hands each tensor to two sinks."""

    one: Sink
    other: Sink

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        self.one.submit(key, tensor)
        self.other.submit(key, tensor)


class Session:
    """The model of a capture with its hooks, from `with` on; the end of the block writes all that was read.

    Raises MemoryFull, SiteError, and the error of a writer.
    """

    def __init__(self, work: Work, todo: int) -> None:
        """todo: sequences to read."""
        self.of = work
        self._read = _Read()
        self._began = time.monotonic()
        info = work.prepared.model
        fetch_weights(info, work.workspace, work.on_download())
        self._fetched = time.monotonic()
        perplexity = work.prepared.spec.capture.perplexity
        model = load_model(info, work.workspace, work.devices.map(info), head=perplexity)
        self._loaded = self._ended = time.monotonic()
        placement, seconds = work.devices.placement, self._loaded - self._fetched
        placed = f"; {placement.sentence}" if placement else ""
        log.info("loaded %s on %s in %.1f s%s", info.source.name, work.devices.kind, seconds, placed)
        self.staging = work.staging(todo)
        self._progress = work.progress(todo)
        self._modules = info.anatomy.modules(tuple(work.layout.stored), work.layout.layers)
        self._head = Head(model) if perplexity else None
        base = model.get_submodule(info.anatomy.backbone)
        self._hooked = HookedPass(base, self._modules, self.staging, work.layout, self._progress.during)
        watched = info.experts if work.watch() else None
        self._experts = None if watched is None else ExpertPass(base, watched, work.layout, work.experts)

    def __enter__(self) -> Session:
        self.staging.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.staging.__exit__(kind, error, at)
        if error is None:
            self._settle()
        self._ended = time.monotonic()

    def read(self, batches: Iterable[tuple[range, bool]]) -> None:
        """Run batches, each with whether to read its activations: otherwise its perplexity alone is measured."""
        for run, read in batches:
            self._forward(run, read=read)
            self._read.sequences += len(run)
            self._read.tokens += self.of.tokens(run)
            self._read.open += list(run) if read else []
            self._progress.finished(len(run))

    def pass_to(self, sink: Sink, run: range, *, store: bool) -> list[tuple[float, int]] | None:
        """Run one batch whose tensors go to a sink, and with `store` to the disk too.

        Returns the loss of each sequence and the number of its tokens that it is over, None where perplexity is not measured.
        """
        found = self._forward(run, read=True, sink=_Both(self.staging, sink) if store else sink, store=store)
        self._read.sequences += len(run)
        self._read.tokens += self.of.tokens(run)
        self._read.open += list(run) if store else []
        self._progress.finished(len(run))
        return found

    def flush(self) -> None:
        """Return when all that was read is on the disk and in the journal."""
        self.staging.flush()
        self._settle()

    def _settle(self) -> None:
        """Save the experts' sums, and add up the bytes of what is journaled."""
        if self.of.experts is not None:
            self.of.experts.save()
        self._read.bytes += sum(self.of.journal.done[sequence]["bytes"] for sequence in self._read.open)
        self._read.open = []

    def _forward(
        self, run: range, *, read: bool, sink: Sink | None = None, store: bool = True
    ) -> list[tuple[float, int]] | None:
        info = self.of.prepared.model
        watched = self._experts if read and store else None
        lengths = self.of.lengths(run)
        expected = len(self._modules) * len(run) * read + (self._head is not None) + (watched is not None)
        batch = Batch(run, lengths, expected, self.of.journal, self.of.files)
        self._hooked.staging = self.staging if sink is None else sink
        what = f"the forward pass of {info.source.name} over {len(run)} x {batch.positions} tokens"
        with explained(what, MEMORY, PLAIN):
            ids = self.of.ids(run, batch.positions)
            if watched is not None:
                watched.begin(batch)
            hidden = self._hooked.forward(batch, ids, read=read)
            if watched is not None:
                watched.finish()
            found = losses(self._head, hidden, ids, lengths) if self._head is not None else None
        if found is not None and store:
            measure(batch, found, read=read)
        return found

    def result(self) -> dict[str, Any]:
        """What was read, in how long, on which device; after the block."""
        read = Amount(self._read.sequences, self._read.tokens, self._read.bytes)
        return self.of.result(read, Clock(self._began, self._fetched, self._loaded, self._ended), self.staging)
