"""One forward pass a batch: hooks on every site of every layer -> ring -> chunks and journal on disk.

Runs on the machine with the model. A capture that was begun goes on from its journal, in whole batches, and ends bit
for bit as if nothing had happened; one that was begun under other conditions is refused. It knows the sites' modules
(`architectures`) and the disk (`store`), nothing of counting. Before it: `prepare`. After it: `summary`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.architectures import family, site_modules
from outliers.corpus import Corpus, load_corpus
from outliers.errors import Busy, CaptureMismatch
from outliers.events import Reporter
from outliers.forward import Batch, HookedPass, Progress
from outliers.models import load_model
from outliers.prepare import Prepared
from outliers.ring import Ring
from outliers.ring_size import ring_slots
from outliers.spec import FORMAT_VERSION
from outliers.store import (
    STORAGE,
    ChunkFiles,
    Journal,
    Layout,
    create_arrays,
    layout_from,
    read_fingerprint,
    shapes_of,
    write_fingerprint,
)
from outliers.workspace import Workspace

log = logging.getLogger(__name__)


def capture_layout(prepared: Prepared) -> Layout:
    """The shapes on disk of a study's capture."""
    widths = prepared.model.site_widths
    return Layout(
        widths={site: widths[site] for site in prepared.spec.capture.sites},
        layers=prepared.layers,
        num_sequences=prepared.corpus.num_sequences,
        positions=prepared.corpus.sequence_length,
        dtype=prepared.model.dtype,
        codec=prepared.spec.capture.codec,
    )


def extract(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    """Make or finish the capture of a study; returns what this call did (sequences, tokens, seconds, bytes, device).

    Raises Busy where another process writes it, CaptureMismatch, CorruptCapture, SiteError, UnknownModel.
    """
    folder = workspace.capture(prepared.capture_id)
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / "lock"):
        corpus = load_corpus(prepared.corpus, workspace)
        device = choose_device(prepared.spec.compute.gpu_count)
        layout = _begin(prepared, corpus, folder, device)
        journal = Journal.open(folder / "journal.jsonl", repair=True)
        _drop_leftovers(folder, layout)
        files = ChunkFiles(folder, layout)
        batches = _missing(layout, journal, files, prepared.spec.capture.batch_sequences)
        if not batches:
            log.info("the capture %s is complete: nothing to extract", prepared.capture_id)
            reporter.progress("extract", prepared.corpus.num_tokens, prepared.corpus.num_tokens, "tokens")
            return {"sequences": 0, "of_sequences": layout.num_sequences, "seconds": 0.0}
        if journal.done:
            log.info("going on after %d of %d sequences", len(journal.done), layout.num_sequences)
        result = _run(prepared, workspace, corpus, files, journal, batches, device, reporter)
        with (folder / "extractions.jsonl").open("a") as record:
            record.write(json.dumps(result) + "\n")
        return result


def choose_device(gpu_count: int | None) -> str:
    """`cuda:0` where there is a GPU and none was not asked for, else `cpu`."""
    return "cuda:0" if gpu_count != 0 and torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Hold the capture for this process: two writers would tear it."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"another process is writing {lock.parent}: wait for it, or end it") from error
        yield


def _begin(prepared: Prepared, corpus: Corpus, folder: Path, device: str) -> Layout:
    """Check the fingerprint of a capture that was begun, or begin one. The codec of a begun one stays."""
    layout = capture_layout(prepared)
    fixed = _conditions(prepared, device)
    found = read_fingerprint(folder)
    if found is None:
        # without a fingerprint nothing is done: what lies here was begun and never described
        shutil.rmtree(folder / "activations.zarr", ignore_errors=True)
        (folder / "journal.jsonl").unlink(missing_ok=True)
        create_arrays(folder, layout, corpus.token_ids, corpus.lengths)
        free = {"threads": torch.get_num_threads(), "sequence_texts": list(corpus.sequence_texts)}
        write_fingerprint(folder, {"fixed": fixed, "layout": shapes_of(layout), **free})
        return layout
    for name, value in fixed.items():
        if found["fixed"].get(name) != value:
            raise CaptureMismatch(
                f"the capture {prepared.capture_id} was begun with {name} {found['fixed'].get(name)}, now it is {value}: "
                f"go on under the old one, or remove it with `outliers captures rm {prepared.capture_id}`"
            )
    # other numbers of threads sum in another order: the rest is computed as the beginning was
    torch.set_num_threads(found["threads"])
    return layout_from(found)


def _conditions(prepared: Prepared, device: str) -> dict[str, Any]:
    """What must not change between the beginning of a capture and its end."""
    return {
        "format": FORMAT_VERSION,
        "capture_id": prepared.capture_id,
        "model": prepared.model.source.id,
        "revision": prepared.model.source.revision,
        "dtype": prepared.model.dtype,
        "token_sha256": prepared.corpus.token_sha256,
        "device": _device_name(device),
        **{name: metadata.version(name) for name in ("torch", "transformers", "numpy", "zarr")},
    }


def _drop_leftovers(folder: Path, layout: Layout) -> None:
    """Remove chunks that were being written when the process died."""
    for site in layout.widths:
        for torn in (folder / "activations.zarr" / site).glob(".*.tmp"):
            torn.unlink()


def _missing(layout: Layout, journal: Journal, files: ChunkFiles, batch: int) -> list[range]:
    """Batches that are not wholly journaled, or whose chunks are not all there in their size."""
    runs = [range(start, min(start + batch, layout.num_sequences)) for start in range(0, layout.num_sequences, batch)]
    return [run for run in runs if not all(_present(layout, journal.done.get(sequence), files) for sequence in run)]


def _present(layout: Layout, entry: dict[str, Any] | None, files: ChunkFiles) -> bool:
    if entry is None:
        return False
    for site in layout.widths:
        sizes = iter(entry["sizes"][site])
        for layer in range(len(layout.layers)):
            for chunk in range(layout.position_chunks):
                path = files.path(site, layer, entry["sequence"], chunk)
                if not path.is_file() or path.stat().st_size != next(sizes):
                    return False
    return True


def _run(
    prepared: Prepared,
    workspace: Workspace,
    corpus: Corpus,
    files: ChunkFiles,
    journal: Journal,
    batches: list[range],
    device: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """Load the model and read the batches that are missing."""
    began = time.monotonic()
    model = load_model(prepared.model, workspace, device)
    base: torch.nn.Module = model.base_model  # type: ignore[assignment]
    loaded = time.monotonic()
    log.info("loaded %s on %s in %.1f s", prepared.model.source.name, device, loaded - began)
    layout, todo = files.layout, sum(len(run) for run in batches)
    slot = prepared.spec.capture.batch_sequences * layout.positions * max(layout.widths.values()) * layout.itemsize
    modules = list(site_modules(family(prepared.model.architecture), tuple(layout.widths), layout.layers))
    progress = Progress(reporter, layout, todo)
    with Ring(slot, ring_slots(slot), _writer(files), pinned=device != "cpu") as ring:
        log.info("one pass over %d sequences; ring of %.0f MB", todo, ring.total_bytes / 1e6)
        hooked = HookedPass(base, modules, ring, layout, progress.during)
        for run in batches:
            ids = torch.from_numpy(corpus.token_ids[run.start : run.stop].astype(np.int64)).to(device)
            hooked.forward(base, Batch(run, len(modules) * len(run), journal, files), ids)
            progress.finished(len(run))
    ended = time.monotonic()
    tokens, written = todo * layout.positions, sum(journal.done[s]["bytes"] for run in batches for s in run)
    rate = tokens / (ended - loaded)
    log.info("read %d tokens in %.1f s (%.0f a second), %.1f MB", tokens, ended - loaded, rate, written / 1e6)
    return {
        "sequences": todo,
        "of_sequences": layout.num_sequences,
        "tokens": tokens,
        "bytes": written,
        "load_seconds": round(loaded - began, 3),
        "seconds": round(ended - began, 3),
        "tokens_per_second": round(rate, 1),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "ring_bytes": ring.total_bytes,
        "process": os.getpid(),
    }


def _writer(files: ChunkFiles) -> Callable[[Any, NDArray[Any]], None]:
    """What the ring's threads do with a tensor (sequence, position, feature): write each sequence's part of it."""
    lock = threading.Lock()
    stored = STORAGE[files.layout.dtype]

    def write(key: tuple[Batch, str, int], values: NDArray[Any]) -> None:
        batch, site, layer = key
        for row, sequence in enumerate(batch.sequences):
            chunks = files.write(site, layer, sequence, values[row].view(stored))
            with lock:
                last = batch.add(site, layer, sequence, chunks)
            if last:
                batch.finish()

    return write


def _device_name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
