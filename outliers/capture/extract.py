"""Makes a capture: one forward pass for each batch, with hooks on every site of every layer; values go to chunks on disk.

Runs on the machine with the model. An interrupted capture continues from its journal, in whole batches, and ends bit for bit
as if it had not been interrupted; under other conditions it is refused. Knows the modules of the sites and the disk (`store`),
nothing of counting.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.capture.devices import Devices, choose_devices, instructions
from outliers.capture.experts import ExpertPass, ExpertSumsFile
from outliers.capture.forward import Batch, HookedPass, Progress
from outliers.capture.libraries import LOOKED_FOR, libraries
from outliers.capture.library_errors import explained
from outliers.capture.load import PLAIN, fetch_weights, load_model
from outliers.capture.perplexity import Head, losses
from outliers.capture.processes import await_earlier
from outliers.capture.staging import StagingBuffer
from outliers.capture.together import Together, processes_of
from outliers.corpus.tokens import Corpus, load_corpus
from outliers.errors import CaptureMismatch, CorruptCapture
from outliers.events.stream import Reporter
from outliers.spec import FORMAT_VERSION
from outliers.store.chunks import ARRAYS, ChunkFiles, Journal, NamedChunk, create_arrays, hold, mend_arrays
from outliers.store.durable import drop_leftovers
from outliers.store.fingerprint import difference, layout_from, read_fingerprint, shapes_of, write_fingerprint
from outliers.study.expert_shapes import SUMS
from outliers.study.layout import STORAGE, Layout
from outliers.study.prepare import Prepared, layout_of
from outliers.study.ring_size import ring_slots, writers_bytes
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

_MEMORY = "give fewer --batch-sequences, a shorter --sequence-length, or a machine with more memory (--min-vram, --min-cpu-ram)"


def extract(
    prepared: Prepared, workspace: Workspace, reporter: Reporter, *, sequences: range | None = None
) -> dict[str, Any]:
    """Make or finish the capture of a study, or of some sequences (whole batches) of it.

    Returns what this call did (sequences, tokens, seconds, bytes, device).

    Raises Busy if another process writes the capture, CaptureMismatch, CorruptCapture, SiteError, UnknownModel, PlanRefused
    and MemoryFull if the model does not fit the GPUs of this machine, HubUnavailable.
    """
    folder = workspace.capture(prepared.capture_id)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        await_earlier(folder)
        corpus = load_corpus(prepared.corpus, workspace)
        devices = choose_devices(prepared.spec, prepared.model, several=True)
        layout = _begin(prepared, corpus, folder, devices)
        journal = Journal.open(folder / "journal.jsonl", repair=True)
        drop_leftovers(folder, ARRAYS)
        files = ChunkFiles(folder, layout)
        size = prepared.spec.capture.batch_sequences
        chosen = sequences if sequences is not None else range(layout.num_sequences)
        wanted = _runs(chosen, size)
        if layout.experts is None and prepared.model.anatomy.moe_layers and prepared.model.experts is None:
            log.warning("the experts of %s are not read: `outliers plan` says why", prepared.model.source.name)
        has_values = layout.experts is not None and layout.experts.values
        experts = ExpertSumsFile(folder, layout.experts, chosen) if layout.experts is not None and has_values else None
        batches = _todo(wanted, journal, files, experts, prepared.spec.capture.perplexity)
        asked = sum(map(len, wanted))
        if not batches:
            log.info("the capture %s is complete: nothing to extract", prepared.capture_id)
            tokens = _tokens_of(asked, prepared, layout)
            reporter.progress("extract", tokens, tokens, "tokens")
            return {"sequences": 0, "of_sequences": layout.num_sequences, "seconds": 0.0}
        # a batch is computed whole: its finished sequences are written again, and are not done until then
        again = [s for run, read in batches if read for s in run if s in journal.done]
        if again:
            journal.redo(again)
        if journal.done:
            log.info("going on after %d of %d sequences", len(journal.done), layout.num_sequences)
        session = Session(prepared, workspace, corpus, files, journal, batches, asked, devices, reporter, experts)
        processes = processes_of(prepared, devices)
        result = session.run() if processes == 1 else session.run_together(chosen, min(processes, len(batches)))
        with (folder / "extractions.jsonl").open("a") as record:
            record.write(json.dumps(result) + "\n")
        return result


def _begin(prepared: Prepared, corpus: Corpus, folder: Path, devices: Devices) -> Layout:
    """Check the fingerprint of an existing capture, or begin a new one. An existing capture keeps its codec."""
    layout = layout_of(prepared.spec, prepared.model)
    fixed = conditions(prepared, devices)
    found = read_fingerprint(folder)
    if found is None:
        _clear(folder)
        create_arrays(folder, layout, corpus.token_ids, corpus.lengths)
        free = {
            "threads": torch.get_num_threads(),
            "batch_sequences": prepared.spec.capture.batch_sequences,
            "sequence_texts": list(corpus.sequence_texts),
            "looked_for": list(LOOKED_FOR),
        }
        write_fingerprint(folder, {"fixed": fixed, "layout": shapes_of(layout), **free})
        return layout
    if differs := difference(found, fixed):
        raise CaptureMismatch(
            f"the capture {prepared.capture_id} was begun {differs}: go on under the old one, or remove it with "
            f"`outliers captures rm {prepared.capture_id}`"
        )
    # another number of threads sums in another order: the rest is computed with the first number
    torch.set_num_threads(found["threads"])
    layout = layout_from(found)
    for name in mend_arrays(folder, layout, corpus.token_ids, corpus.lengths):
        log.warning("activations.zarr/%s was missing or changed: written again", name)
    return layout


def _clear(folder: Path) -> None:
    """Remove arrays and sums without a fingerprint. Raises CorruptCapture if the journal has lines."""
    journal, arrays = folder / "journal.jsonl", folder / "activations.zarr"
    if journal.exists() and journal.stat().st_size:
        raise CorruptCapture(
            f"{folder / 'capture.json'} is gone, and the journal has {journal.stat().st_size} bytes: put it back, or "
            f"`outliers captures rm {folder.name}` and extract again"
        )
    for place in (arrays, folder / SUMS):
        if place.is_dir():
            shutil.rmtree(place)


def conditions(prepared: Prepared, devices: Devices) -> dict[str, Any]:
    """The conditions that stay the same from the first batch of a capture to the last."""
    return {
        "format": FORMAT_VERSION,
        "capture_id": prepared.capture_id,
        "model": prepared.model.source.id,
        "revision": prepared.model.source.revision,
        "dtype": prepared.model.dtype,
        "token_sha256": prepared.corpus.token_sha256,
        "lengths_sha256": prepared.corpus.lengths_sha256,
        "device": devices.kind,
        "instructions": instructions() if devices.placement is None else None,
        **{name: metadata.version(name) for name in ("torch", "transformers", "numpy", "zarr")},
        **libraries(gpu=devices.placement is not None),
    }


def _runs(sequences: range, batch: int) -> list[range]:
    """The fixed, aligned batches of a capture."""
    return [range(start, min(start + batch, sequences.stop)) for start in range(sequences.start, sequences.stop, batch)]


def _tokens_of(sequences: int, prepared: Prepared, layout: Layout) -> int:
    """Tokens of that number of sequences, for a progress report: each sequence counts as an average one."""
    return prepared.corpus.num_tokens * sequences // layout.num_sequences


def _present(entry: dict[str, Any] | None, files: ChunkFiles) -> bool:
    return entry is not None and all(_whole(chunk) for chunk in files.named_by(entry))


def _whole(chunk: NamedChunk) -> bool:
    try:
        found = chunk.path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == chunk.size


def _todo(
    wanted: list[range], journal: Journal, files: ChunkFiles, experts: ExpertSumsFile | None, perplexity: bool
) -> list[tuple[range, bool]]:
    """Batches to run, each with whether to read its activations: a finished batch may lack only the perplexity.

    A batch is read if a sequence of it is not journaled or is not in the sums of the experts, or if one of its chunks is
    missing or has another size.
    """

    def whole(sequence: int) -> bool:
        return _present(journal.done.get(sequence), files) and (experts is None or experts.holds(sequence))

    runs = [(run, not all(map(whole, run))) for run in wanted]
    return [
        (run, read)
        for run, read in runs
        if read or (perplexity and any("nll" not in journal.done[sequence] for sequence in run))
    ]


@dataclass(frozen=True)
class Session:
    """One call of `extract` that has something to do.

    batches: as `_todo` gives them. asked: sequences that the call is for, those included that are done. experts: the sums of
    the model's experts, None where these are not read.
    """

    prepared: Prepared
    workspace: Workspace
    corpus: Corpus
    files: ChunkFiles
    journal: Journal
    batches: list[tuple[range, bool]]
    asked: int
    devices: Devices
    reporter: Reporter
    experts: ExpertSumsFile | None

    def run(self) -> dict[str, Any]:
        """Load the model, run the batches, and return what `extract` returns."""
        began = time.monotonic()
        info, report = self.prepared.model, self.reporter.progress
        fetch_weights(info, self.workspace, lambda done, total: report("download", done, total, "bytes"))
        fetched = time.monotonic()
        perplexity = self.prepared.spec.capture.perplexity
        model = load_model(info, self.workspace, self.devices.map(info), head=perplexity)
        loaded = time.monotonic()
        placement = self.devices.placement
        placed = f"; {placement.sentence}" if placement else ""
        log.info("loaded %s on %s in %.1f s%s", info.source.name, self.devices.kind, loaded - fetched, placed)
        staging = self._pass(model)
        ended = time.monotonic()
        tokens = sum(int(self.corpus.lengths[run.start : run.stop].sum()) for run, _ in self.batches)
        written = sum(self.journal.done[s]["bytes"] for run, read in self.batches if read for s in run)
        rate = tokens / (ended - loaded)
        log.info("read %d tokens in %.1f s (%.0f a second), %.1f MB", tokens, ended - loaded, rate, written / 1e6)
        return {
            "sequences": self._todo,
            "of_sequences": self.files.layout.num_sequences,
            "tokens": tokens,
            "bytes": written,
            "download_seconds": round(fetched - began, 3),
            "load_seconds": round(loaded - fetched, 3),
            "seconds": round(ended - began, 3),
            "tokens_per_second": round(rate, 1),
            "device": self.devices.kind,
            "gpus": len(placement.gpus) if placement else 0,
            "threads": torch.get_num_threads(),
            "ring_bytes": staging.total_bytes,
            "ring_waited_seconds": round(staging.waited_seconds, 3),
            "process": os.getpid(),
        }

    def run_together(self, chosen: range, processes: int) -> dict[str, Any]:
        """The same by several processes, each with a span of the sequences `chosen`."""
        info, report = self.prepared.model, self.reporter.progress
        began = time.monotonic()
        fetch_weights(info, self.workspace, lambda done, total: report("download", done, total, "bytes"))
        tokens = _tokens_of(self.asked, self.prepared, self.files.layout)
        already = tokens - _tokens_of(self._todo, self.prepared, self.files.layout)
        fetched = time.monotonic() - began
        work = Together(
            self.prepared, self.workspace, self.devices, self.reporter, self.journal, self.experts, self.batches
        )
        done = work.run(chosen, processes, tokens, already)
        return done | {"download_seconds": round(fetched, 3), "seconds": round(done["seconds"] + fetched, 3)}

    @property
    def _todo(self) -> int:
        return sum(len(run) for run, _ in self.batches)

    def _pass(self, model: torch.nn.Module) -> StagingBuffer:
        """Every batch through the model and onto the disk; returns the staging buffer, closed."""
        layout, todo = self.files.layout, self._todo
        slot = (
            self.prepared.spec.capture.batch_sequences
            * layout.positions
            * max(layout.widths.values())
            * layout.itemsize
        )
        pinned = self.devices.placement is not None
        with StagingBuffer(slot, ring_slots(slot), write_parts, pinned=pinned) as staging:
            more = writers_bytes(layout.largest_chunk_bytes, staging.writers, packed=layout.codec != "none")
            log.info(
                "one pass over %d sequences; in addition to the model at most %.0f MB of memory: a staging buffer of %.0f MB and "
                "%d writers",
                *(todo, (staging.total_bytes + more) / 1e6, staging.total_bytes / 1e6, staging.writers),
            )
            self._forward(model, staging)
        if self.experts is not None:
            self.experts.save()
        return staging

    def _forward(self, model: torch.nn.Module, staging: StagingBuffer) -> None:
        """Raises MemoryFull, SiteError, and the error of a writer."""
        info, corpus = self.prepared.model, self.corpus
        layout, anatomy = self.files.layout, info.anatomy
        progress = Progress(self.reporter, self._todo, self.asked, _tokens_of(self.asked, self.prepared, layout))
        modules = anatomy.modules(tuple(layout.stored), layout.layers)
        head = Head(model) if self.prepared.spec.capture.perplexity else None
        base = model.get_submodule(anatomy.backbone)
        hooked = HookedPass(base, modules, staging, layout, progress.during)
        experts = self._watched(base)
        for run, read in self.batches:
            lengths = tuple(int(length) for length in corpus.lengths[run.start : run.stop])
            expected = len(modules) * len(run) * read + (head is not None) + (read and experts is not None)
            batch = Batch(run, lengths, expected, self.journal, self.files)
            rows = corpus.token_ids[run.start : run.stop, : batch.positions].astype(np.int64)  # (sequence, position)
            what = f"the forward pass of {info.source.name} over {len(run)} x {batch.positions} tokens"
            with explained(what, _MEMORY, PLAIN):
                ids = torch.from_numpy(rows).to(self.devices.first)
                if read and experts is not None:
                    experts.begin(batch)
                hidden = hooked.forward(batch, ids, read=read)
                if read and experts is not None:
                    experts.finish()
                found = losses(head, hidden, ids, lengths) if head is not None else None
            if found is not None:
                _measure(batch, found, read=read)
            progress.finished(len(run))

    def _watched(self, base: torch.nn.Module) -> ExpertPass | None:
        """What watches the model's experts; None where these are not read."""
        info, shapes = self.prepared.model.experts, self.files.layout.experts
        if info is None or shapes is None:
            return None
        if shapes.values:
            log.info(
                "every expert of %d layers is read: %.0f MB of memory for their sums",
                *(len(shapes.layers), shapes.sums_bytes / 1e6),
            )
        return ExpertPass(base, info, self.files.layout, self.experts)


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
