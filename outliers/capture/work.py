"""What one call of `extract` works on, in whichever order layers and batches are read.

`session` reads the model whole, `by_layers` a layer at a time; both take ids, staging buffer and result from here. Knows the
disk and the corpus, nothing of loading a model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.capture.devices import Devices
from outliers.capture.experts import ExpertSumsFile
from outliers.capture.forward import Batch, Progress
from outliers.capture.staging import StagingBuffer
from outliers.corpus.tokens import Corpus
from outliers.events.stream import Reporter
from outliers.store.chunks import ChunkFiles, Journal
from outliers.study.layout import STORAGE, Layout
from outliers.study.prepare import Prepared
from outliers.study.ring_size import ring_slots, writers_bytes
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

MEMORY = "give fewer --batch-sequences, a shorter --sequence-length, or a machine with more memory (--min-vram, --min-cpu-ram)"
"""The remedy where a pass has no memory left."""


class Clock(NamedTuple):
    """Seconds of a monotonic clock: at the beginning, once the weights are here, once they are loaded, at the end."""

    began: float
    fetched: float
    loaded: float
    ended: float


class Amount(NamedTuple):
    """How much a call has read, and the bytes of it that it has written."""

    sequences: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """asked: sequences that the call is for, those included that are done. experts: the sums of the model's experts, None where
    these are not read."""

    prepared: Prepared
    workspace: Workspace
    corpus: Corpus
    files: ChunkFiles
    journal: Journal
    asked: int
    devices: Devices
    reporter: Reporter
    experts: ExpertSumsFile | None

    @property
    def layout(self) -> Layout:
        return self.files.layout

    def lengths(self, run: range) -> tuple[int, ...]:
        """Tokens of each sequence of a batch that are not padding."""
        return tuple(int(length) for length in self.corpus.lengths[run.start : run.stop])

    def ids(self, run: range, positions: int) -> torch.Tensor:
        """(sequence, position) int64 token ids of a batch, on the device of the embedding."""
        rows = self.corpus.ids[run.start : run.stop][:, :positions].astype(np.int64)
        return torch.from_numpy(rows).to(self.devices.first)

    def staging(self, todo: int) -> StagingBuffer:
        """The buffer between the passes over `todo` sequences and the disk, to be entered."""
        layout, spec = self.layout, self.prepared.spec
        slot = spec.capture.batch_sequences * layout.positions * max(layout.widths.values()) * layout.itemsize
        pinned = self.devices.placement is not None
        staging = StagingBuffer(slot, ring_slots(slot), write_parts, pinned=pinned)
        more = writers_bytes(layout.largest_chunk_bytes, staging.writers, packed=layout.codec != "none")
        log.info(
            "one pass over %d sequences; in addition to the model at most %.0f MB of memory: a staging buffer of %.0f MB and "
            "%d writers",
            *(todo, (staging.total_bytes + more) / 1e6, staging.total_bytes / 1e6, staging.writers),
        )
        return staging

    def progress(self, todo: int) -> Progress:
        """What reports the tokens that were read of `todo` sequences."""
        return Progress(self.reporter, todo, self.asked, tokens_of(self.asked, self.prepared, self.layout))

    def on_download(self) -> Callable[[int, int], None]:
        """What reports a download: called with the bytes that are here, and all."""
        return lambda done, total: self.reporter.progress("download", done, total, "bytes")

    def watch(self) -> bool:
        """Whether the model's experts are read; says what that takes."""
        shapes = self.layout.experts
        if self.prepared.model.experts is None or shapes is None:
            return False
        if shapes.values:
            log.info(
                "every expert of %d layers is read: %.0f MB of memory for their sums",
                *(len(shapes.layers), shapes.sums_bytes / 1e6),
            )
        return True

    def tokens(self, run: range) -> int:
        """Tokens of a batch that are not padding."""
        return int(self.corpus.lengths[run.start : run.stop].sum())

    def result(self, read: Amount, clock: Clock, staging: StagingBuffer) -> dict[str, Any]:
        """What `extract` returns."""
        placement, seconds = self.devices.placement, clock.ended - clock.loaded
        rate = read.tokens / seconds
        log.info("read %d tokens in %.1f s (%.0f a second), %.1f MB", read.tokens, seconds, rate, read.bytes / 1e6)
        return {
            "sequences": read.sequences,
            "of_sequences": self.layout.num_sequences,
            "tokens": read.tokens,
            "bytes": read.bytes,
            "download_seconds": round(clock.fetched - clock.began, 3),
            "load_seconds": round(clock.loaded - clock.fetched, 3),
            "seconds": round(clock.ended - clock.began, 3),
            "tokens_per_second": round(rate, 1),
            "device": self.devices.kind,
            "gpus": len(placement.gpus) if placement else 0,
            "threads": torch.get_num_threads(),
            "ring_bytes": staging.total_bytes,
            "ring_waited_seconds": round(staging.waited_seconds, 3),
            "process": os.getpid(),
        }


def tokens_of(sequences: int, prepared: Prepared, layout: Layout) -> int:
    """Tokens of that number of sequences, for a progress report: each sequence counts as an average one."""
    return prepared.corpus.num_tokens * sequences // layout.num_sequences


def measure(batch: Batch, found: list[tuple[float, int]], *, read: bool) -> None:
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
