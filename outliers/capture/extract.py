"""Makes a capture: one forward pass for each batch, with hooks on every site of every layer; values go to chunks on disk.

Runs on the machine with the model. An interrupted capture continues from its journal, in whole batches, and ends bit for bit
as if it had not been interrupted; under other conditions it is refused. Knows the modules of the sites and the disk (`store`),
nothing of counting.
"""

from __future__ import annotations

import json
import logging
import shutil
import stat
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from outliers.capture.by_layers.finish import finish
from outliers.capture.by_layers.record import LayerRecord, discard
from outliers.capture.by_layers.run import LayeredSession, Step, nothing
from outliers.capture.devices import Devices, instructions
from outliers.capture.experts import ExpertPass, ExpertSumsFile
from outliers.capture.forward import Batch, HookedPass
from outliers.capture.libraries import LOOKED_FOR, libraries
from outliers.capture.library_errors import explained
from outliers.capture.load import PLAIN, fetch_weights, load_model
from outliers.capture.perplexity import Head, losses
from outliers.capture.schedule import decide
from outliers.capture.session import MEMORY, Clock, Session, measure, tokens_of
from outliers.capture.staging import StagingBuffer
from outliers.corpus.tokens import Corpus, load_corpus
from outliers.errors import CaptureMismatch, CorruptCapture
from outliers.events.stream import Reporter
from outliers.spec import FORMAT_VERSION
from outliers.store.chunks import ARRAYS, ChunkFiles, Journal, NamedChunk, create_arrays, hold, mend_arrays
from outliers.store.durable import drop_leftovers
from outliers.store.fingerprint import difference, layout_from, read_fingerprint, shapes_of, write_fingerprint
from outliers.study.expert_shapes import SUMS
from outliers.study.layout import Layout
from outliers.study.prepare import Prepared, layout_of
from outliers.workspace import Workspace

log = logging.getLogger(__name__)


def extract(
    prepared: Prepared,
    workspace: Workspace,
    reporter: Reporter,
    *,
    sequences: range | None = None,
    on_step: Step = nothing,
) -> dict[str, Any]:
    """Make or finish the capture of a study, or of some sequences (whole batches) of it.

    Returns what this call did (sequences, tokens, seconds, bytes, device). on_step: as `by_layers.run` calls it.

    Raises Busy if another process writes the capture, CaptureMismatch, CorruptCapture, SiteError, UnknownModel, PlanRefused
    and MemoryFull if the model does not fit the GPUs of this machine, HubUnavailable.
    """
    folder = workspace.capture(prepared.capture_id)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        corpus = load_corpus(prepared.corpus, workspace)
        spec, devices = decide(prepared.spec, prepared.model, folder)
        prepared = prepared.model_copy(update={"spec": spec})
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
        if (layered := LayerRecord.complete(folder, chosen)) is not None:
            finish(layered, journal, files, corpus, experts)
            journal = Journal.open(folder / "journal.jsonl")  # with the checksums, which appended lines don't keep
        batches = _todo(wanted, journal, files, experts, prepared.spec.capture.perplexity)
        asked = sum(map(len, wanted))
        if not batches:
            discard(folder)
            log.info("the capture %s is complete: nothing to extract", prepared.capture_id)
            tokens = tokens_of(asked, prepared, layout)
            reporter.progress("extract", tokens, tokens, "tokens")
            return {"sequences": 0, "of_sequences": layout.num_sequences, "seconds": 0.0}
        # a batch is computed whole: its finished sequences are written again, and are not done until then
        again = [s for run, read in batches if read for s in run if s in journal.done]
        if again:
            journal.redo(again)
        if journal.done:
            log.info("going on after %d of %d sequences", len(journal.done), layout.num_sequences)
        work = (prepared, workspace, corpus, files, journal, batches, asked, devices, reporter, experts)
        if spec.compute.schedule == "layers":
            result = LayeredSession(*work).run(chosen, on_step)
        else:
            result = _Whole(*work).run()
            discard(folder)
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


class _Whole(Session):
    """The model is loaded whole, and each batch is one forward pass."""

    def run(self) -> dict[str, Any]:
        """Load the model, run the batches, and return what `extract` returns."""
        began = time.monotonic()
        info = self.prepared.model
        fetch_weights(info, self.workspace, self.on_download())
        fetched = time.monotonic()
        perplexity = self.prepared.spec.capture.perplexity
        model = load_model(info, self.workspace, self.devices.map(info), head=perplexity)
        loaded = time.monotonic()
        placement = self.devices.placement
        placed = f"; {placement.sentence}" if placement else ""
        log.info("loaded %s on %s in %.1f s%s", info.source.name, self.devices.kind, loaded - fetched, placed)
        with self.staging() as staging:
            self._forward(model, staging)
        if self.experts is not None:
            self.experts.save()
        return self.result(Clock(began, fetched, loaded, time.monotonic()), staging)

    def _forward(self, model: torch.nn.Module, staging: StagingBuffer) -> None:
        """Every batch through the model and onto the disk. Raises MemoryFull, SiteError, and the error of a writer."""
        info, anatomy = self.prepared.model, self.prepared.model.anatomy
        progress = self.progress()
        modules = anatomy.modules(tuple(self.layout.stored), self.layout.layers)
        head = Head(model) if self.prepared.spec.capture.perplexity else None
        base = model.get_submodule(anatomy.backbone)
        hooked = HookedPass(base, modules, staging, self.layout, progress.during)
        experts = self._watched(base)
        for run, read in self.batches:
            lengths = self.lengths(run)
            expected = len(modules) * len(run) * read + (head is not None) + (read and experts is not None)
            batch = Batch(run, lengths, expected, self.journal, self.files)
            what = f"the forward pass of {info.source.name} over {len(run)} x {batch.positions} tokens"
            with explained(what, MEMORY, PLAIN):
                ids = self.ids(run, batch.positions)
                if read and experts is not None:
                    experts.begin(batch)
                hidden = hooked.forward(batch, ids, read=read)
                if read and experts is not None:
                    experts.finish()
                found = losses(head, hidden, ids, lengths) if head is not None else None
            if found is not None:
                measure(batch, found, read=read)
            progress.finished(len(run))

    def _watched(self, base: torch.nn.Module) -> ExpertPass | None:
        """What watches the model's experts; None where these are not read."""
        info = self.prepared.model.experts
        return ExpertPass(base, info, self.layout, self.experts) if info is not None and self.watch() else None
