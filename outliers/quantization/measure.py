"""A finished capture and its summary -> the errors of number formats beside the summary; the model is never loaded.

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
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from outliers.corpus.tokens import load_corpus
from outliers.counting.analyze import journal_lines, layout_of_capture
from outliers.counting.summary import Summary
from outliers.counting.summary_files import read_summary
from outliers.errors import CaptureError
from outliers.events.stream import Reporter
from outliers.quantization.kernels import tile as kernels
from outliers.quantization.rules import Rule, padded
from outliers.quantization.variants import ALL, Variant, corpus_range, spread_evenly, variants_at
from outliers.results.format_errors import FormatErrors, Measured, write_errors
from outliers.store.chunks import ChunkFiles
from outliers.study.layout import Layout
from outliers.study.prepare import Prepared
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
    """Measure the errors of a study's formats, and write them beside its summary.

    Raises CaptureError where the summary is not there or not of the whole corpus, CorruptCapture where bytes changed.
    """
    folder = workspace.capture(prepared.capture_id)
    private = workspace.summary(prepared.capture_id, prepared.study_id)
    summary, lengths = read_summary(private), load_corpus(prepared.corpus, workspace).lengths.astype(np.int64)
    if summary.sequences.size != lengths.size:
        raise CaptureError(
            f"the summary in {private} is of {summary.sequences.size} of {lengths.size} sequences, and the scales of formats "
            "need the range of all: analyze the whole capture"
        )
    sites = {site: variants_at(prepared, summary, site) for site in summary.frame.captured}
    chosen = spread_evenly(lengths, prepared.spec.formats.format_tokens)
    reader = _Tiles.open(folder, range(lengths.size), lengths)
    count, layers = workers or os.cpu_count() or 1, summary.frame.num_layers
    scanned = [(site, one) for site, own in sites.items() for one in own if one.scans]
    whole = [(sequence, layer) for sequence in range(lengths.size if scanned else 0) for layer in range(layers)]
    sample = [(int(sequence), layer) for sequence in chosen for layer in range(layers)]
    progress = _Progress(reporter, len(whole) + len(sample))
    ranges = _Ranges.of(summary, scanned)
    for (_, layer), largest in _each(whole, lambda unit: _scan(reader, ranges.scanned, *unit), count, progress):
        ranges.raise_to(layer, largest)
    jobs = _Jobs.of(summary, sites, ranges)
    found = _empty(prepared, jobs, chosen, lengths)
    at = {int(sequence): column for column, sequence in enumerate(chosen)}
    for (sequence, _), sums in _each(sample, lambda unit: _errors(reader, jobs, *unit), count, progress):
        for row, (tokens, squares, errors) in sums.items():
            found.tokens[row, at[sequence]] = tokens
            found.squares[row, at[sequence]] = squares
            found.errors[row, at[sequence]] = errors
    write_errors(private, found)
    left = int(found.lengths.sum()) - found.tokens.sum(axis=1)
    if left.any():
        log.warning("up to %d tokens have a value that is not finite: they are in no error of a format", left.max())
    return found


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


def _kept(held: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(padded feature,) float32: 0 where a feature is held out, else 1."""
    found = np.ones(padded(held.size), np.float32)
    found[: held.size][held] = 0
    return found


class _Ranges:
    """The largest magnitudes of static formats: (site, layer, variant) -> (feature,) float32.

    scanned: what the summary lacks, (site, rotation, held_out, range) -> the mask of held features as `_kept`.
    """

    def __init__(self, summary: Summary, scanned: dict[tuple[str, int, int, str], NDArray[np.float32]]) -> None:
        self.summary, self.scanned = summary, scanned
        layers = summary.frame.num_layers
        self.largest = {key: np.zeros((layers, kept.size), np.float32) for key, kept in scanned.items()}

    @classmethod
    def of(cls, summary: Summary, scanned: list[tuple[str, Variant]]) -> _Ranges:
        return cls(summary, {_key(site, one): _kept(one.held) for site, one in scanned})

    def raise_to(self, layer: int, largest: dict[tuple[str, int, int, str], NDArray[np.float32]]) -> None:
        for key, found in largest.items():
            np.maximum(self.largest[key][layer], found, out=self.largest[key][layer])

    def at(self, site: str, layer: int, one: Variant) -> NDArray[np.float32] | None:
        """(feature,) float32; None for a format that needs none."""
        if one.range is None:
            return None
        if one.scans:
            return self.largest[_key(site, one)][layer, : one.held.size]
        found = corpus_range(self.summary, site, layer)
        found[one.held] = 0
        return found


def _key(site: str, one: Variant) -> tuple[str, int, int, str]:
    return site, one.format.rotation, one.held_out, one.range or ALL


def _scan(
    reader: _Tiles, wanted: dict[tuple[str, int, int, str], NDArray[np.float32]], sequence: int, layer: int
) -> dict[tuple[str, int, int, str], NDArray[np.float32]]:
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
    """One row: what it is of, its rule, and which features are quantized, as `_kept`."""

    row: int
    of: Measured
    rule: Rule
    kept: NDArray[np.float32]


class _Jobs:
    """The rows of the table, in its order, and by layer and site."""

    def __init__(self, rows: dict[tuple[int, str], list[_Job]]) -> None:
        self.by_place = rows

    @classmethod
    def of(cls, summary: Summary, sites: dict[str, tuple[Variant, ...]], ranges: _Ranges) -> _Jobs:
        found: dict[tuple[int, str], list[_Job]] = {}
        number = 0
        for site, variants in sites.items():
            kept = {one.held_out: _kept(one.held) for one in variants}
            for layer in range(summary.frame.num_layers):
                jobs = found.setdefault((layer, site), [])
                for one in variants:
                    rule = Rule.of(one.format, one.held.size, ranges.at(site, layer, one))
                    of = Measured(site, layer, one.format.name, one.held_out, one.range)
                    jobs.append(_Job(number, of, rule, kept[one.held_out]))
                    number += 1
        return cls(found)

    def rows(self) -> list[Measured]:
        return [
            job.of for job in sorted((job for own in self.by_place.values() for job in own), key=lambda job: job.row)
        ]


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


def _empty(prepared: Prepared, jobs: _Jobs, chosen: NDArray[np.int64], lengths: NDArray[np.int64]) -> FormatErrors:
    """The sums before anything is measured; layers have their own numbers."""
    rows = tuple(Measured(of.site, prepared.layers[of.layer], of.format, of.held_out, of.range) for of in jobs.rows())
    shape = (len(rows), chosen.size)
    return FormatErrors(
        study_id=prepared.study_id,
        sequences=chosen,
        lengths=lengths[chosen],
        rows=rows,
        tokens=np.zeros(shape, np.int64),
        squares=np.zeros(shape),
        errors=np.zeros(shape),
    )
