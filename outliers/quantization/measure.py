"""A finished capture and its summary -> the errors of number formats next to the summary; the model is never loaded.

Ranges come from the summary, which has the whole corpus; those that it lacks (of rotated values, and without first tokens) from
one pass over all chunks. Errors come from a sample of whole sequences. A unit is one layer of one sequence, all sites: one
thread measures it, tile by tile, so that no number depends on how many threads there are. Memory is a few tiles a thread, and a
float a unit and row.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from outliers.corpus.tokens import load_corpus
from outliers.counting.analyze import journal_lines, layout_of_capture
from outliers.counting.summary import Summary
from outliers.counting.summary_files import read_summary
from outliers.errors import CaptureError, SummaryMismatch
from outliers.events.stream import Reporter
from outliers.quantization.kernels import tile as kernels
from outliers.quantization.ranges import FormatPlan, Key, Ranges, kept_of, read_ranges, write_ranges
from outliers.quantization.rules import Rule, padded
from outliers.quantization.variants import ALL, corpus_range
from outliers.results.format_errors import FormatErrors, has_errors, read_part_errors, write_errors
from outliers.store.chunks import ChunkFiles
from outliers.study.layout import Layout
from outliers.study.prepare import Prepared
from outliers.units import format_ranges
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

TILE_BYTES = 256 * 1024
"""Bytes of a tile as float32: it stays in a core's cache while every format reads it."""
PROGRESS_SECONDS = 0.5
STEP = "formats"
_KINDS = {"bfloat16": kernels.BFLOAT16, "float16": kernels.FLOAT16, "float32": kernels.FLOAT32}

_Unit = tuple[int, int]
"""A sequence, and a layer counted from 0."""
_Found = TypeVar("_Found")


def measure_formats(
    prepared: Prepared, workspace: Workspace, reporter: Reporter, *, workers: int | None = None
) -> FormatErrors:
    """Measure the errors of a study's formats, and write them next to its summary.

    Raises CaptureError where the summary is not there or not of the whole corpus, CorruptCapture where bytes changed.
    """
    private = workspace.summary(prepared.capture_id, prepared.study_id)
    summary, lengths = read_summary(private), _lengths(prepared, workspace)
    if summary.sequences.size != lengths.size:
        raise CaptureError(
            f"the summary in {private} is of {summary.sequences.size} of {lengths.size} sequences, and the scales of formats "
            "need the range of all: analyze the whole capture, or join the summaries of its parts first"
        )
    plan, every = FormatPlan.of(prepared, summary, lengths), range(lengths.size)
    reader = _Tiles.open(workspace.capture(prepared.capture_id), every, lengths)
    count, layers = workers or os.cpu_count() or 1, summary.frame.num_layers
    progress = _Progress(reporter, layers * (plan.chosen.size + (lengths.size if plan.scanned else 0)))
    ranges = _scan_all(plan, reader, every, count, progress)
    found = _measure(plan, reader, ranges, plan.chosen, count, progress)
    write_errors(private, found)
    _tell_left(found)
    return found


def measure_part(
    prepared: Prepared,
    workspace: Workspace,
    reporter: Reporter,
    sequences: range,
    whole: Path,
    *,
    workers: int | None = None,
) -> str:
    """Measure what is missing of some sequences of a study, and write it next to their summary; `ranges` or `errors`.

    whole: folder with the summary of the whole corpus, and with the ranges that it lacks, once all parts have measured them.
    Those ranges come first, where formats need any; the same call with them measures the errors. What is there already for
    the same `whole` is left as it is. Raises CaptureError where these sequences are not counted here or the summary is not
    of the whole corpus, SummaryMismatch where it is not of these sequences, CorruptCapture.
    """
    private, lengths = workspace.summary(prepared.capture_id, prepared.study_id), _lengths(prepared, workspace)
    plan = FormatPlan.of(prepared, read_summary(whole), lengths)
    _check_part(plan, read_summary(private), sequences, private, whole)
    chosen = plan.chosen[(plan.chosen >= sequences.start) & (plan.chosen < sequences.stop)]
    ranges = read_ranges(whole, plan) if plan.scanned else Ranges(plan, range(lengths.size))
    count, layers = workers or os.cpu_count() or 1, plan.summary.frame.num_layers
    reader = _Tiles.open(workspace.capture(prepared.capture_id), sequences, lengths)
    if ranges is None:
        here = read_ranges(private, plan)
        if here is None or here.sequences != tuple(sequences):
            progress = _Progress(reporter, layers * len(sequences))
            write_ranges(private, _scan_all(plan, reader, sequences, count, progress))
        return "ranges"
    if ranges.sequences != tuple(range(lengths.size)):
        raise CaptureError(f"the ranges in {whole} are of {len(ranges.sequences)} of {lengths.size} sequences")
    if not (has_errors(private) and read_part_errors(private, prepared).ranges == ranges.digest):
        found = _measure(plan, reader, ranges, chosen, count, _Progress(reporter, layers * chosen.size))
        write_errors(private, replace(found, ranges=ranges.digest))
        _tell_left(found)
    return "errors"


def _check_part(plan: FormatPlan, own: Summary, sequences: range, private: Path, whole: Path) -> None:
    """Raise CaptureError, SummaryMismatch as `measure_part`."""
    if plan.summary.sequences.size != plan.lengths.size:
        raise CaptureError(
            f"the summary in {whole} is of {plan.summary.sequences.size} of {plan.lengths.size} sequences, and the scales of "
            "formats need the range of all: merge the summaries of all parts first"
        )
    if tuple(own.sequences.tolist()) != tuple(sequences):
        raise CaptureError(
            f"the summary in {private} is of the sequences {format_ranges(own.sequences.tolist(), half_open=True)}, and not of "
            f"{sequences.start}:{sequences.stop}: analyze those first"
        )
    same = plan.summary.frame == own.frame and all(
        (corpus_range(own, site, layer) <= corpus_range(plan.summary, site, layer)).all()
        for site in own.frame.captured
        for layer in range(own.frame.num_layers)
    )
    if not same:
        raise SummaryMismatch(
            f"the summary in {whole} was not joined from the one in {private}, whose values are larger: merge the parts again"
        )


def _lengths(prepared: Prepared, workspace: Workspace) -> NDArray[np.int64]:
    return load_corpus(prepared.corpus, workspace).lengths.astype(np.int64)


def _scan_all(plan: FormatPlan, reader: _Tiles, sequences: range, workers: int, progress: _Progress) -> Ranges:
    """The ranges that the summary lacks, of some sequences; where it lacks none nothing is read."""
    ranges = Ranges(plan, sequences)
    layers = range(plan.summary.frame.num_layers)
    units = [(sequence, layer) for sequence in (sequences if plan.scanned else ()) for layer in layers]
    for (_, layer), largest in _each(units, lambda unit: _scan(reader, plan.scanned, *unit), workers, progress):
        ranges.raise_to(layer, largest)
    return ranges


def _measure(
    plan: FormatPlan, reader: _Tiles, ranges: Ranges, chosen: NDArray[np.int64], workers: int, progress: _Progress
) -> FormatErrors:
    """The errors of some sequences under the ranges of the whole corpus. chosen: their numbers, ascending."""
    jobs, found = _Jobs.of(plan, ranges), _empty(plan, chosen)
    units = [(int(sequence), layer) for sequence in chosen for layer in range(plan.summary.frame.num_layers)]
    at = {int(sequence): column for column, sequence in enumerate(chosen)}
    for (sequence, _), sums in _each(units, lambda unit: _errors(reader, jobs, *unit), workers, progress):
        for row, (tokens, squares, errors) in sums.items():
            found.tokens[row, at[sequence]] = tokens
            found.squares[row, at[sequence]] = squares
            found.errors[row, at[sequence]] = errors
    return found


def _tell_left(found: FormatErrors) -> None:
    left = int(found.lengths.sum()) - found.tokens.sum(axis=1)
    if left.any():
        log.warning("up to %d tokens have a value that is not finite: they are in no error of a format", left.max())


class _Progress:
    """Units done of all, in the words of the reporter."""

    def __init__(self, reporter: Reporter, units: int) -> None:
        self.reporter, self.units, self.done = reporter, units, 0

    def tell(self, more: int = 0) -> None:
        self.done += more
        self.reporter.progress(STEP, self.done, self.units, "layers")


def _each(
    units: Sequence[_Unit], work: Callable[[_Unit], _Found], workers: int, progress: _Progress
) -> Iterator[tuple[_Unit, _Found]]:
    """What `work` gives for each unit, in their order, by threads; few are in memory at once."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="formats")
    try:
        pending: deque[tuple[_Unit, Future[_Found]]] = deque()
        left: Iterable[_Unit] = iter(units)
        for unit in left:
            pending.append((unit, pool.submit(work, unit)))
            if len(pending) >= 2 * workers:
                yield _first(pending, progress)
        while pending:
            yield _first(pending, progress)
    finally:
        pool.shutdown(cancel_futures=True)


def _first(pending: deque[tuple[_Unit, Future[_Found]]], progress: _Progress) -> tuple[_Unit, _Found]:
    unit, future = pending.popleft()
    while not wait([future], timeout=PROGRESS_SECONDS).done:
        progress.tell()
    found = future.result()
    progress.tell(1)
    return unit, found


@dataclass(frozen=True)
class _Tile:
    """Some tokens of a unit at a site. values: (token, padded feature) float32. good: (token,) bool, which are measured."""

    values: NDArray[np.float32]
    good: NDArray[np.bool_]
    start: int
    measured: int


class _Tiles:
    """Reads the tiles of a capture, with their checksums."""

    def __init__(self, files: ChunkFiles, layout: Layout, lines: dict[int, dict[str, Any]], lengths: NDArray[np.int64]):
        self.files, self.layout, self.lines, self.lengths = files, layout, lines, lengths
        self._local = threading.local()

    @classmethod
    def open(cls, folder: Any, wanted: range, lengths: NDArray[np.int64]) -> _Tiles:
        layout = layout_of_capture(folder)
        lines = journal_lines(folder, wanted)
        if len(lines) < len(wanted):
            raise CaptureError(f"{folder} has {len(lines)} of {len(wanted)} sequences: extract again to finish it")
        return cls(ChunkFiles(folder, layout), layout, lines, lengths)

    def of(self, site: str, layer: int, sequence: int) -> Iterator[_Tile]:
        """The tiles of a unit at a site, in the order of positions; each is valid until the next. Raises CorruptCapture."""
        layout, tokens = self.layout, int(self.lengths[sequence])
        stored = layout.aliases.get(site, site)
        width, chunks = layout.widths[stored], layout.chunks_of(tokens)
        rows = min(layout.chunk_positions, max(4, TILE_BYTES // (4 * padded(width))))
        buffer = np.empty((rows, width), np.dtype(f"<u{layout.itemsize}"))
        values, good = np.empty((rows, padded(width)), np.float32), np.empty(rows, np.bool_)
        crcs, kind = self.lines[sequence]["crc32"][stored], _KINDS[layout.dtype]
        for chunk in range(chunks):
            at, stop = layout.span(chunk).start, min(layout.span(chunk).stop, tokens)
            for run in self.files.tiles(stored, layer, sequence, chunk, int(crcs[layer * chunks + chunk]), buffer):
                # after the tokens comes the padding of the sequence's last chunk, read for its checksum
                size = min(run.shape[0], max(0, stop - at))
                if size:
                    measured = kernels.open_tile(run[:size], kind, values[:size], good[:size])
                    yield _Tile(values[:size], good[:size], at, int(measured))
                at += run.shape[0]

    def scratch(self, site: str) -> NDArray[np.float32]:
        return np.empty((3, padded(self.layout.widths[site])), np.float32)


def _scan(
    reader: _Tiles, wanted: dict[Key, NDArray[np.float32]], sequence: int, layer: int
) -> dict[Key, NDArray[np.float32]]:
    """The largest magnitudes of one unit, by key."""
    found = {key: np.zeros(kept.size, np.float32) for key, kept in wanted.items()}
    for site in dict.fromkeys(key[0] for key in wanted):
        scratch, width = reader.scratch(site), reader.layout.widths[site]
        for tile in reader.of(site, layer, sequence):
            for key, kept in wanted.items():
                if key[0] == site:
                    first = int(key[3] != ALL and tile.start == 0)
                    block = key[1]
                    factor = np.float32(1 / math.sqrt(block) if block else 1)
                    where = (tile.values[first:], tile.good[first:], kept, width, block, factor)
                    kernels.raise_ranges(*where, scratch, found[key])
    return found


@dataclass(frozen=True)
class _Job:
    """One row: its number, its rule, and which features are quantized, as `kept_of`."""

    row: int
    rule: Rule
    kept: NDArray[np.float32]


class _Jobs:
    """The rows of the table, by layer and site; numbered as `FormatPlan.rows` orders them."""

    def __init__(self, rows: dict[tuple[int, str], list[_Job]]) -> None:
        self.by_place = rows

    @classmethod
    def of(cls, plan: FormatPlan, ranges: Ranges) -> _Jobs:
        found: dict[tuple[int, str], list[_Job]] = {}
        number = 0
        for site, variants in plan.sites.items():
            kept = {one.held_out: kept_of(one.held) for one in variants}
            for layer in range(plan.summary.frame.num_layers):
                jobs = found.setdefault((layer, site), [])
                for one in variants:
                    rule = Rule.of(one.format, one.held.size, ranges.at(site, layer, one))
                    jobs.append(_Job(number, rule, kept[one.held_out]))
                    number += 1
        return cls(found)


def _errors(reader: _Tiles, jobs: _Jobs, sequence: int, layer: int) -> dict[int, tuple[int, float, float]]:
    """Row -> measured tokens, sum of squares, sum of squared errors, of one unit."""
    found: dict[int, tuple[int, float, float]] = {}
    for site, width in reader.layout.widths.items():
        own, scratch = jobs.by_place[layer, site], reader.scratch(site)
        squares = np.zeros(padded(width))
        errors = np.zeros((len(own), padded(width)))
        tokens = 0
        for tile in reader.of(site, layer, sequence):
            tokens += tile.measured
            kernels.add_squares(tile.values, tile.good, squares)
            for number, job in enumerate(own):
                job.rule.add_errors(tile.values, tile.good, job.kept, width, scratch, errors[number])
        square = math.fsum(squares[:width].tolist())
        for number, job in enumerate(own):
            quantized = errors[number, :width][job.kept[:width] > 0]
            found[job.row] = (tokens, square, math.fsum(quantized.tolist()))
    return found


def _empty(plan: FormatPlan, chosen: NDArray[np.int64]) -> FormatErrors:
    """The sums before anything is measured."""
    rows = plan.rows()
    shape = (len(rows), chosen.size)
    return FormatErrors(
        study_id=plan.prepared.study_id,
        sequences=chosen,
        lengths=plan.lengths[chosen],
        rows=rows,
        tokens=np.zeros(shape, np.int64),
        squares=np.zeros(shape),
        errors=np.zeros(shape),
    )
