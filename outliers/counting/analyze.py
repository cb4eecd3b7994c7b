"""A finished capture -> a Summary on disk, chunk by chunk, each chunk read once; the model is never loaded.

    unit        some layers of one span of one sequence: what a thread counts at a time
    work item   some sequences: what a worker of an executor counts at a time, into a folder of its own

Threads of this process share one set of totals. An executor with the interface of `concurrent.futures` (such as that of a
Dask cluster, `executors`) gets work items. Each worker writes its summary next to the capture, on the disk that all workers
mount, and this process merges them. Memory is one set of totals and a few tiles for each worker, whatever the size of the
corpus.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.corpus.tokens import load_corpus
from outliers.counting.accumulate import TILE_BYTES, LayerCounts, Span, Tally, Tiles, is_compiled
from outliers.counting.massive import undecided
from outliers.counting.second_look import look_again
from outliers.counting.sequence_counts import OpenSequence
from outliers.counting.summary import Frame, Summary, merge
from outliers.counting.summary_files import STUDY, CountsWriter, read_summary, write_summary
from outliers.errors import CaptureError
from outliers.events.stream import Reporter
from outliers.experts.count import count_experts
from outliers.experts.totals_files import write_totals
from outliers.files.atomic import write_atomic
from outliers.store.chunks import ChunkFiles, Journal
from outliers.store.fingerprint import layout_from, read_fingerprint
from outliers.study.layout import Layout
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

UNITS_PER_WORKER = 2
"""Where there are fewer spans than units that keep the workers busy, the layers of a span are split into several units."""
ITEMS_PER_WORKER = 2
PROGRESS_SECONDS = 0.5


def frame_of(prepared: Prepared, layout: Layout) -> Frame:
    """The frame of a study's summaries."""
    criteria = prepared.spec.criteria
    return Frame(
        study_id=prepared.study_id,
        dtype=layout.dtype,
        widths=tuple(layout.widths.items()),
        num_layers=len(layout.layers),
        positions=layout.positions,
        magnitude=criteria.magnitude,
        ladder=criteria.magnitudes,
        site=prepared.site,
    )


@dataclass(frozen=True)
class WorkItem:
    """Sequences to summarize, with everything that this needs: it can be sent to another process.

    sequences: ascending. lengths: (sequence,) int32, tokens that are not padding. marks: (sequence, kind, position) bool,
    see `Corpus.marks`. folder: of the capture. target: folder for the summary of the item.
    """

    folder: Path
    frame: Frame
    sequences: tuple[int, ...]
    lengths: NDArray[np.int32]
    marks: NDArray[np.bool_]
    target: Path


def analyze(
    prepared: Prepared,
    workspace: Workspace,
    reporter: Reporter,
    *,
    sequences: range | None = None,
    executor: Executor | None = None,
    workers: int | None = None,
) -> Path:
    """Summarize the capture of a study, or some sequences of it; returns the folder of its private summary.

    executor: counts `workers` items at a time (default: threads of this process, as many as the machine has cores).
    Raises CaptureError if a sequence is not captured yet, CorruptCapture if bytes changed.
    """
    folder = workspace.capture(prepared.capture_id)
    layout = layout_of_capture(folder)
    wanted = range(layout.num_sequences) if sequences is None else sequences
    done = {line["sequence"] for line in journal_lines(folder, wanted).values()}
    if len(done) < len(wanted):
        raise CaptureError(f"{folder} has {len(done)} of {len(wanted)} sequences: extract again to finish it")
    corpus = load_corpus(prepared.corpus, workspace)
    target = workspace.summary(prepared.capture_id, prepared.study_id)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    rows = np.array(wanted)
    whole = WorkItem(
        folder, frame_of(prepared, layout), tuple(wanted), corpus.lengths[rows], corpus.marks(wanted), target
    )
    steps = len(wanted) * len(layout.layers)

    if not is_compiled():
        log.info("compiling the loops that count: once on this machine, about ten seconds")

    def progress(done: int) -> None:
        reporter.progress("analyze", done, steps, "layers")

    workers = workers or os.cpu_count() or 1
    if executor is None:
        total = summarize(whole, workers, progress)
    else:
        total = _spread(whole, executor, workers, lambda count: progress(count * len(layout.layers)))
    write_atomic(target / STUDY, prepared.model_dump_json().encode())
    if layout.experts is not None:
        _count_experts(prepared, whole, layout, wanted, reporter)
    write_summary(target, total)
    return target


def _count_experts(prepared: Prepared, item: WorkItem, layout: Layout, wanted: range, reporter: Reporter) -> None:
    """Write the totals of the experts of a work item's sequences next to its summary. Raises CaptureError, CorruptCapture."""
    lines = journal_lines(item.folder, wanted)

    def progress(done: int) -> None:
        reporter.progress("experts", done, len(wanted), "sequences")

    shapes = layout.experts
    if shapes is not None:
        size = shapes.counting_bytes(len(wanted), layout.positions, inputs="mlp_in" in layout.widths)
        log.info("counting the experts of %d layers: at most %.0f MB of memory", len(shapes.layers), size / 1e6)
    totals = count_experts(prepared.study_id, item.folder, layout, lines, wanted, item.lengths, item.marks, progress)
    write_totals(item.target, totals)


def layout_of_capture(folder: Path) -> Layout:
    """The layout of the capture in `folder`. Raises CaptureError."""
    fingerprint = read_fingerprint(folder)
    if fingerprint is None:
        raise CaptureError(f"there is no capture in {folder}: extract first")
    return layout_from(fingerprint)


def journal_lines(folder: Path, wanted: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Journal lines of the wanted sequences, with checksums as arrays: lists take twenty times the memory."""
    asked = frozenset(wanted)

    def lean(entry: dict[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = {name: entry[name] for name in ("sequence", "nll", "nll_tokens") if name in entry}
        if entry["sequence"] in asked:
            kept["crc32"] = {site: np.array(crcs, np.uint32) for site, crcs in entry.get("crc32", {}).items()}
        return kept

    done = Journal.open(folder / "journal.jsonl", keep=lean).done
    return {sequence: done[sequence] for sequence in sorted(asked & done.keys())}


def summarize(item: WorkItem, workers: int = 1, progress: Callable[[int], None] = lambda done: None) -> Summary:
    """The Summary of a work item, by threads of this process; writes the counts of its sequences below its target.

    progress: called with the number of finished layers of sequences. Raises CaptureError, CorruptCapture.
    """
    layout, tally = layout_of_capture(item.folder), Tally(item.frame)
    reader = add_item(tally, item, layout, workers, progress)
    total = tally.finish()
    total.sequences = np.array(item.sequences, np.int64)
    total.tokens = int(item.lengths.sum())
    look_again(total, reader.files, layout, reader.lines, item.lengths.tolist(), workers)
    return total


def add_item(
    tally: Tally, item: WorkItem, layout: Layout, workers: int, progress: Callable[[int], None] = lambda done: None
) -> Reader:
    """Add a work item to a tally, by threads of this process, and write the counts of its sequences below its target.

    The float moments are added sequence after sequence: items in ascending order give the bits of one item of all of them.
    progress: called with the number of finished layers of sequences. Raises CaptureError, CorruptCapture.
    """
    writer = CountsWriter(item.target)
    reader = Reader(item, layout, workers)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="analyze")
    try:
        pending: deque[tuple[_Unit, Future[LayerCounts]]] = deque()
        units = iter(reader.units())
        current: OpenSequence | None = None
        exhausted = False
        while pending or not exhausted:
            while not exhausted and len(pending) < 2 * workers:
                unit = next(units, None)
                if unit is None:
                    exhausted = True
                else:
                    pending.append((unit, pool.submit(reader.count, tally, unit)))
            if not pending:
                break
            unit, future = pending.popleft()
            while not wait([future], timeout=PROGRESS_SECONDS).done:
                progress(reader.layers_done())
            # added in the order of the units, so that the float moments do not depend on which thread was first
            if current is None:
                line = reader.lines[unit.span.sequence]
                loss = float(line.get("nll", 0.0)), int(line.get("nll_tokens", 0))
                current = OpenSequence(item.frame, unit.tokens, loss)
            current.add(unit.span, future.result(), tally.summary)
            if unit.last:
                writer.add(current.counts())
                current = None
                progress(reader.layers_done())
    finally:
        pool.shutdown(cancel_futures=True)
    writer.flush()
    return reader


def summarize_into_folder(item: WorkItem) -> str:
    """Write the summary of a work item into its target, once; for a worker of an executor. Returns the path.

    It may run twice, also at the same time (if an executor gives up a worker that still runs): the first complete folder
    stays. Both are the same.
    """
    item.target.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=item.target.parent, prefix=f".{item.target.name}-{os.getpid()}-"))
    try:
        write_summary(own, summarize(WorkItem(**(item.__dict__ | {"target": own}))))
        own.rename(item.target)
    except OSError:
        if not item.target.exists():
            raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return str(item.target)


def _spread(whole: WorkItem, executor: Executor, workers: int, progress: Callable[[int], None]) -> Summary:
    """The Summary of a work item by the workers of an executor, who get smaller items; merged in order."""
    count = min(len(whole.sequences), workers * ITEMS_PER_WORKER)
    items = [
        WorkItem(
            whole.folder,
            whole.frame,
            tuple(whole.sequences[index] for index in chosen),
            whole.lengths[chosen],
            whole.marks[chosen],
            whole.target / "parts" / str(number),
        )
        for number, chosen in enumerate(np.array_split(np.arange(len(whole.sequences)), count))
    ]
    futures = [executor.submit(summarize_into_folder, item) for item in items]
    total = Summary.zero(whole.frame)
    (whole.target / "sequences").mkdir()
    try:
        for future in futures:
            folder = Path(future.result())
            if not folder.exists():
                raise CaptureError(
                    f"a worker wrote {folder}, and it is not here: workers must mount the workspace's disk"
                )
            total = merge(total, read_summary(folder))
            for path in (folder / "sequences").iterdir():
                path.rename(whole.target / "sequences" / path.name)
            progress(total.sequences.size)
    finally:
        for future in futures:
            future.cancel()
    shutil.rmtree(whole.target / "parts")
    if undecided(total):
        layout = layout_of_capture(whole.folder)
        files, lines = ChunkFiles(whole.folder, layout), journal_lines(whole.folder, whole.sequences)
        look_again(total, files, layout, lines, whole.lengths.tolist(), workers)
    return total


@dataclass
class _Unit:
    """Some layers of one span; `last` of its sequence."""

    span: Span
    chunk: int
    tokens: int
    layers: range
    last: bool


class Reader:
    """The units of a work item, and the tiles of each, read from the capture."""

    def __init__(self, item: WorkItem, layout: Layout, workers: int) -> None:
        self.item, self.layout = item, layout
        self.files = ChunkFiles(item.folder, layout)
        self.lines = journal_lines(item.folder, item.sequences)
        widest = max(layout.widths.values()) * layout.itemsize
        self.rows = max(4, TILE_BYTES // widest // 4 * 4)
        self._chunks = sum(layout.chunks_of(int(length)) for length in item.lengths)
        shares = -(-workers * UNITS_PER_WORKER // self._chunks) if workers > 1 else 1
        self.shares = min(len(layout.layers), shares)
        self._read = 0
        self._lock = threading.Lock()

    def units(self) -> Iterator[_Unit]:
        """Every unit, in the order of sequences, positions, layers."""
        layout, item = self.layout, self.item
        cuts = np.array_split(np.arange(len(layout.layers)), self.shares)
        for row, sequence in enumerate(item.sequences):
            tokens = int(item.lengths[row])
            chunks = layout.chunks_of(tokens)
            for chunk in range(chunks):
                start, stop = layout.span(chunk).start, min(layout.span(chunk).stop, tokens)
                span = Span(sequence, start, stop - start, item.marks[row, :, start:stop], shares=len(cuts))
                for number, cut in enumerate(cuts):
                    last = chunk == chunks - 1 and number == len(cuts) - 1
                    yield _Unit(span, chunk, tokens, range(int(cut[0]), int(cut[-1]) + 1), last)

    def count(self, tally: Tally, unit: _Unit) -> LayerCounts:
        """Count one unit; the threads call it."""
        return tally.count(unit.span, unit.layers, self._tiles(unit), self.rows)

    def layers_done(self) -> int:
        """Finished layers of sequences; each chunk of a sequence counts as its share."""
        return self._read * len(self.item.sequences) // self._chunks

    def _tiles(self, unit: _Unit) -> Tiles:
        layout, sequence = self.layout, unit.span.sequence
        crcs, chunks = self.lines[sequence]["crc32"], layout.chunks_of(unit.tokens)
        rows, bits = min(self.rows, layout.chunk_positions), np.dtype(f"<u{layout.itemsize}")
        buffers = {site: np.empty((rows, width), bits) for site, width in layout.widths.items()}
        stored = tuple(layout.stored)

        def tiles(layer: int) -> Iterator[dict[str, NDArray[Any]]]:
            at, left = layer * chunks + unit.chunk, unit.span.length
            runs = [
                self.files.tiles(site, layer, sequence, unit.chunk, int(crcs[site][at]), buffers[site])
                for site in stored
            ]
            for read in zip(*runs, strict=True):
                # after the span comes the padding of the sequence's last chunk, read for its checksum
                if left > 0:
                    found = {site: run[:left] for site, run in zip(stored, read, strict=True)}
                    for site, other in layout.aliases.items():
                        found[site] = buffers[site][: found[other].shape[0]]
                        found[site][:] = found[other]
                    yield found
                left -= read[0].shape[0]
            with self._lock:
                self._read += 1

        return tiles
