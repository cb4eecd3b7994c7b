"""A model that is loaded for a capture: runs batches through it, and what its hooks see goes to the disk.

Knows the modules of the sites and the staging buffer; `extract` says which batches, and when.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.capture.devices import Devices
from outliers.capture.experts import ExpertPass, ExpertSumsFile
from outliers.capture.forward import Batch, HookedPass, Progress, Sink
from outliers.capture.library_errors import explained
from outliers.capture.load import PLAIN, fetch_weights, load_model
from outliers.capture.perplexity import Head, losses
from outliers.capture.staging import StagingBuffer
from outliers.corpus.tokens import Corpus
from outliers.events.stream import Reporter
from outliers.store.chunks import ChunkFiles, Journal
from outliers.study.layout import STORAGE
from outliers.study.prepare import Prepared
from outliers.study.ring_size import ring_slots, writers_bytes
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

_MEMORY = "give fewer --batch-sequences, a shorter --sequence-length, or a machine with more memory (--min-vram, --min-cpu-ram)"


@dataclass
class _Read:
    """What a session has read so far."""

    sequences: int = 0
    tokens: int = 0
    bytes: int = 0
    open: list[int] = field(default_factory=list)
    """Sequences whose bytes are not added yet."""


@dataclass(frozen=True)
class Capturing:
    """What a capture needs beside a model. asked: sequences that the call is for, those included that are done; todo: those to
    read. experts: the sums of the model's experts, None where these are not read."""

    prepared: Prepared
    workspace: Workspace
    corpus: Corpus
    files: ChunkFiles
    journal: Journal
    devices: Devices
    reporter: Reporter
    asked: int
    todo: int
    experts: ExpertSumsFile | None


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

    def __init__(self, capturing: Capturing) -> None:
        self.of = capturing
        self._read = _Read()
        self._began = time.monotonic()
        info, report = capturing.prepared.model, capturing.reporter.progress
        fetch_weights(info, capturing.workspace, lambda done, total: report("download", done, total, "bytes"))
        self._fetched = time.monotonic()
        perplexity = capturing.prepared.spec.capture.perplexity
        model = load_model(info, capturing.workspace, capturing.devices.map(info), head=perplexity)
        self._loaded = self._ended = time.monotonic()
        placement, seconds = capturing.devices.placement, self._loaded - self._fetched
        placed = f"; {placement.sentence}" if placement else ""
        log.info("loaded %s on %s in %.1f s%s", info.source.name, capturing.devices.kind, seconds, placed)
        layout = capturing.files.layout
        slot = (
            capturing.prepared.spec.capture.batch_sequences
            * layout.positions
            * max(layout.widths.values())
            * layout.itemsize
        )
        self.staging = StagingBuffer(slot, ring_slots(slot), write_parts, pinned=placement is not None)
        tokens = tokens_of(capturing.asked, capturing.prepared, layout.num_sequences)
        self._progress = Progress(capturing.reporter, capturing.todo, capturing.asked, tokens)
        self._modules = info.anatomy.modules(tuple(layout.stored), layout.layers)
        self._head = Head(model) if perplexity else None
        base = model.get_submodule(info.anatomy.backbone)
        self._hooked = HookedPass(base, self._modules, self.staging, layout, self._progress.during)
        self._experts = self._watched(base)

    def __enter__(self) -> Session:
        layout, staging = self.of.files.layout, self.staging
        more = writers_bytes(layout.largest_chunk_bytes, staging.writers, packed=layout.codec != "none")
        log.info(
            "one pass over %d sequences; in addition to the model at most %.0f MB of memory: a staging buffer of %.0f MB and "
            "%d writers",
            *(self.of.todo, (staging.total_bytes + more) / 1e6, staging.total_bytes / 1e6, staging.writers),
        )
        staging.__enter__()
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
            self._read.tokens += int(self.of.corpus.lengths[run.start : run.stop].sum())
            self._read.open += list(run) if read else []
            self._progress.finished(len(run))

    def pass_to(self, sink: Sink, run: range, *, store: bool) -> list[tuple[float, int]] | None:
        """Run one batch whose tensors go to a sink, and with `store` to the disk too.

        Returns the loss of each sequence and the number of its tokens that it is over, None where perplexity is not measured.
        """
        found = self._forward(run, read=True, sink=_Both(self.staging, sink) if store else sink, store=store)
        self._read.sequences += len(run)
        self._read.tokens += int(self.of.corpus.lengths[run.start : run.stop].sum())
        self._read.open += list(run) if store else []
        self._progress.finished(len(run))
        return found

    def flush(self) -> None:
        """Return when all that was read is on the disk and in the journal."""
        self.staging.drain()
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
        corpus, info = self.of.corpus, self.of.prepared.model
        watched = self._experts if read and store else None
        lengths = tuple(int(length) for length in corpus.lengths[run.start : run.stop])
        expected = len(self._modules) * len(run) * read + (self._head is not None) + (watched is not None)
        batch = Batch(run, lengths, expected, self.of.journal, self.of.files)
        rows = corpus.token_ids[run.start : run.stop, : batch.positions].astype(np.int64)  # (sequence, position)
        self._hooked.staging = self.staging if sink is None else sink
        what = f"the forward pass of {info.source.name} over {len(run)} x {batch.positions} tokens"
        with explained(what, _MEMORY, PLAIN):
            ids = torch.from_numpy(rows).to(self.of.devices.first)
            if watched is not None:
                watched.begin(batch)
            hidden = self._hooked.forward(batch, ids, read=read)
            if watched is not None:
                watched.finish()
            found = losses(self._head, hidden, ids, lengths) if self._head is not None else None
        if found is not None and store:
            _measure(batch, found, read=read)
        return found

    def _watched(self, base: torch.nn.Module) -> ExpertPass | None:
        """What watches the model's experts; None where these are not read."""
        info, shapes = self.of.prepared.model.experts, self.of.files.layout.experts
        if info is None or shapes is None:
            return None
        if shapes.values:
            log.info(
                "every expert of %d layers is read: %.0f MB of memory for their sums",
                *(len(shapes.layers), shapes.sums_bytes / 1e6),
            )
        return ExpertPass(base, info, self.of.files.layout, self.of.experts)

    def result(self) -> dict[str, Any]:
        """What was read, in how long, on which device; after the block."""
        seconds, placement, read = self._ended - self._loaded, self.of.devices.placement, self._read
        rate = read.tokens / seconds
        log.info("read %d tokens in %.1f s (%.0f a second), %.1f MB", read.tokens, seconds, rate, read.bytes / 1e6)
        return {
            "sequences": read.sequences,
            "of_sequences": self.of.files.layout.num_sequences,
            "tokens": read.tokens,
            "bytes": read.bytes,
            "download_seconds": round(self._fetched - self._began, 3),
            "load_seconds": round(self._loaded - self._fetched, 3),
            "seconds": round(self._ended - self._began, 3),
            "tokens_per_second": round(rate, 1),
            "device": self.of.devices.kind,
            "gpus": len(placement.gpus) if placement else 0,
            "threads": torch.get_num_threads(),
            "ring_bytes": self.staging.total_bytes,
            "ring_waited_seconds": round(self.staging.waited_seconds, 3),
            "process": os.getpid(),
        }


def tokens_of(sequences: int, prepared: Prepared, of: int) -> int:
    """Tokens of that number of sequences, of `of`, for a progress report: each sequence counts as an average one."""
    return prepared.corpus.num_tokens * sequences // of


def _measure(batch: Batch, found: list[tuple[float, int]], *, read: bool) -> None:
    """Add the losses of a batch to its journal lines; if only the losses were missing, append the lines again with them."""
    lines = {s: {"nll": nll, "nll_tokens": count} for s, (nll, count) in zip(batch.sequences, found, strict=True)}
    if not read:
        batch.journal.append([batch.journal.done[sequence] | line for sequence, line in lines.items()])
    elif batch.add_losses(lines):
        batch.finish()


def write_parts(key: tuple[Batch, str, int], values: NDArray[Any]) -> None:
    """Write each sequence of a tensor, without padding; the threads of the staging buffer call it.

    key: the batch, the site, and the index of the layer among the captured layers. values: (sequence, position, feature).
    """
    batch, site, layer = key
    stored = STORAGE[batch.files.layout.dtype]
    for row, sequence in enumerate(batch.sequences):
        tokens = values[row, : batch.lengths[row]].view(stored)  # (position, feature)
        chunks = batch.files.write(site, layer, sequence, tokens, batch.unsynced())
        if batch.add(site, layer, sequence, chunks):
            batch.finish()
