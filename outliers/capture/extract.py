"""Makes a capture: one forward pass for each batch, with hooks on every site of every layer; values go to chunks on disk.

Runs on the machine with the model. An interrupted capture continues from its journal, in whole batches, and ends bit for bit
as if it had not been interrupted; under other conditions it is refused. Knows the modules of the sites and the disk (`store`),
nothing of counting.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from outliers.capture.by_layers.finish import finish
from outliers.capture.by_layers.record import LayerRecord, discard
from outliers.capture.by_layers.run import LayeredSession, Step, nothing
from outliers.capture.devices import Devices, instructions
from outliers.capture.experts import ExpertSumsFile
from outliers.capture.forward import Sink
from outliers.capture.libraries import LOOKED_FOR, libraries
from outliers.capture.load import fetch_weights
from outliers.capture.processes import await_earlier
from outliers.capture.schedule import decide
from outliers.capture.session import Session
from outliers.capture.together import Together, processes_of
from outliers.capture.work import Work, tokens_of
from outliers.capture.work import write_parts as write_parts
from outliers.corpus.tokens import Corpus, load_corpus
from outliers.errors import CaptureMismatch, CorruptCapture
from outliers.events.stream import Reporter
from outliers.spec import FORMAT_VERSION
from outliers.store.chunks import ARRAYS, ChunkFiles, Journal, NamedChunk, create_arrays, hold, mend_arrays
from outliers.store.durable import drop_leftovers
from outliers.store.fingerprint import difference, layout_from, read_fingerprint, shapes_of, write_fingerprint
from outliers.store.journal import DONE
from outliers.study.expert_shapes import SUMS
from outliers.study.layout import Layout
from outliers.study.prepare import Prepared, layout_of
from outliers.study.window import kept_sequences
from outliers.workspace import Workspace

log = logging.getLogger(__name__)


def extract(
    prepared: Prepared,
    workspace: Workspace,
    reporter: Reporter,
    *,
    sequences: range | None = None,
    open_windows: OpenWindows | None = None,
    on_step: Step = nothing,
) -> dict[str, Any]:
    """Make or finish the capture of a study, or of some sequences (whole batches) of it.

    open_windows: for a capture that keeps only some of it. on_step: as `by_layers.run` calls it. Returns what this call did
    (sequences, tokens, seconds, bytes, device).

    Raises Busy if another process writes the capture, CaptureMismatch, CorruptCapture, SiteError, UnknownModel, PlanRefused
    and MemoryFull if the model does not fit the GPUs of this machine, HubUnavailable.
    """
    folder = workspace.capture(prepared.capture_id)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        await_earlier(folder)
        corpus = load_corpus(prepared.corpus, workspace)
        spec, devices = decide(prepared.spec, prepared.model, folder)
        prepared = prepared.model_copy(update={"spec": spec})
        layout = _begin(prepared, corpus, folder, devices)
        journal = Journal.open(folder / "journal.jsonl", repair=True)
        drop_leftovers(folder, ARRAYS)
        files = ChunkFiles(folder, layout)
        chosen = sequences if sequences is not None else range(layout.num_sequences)
        if layout.experts is None and prepared.model.anatomy.moe_layers and prepared.model.experts is None:
            log.warning("the experts of %s are not read: `outliers plan` says why", prepared.model.source.name)
        has_values = layout.experts is not None and layout.experts.values
        experts = ExpertSumsFile(folder, layout.experts, chosen) if layout.experts is not None and has_values else None
        if (layered := LayerRecord.complete(folder, chosen)) is not None:
            finish(layered, journal, files, corpus, experts)
            journal = Journal.open(folder / "journal.jsonl")  # with the checksums, which appended lines don't keep
        work = Work(prepared, workspace, corpus, files, journal, len(chosen), devices, reporter, experts)
        capture = _Capture(work, chosen)
        if open_windows is None:
            _forget_windows(journal, prepared, chosen)
        windows = open_windows(chosen, corpus, layout, journal) if open_windows is not None else None
        if windows is None:
            result = capture.whole(on_step)
        else:
            result = capture.in_pass(windows) if isinstance(windows, PassWindows) else capture.rolling(windows)
        if result["sequences"]:
            with (folder / "extractions.jsonl").open("a") as record:
                # a person reads in the report when the model was run
                record.write(json.dumps(result | {"date": time.strftime("%Y-%m-%d", time.gmtime())}) + "\n")
        return result


def _forget_windows(journal: Journal, prepared: Prepared, chosen: range) -> None:
    """Withdraw what the study has counted of these sequences and not finished, for now all of them are kept."""
    line = journal.counted.get((prepared.study_id, chosen.start, chosen.stop))
    if line is not None and line.phase != DONE:
        journal.forget_counted(line.key)
        shutil.rmtree(journal.path.parent / line.place, ignore_errors=True)


class Windows(Protocol):
    """Asks for the sequences of a capture window by window, and takes each once it is captured (`counting.rolling`)."""

    @property
    def kept(self) -> range:
        """The sequences that stay on the disk."""

    def next(self) -> range | None:
        """The window that must be captured next, whole batches; None at the end."""

    def take(self, window: range) -> None:
        """Use a window, whose sequences are all journaled; what is freed of it is not done any more."""


@runtime_checkable
class PassWindows(Windows, Protocol):
    """Windows whose sequences are counted in the forward pass (`counting.pass_counts`)."""

    @property
    def stored(self) -> range:
        """The sequences that were counted, and must be on the disk."""

    def sink(self) -> Sink:
        """Takes the tensors of a batch that was begun."""

    def counting(self, device: str) -> contextlib.AbstractContextManager[None]:
        """What counts on a device, checked against what is stored, until the block ends."""

    def begin(self, run: range) -> None:
        """The next forward pass is of this batch."""

    def end(self, losses: list[tuple[float, int]] | None) -> None:
        """The forward pass of the batch is done. losses: of each sequence, as `Session.pass_to` has them."""


OpenWindows = Callable[[range, Corpus, Layout, Journal], Windows | None]
"""(sequences, corpus, layout, journal) -> the windows of a capture that keeps only some of it; None where all is kept."""


@dataclass(frozen=True)
class _Capture:
    """One call of `extract`, with the capture's lock held. wanted: the sequences that it is for."""

    of: Work
    wanted: range

    def whole(self, on_step: Step) -> dict[str, Any]:
        """Capture all that is missing, with the whole model or a layer at a time."""
        of, folder = self.of, self.of.files.root.parent
        batches = self._missing(self.wanted, of.journal)
        if not batches:
            discard(folder)
            return self._nothing()
        self._withdraw(batches)
        if of.journal.done:
            log.info("going on after %d of %d sequences", len(of.journal.done), of.layout.num_sequences)
        if of.prepared.spec.compute.schedule == "layers":
            return LayeredSession(of, batches).run(self.wanted, on_step)
        todo = sum(len(run) for run, _ in batches)
        processes = min(processes_of(of.prepared, of.devices), len(batches))
        if processes > 1:
            result = self._together(batches, todo, processes)
        else:
            with self._session(todo) as session:
                session.read(batches)
            result = session.result()
        discard(folder)
        return result

    def _together(self, batches: list[tuple[range, bool]], todo: int, processes: int) -> dict[str, Any]:
        """Capture batches by several processes, each with a span of the sequences that are wanted."""
        of, began = self.of, time.monotonic()
        fetch_weights(of.prepared.model, of.workspace, of.on_download())
        fetched = time.monotonic() - began
        tokens, left = (tokens_of(count, of.prepared, of.layout) for count in (of.asked, todo))
        team = Together(of.prepared, of.workspace, of.devices, of.reporter, of.journal, of.experts, batches)
        done = team.run(self.wanted, processes, tokens, tokens - left)
        return done | {"download_seconds": round(fetched, 3), "seconds": round(done["seconds"] + fetched, 3)}

    def rolling(self, windows: Windows) -> dict[str, Any]:
        """Capture window after window, each after the one before was taken; the model is loaded where something is missing."""
        session: Session | None = None
        with contextlib.ExitStack() as stack:
            while (window := windows.next()) is not None or self._lacks(windows):
                own = windows.kept if window is None else window
                # the file names the chunks; what this process has appended is kept in memory without them
                batches = self._missing(own, Journal.open(self.of.journal.path))
                if batches:
                    if session is None:
                        session = stack.enter_context(self._session(self.wanted.stop - own.start))
                    self._withdraw(batches)
                    session.read(batches)
                    session.flush()
                if window is not None:
                    windows.take(window)
        return self._nothing() if session is None else session.result()

    def in_pass(self, windows: PassWindows) -> dict[str, Any]:
        """Count window after window in the forward pass, and store the sequences that stay."""
        lacking = self._missing(windows.stored, Journal.open(self.of.journal.path))
        if windows.next() is None and not lacking:
            return self._nothing()
        with self._session(self.wanted.stop - min(self.wanted.stop, self._upto(windows))) as session:
            if lacking:
                self._withdraw(lacking)
                session.read(lacking)
                session.flush()
            with windows.counting(self.of.devices.first):
                while (window := windows.next()) is not None:
                    self._count(windows, window, session)
        return session.result()

    def _count(self, windows: PassWindows, window: range, session: Session) -> None:
        own = range(window.start, max(window.start, min(window.stop, windows.kept.stop)))
        lacking = {run.start for run, _ in self._missing(own, Journal.open(self.of.journal.path))}
        for run in _runs(window, self.of.prepared.spec.capture.batch_sequences):
            store = run.start in lacking
            if store:
                self._withdraw([(run, True)])
            windows.begin(run)
            windows.end(session.pass_to(windows.sink(), run, store=store))
        session.flush()
        windows.take(window)

    def _upto(self, windows: Windows) -> int:
        window = windows.next()
        return self.wanted.stop if window is None else window.start

    def _lacks(self, windows: Windows) -> bool:
        """Whether a sequence that stays was withdrawn after it was counted."""
        return bool(self._missing(windows.kept, Journal.open(self.of.journal.path)))

    def _missing(self, sequences: range, journal: Journal) -> list[tuple[range, bool]]:
        size = self.of.prepared.spec.capture.batch_sequences
        return _todo(
            _runs(sequences, size), journal, self.of.files, self.of.experts, self.of.prepared.spec.capture.perplexity
        )

    def _withdraw(self, batches: list[tuple[range, bool]]) -> None:
        # a batch is computed whole: its finished sequences are written again, and are not done until then
        again = [s for run, read in batches if read for s in run if s in self.of.journal.done]
        if again:
            self.of.journal.redo(again)

    def _session(self, todo: int) -> Session:
        return Session(self.of, todo)

    def _nothing(self) -> dict[str, Any]:
        log.info("the capture %s is complete: nothing to extract", self.of.prepared.capture_id)
        tokens = tokens_of(len(self.wanted), self.of.prepared, self.of.layout)
        self.of.reporter.progress("extract", tokens, tokens, "tokens")
        return {"sequences": 0, "of_sequences": self.of.layout.num_sequences, "seconds": 0.0}


def _begin(prepared: Prepared, corpus: Corpus, folder: Path, devices: Devices) -> Layout:
    """Check the fingerprint of an existing capture, or begin a new one. An existing capture keeps its codec."""
    layout = layout_of(prepared.spec, prepared.model)
    fixed = conditions(prepared, devices)
    found = read_fingerprint(folder)
    if found is None:
        _clear(folder)
        create_arrays(folder, layout, corpus.ids, corpus.lengths)
        free = {
            "threads": torch.get_num_threads(),
            "batch_sequences": prepared.spec.capture.batch_sequences,
            "sequence_texts": [corpus.texts[number] for number in range(kept_sequences(prepared.spec))],
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
    for name in mend_arrays(folder, layout, corpus.ids, corpus.lengths):
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
