"""Adds tiles of values to shared totals, one span of a sequence at a time, in any order and from any number of threads.

A span is a run of positions of one sequence. The key of each of its tokens over all layers (the largest magnitude of each
feature, and where it is) is kept until every layer of the span is read; then the keys give the union counts and the largest
tokens. `block` is a site of its own: a cell is hit where attn_in or mlp_in is. Arithmetic and bookkeeping on arrays, nothing
of files. The loops are in `kernels`; `analyze` reads the tiles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.counting.bits import (
    FORMATS,
    PATTERNS,
    bits_to_float,
    float_to_bits,
    legacy_threshold_bits,
    threshold_bits,
)
from outliers.counting.kernels import compiled, hits, massive, spans, tile, totals
from outliers.counting.kernels.arguments import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    KEY_SHIFT,
    LAST_SOURCE,
    Counters,
    Found,
    Limits,
    Place,
    Positions,
    Scratch,
    SpanKeys,
    TileKeys,
    TopTokens,
    Union,
)
from outliers.counting.summary import (
    CELL,
    MASSIVE_KEPT,
    MASSIVE_MAGNITUDE,
    MASSIVE_RATIO,
    TOP_TOKENS,
    Frame,
    Summary,
    largest,
)
from outliers.spec import BLOCK, BLOCK_SITES, has_block

TILE_BYTES = 512 * 1024
"""Bytes of each site that are counted at once: two tiles and their counters stay in a core's own cache (docs/performance.md)."""
Tiles = Callable[[int], Iterator[dict[str, NDArray[Any]]]]
"""Layer (counted from 0 among the captured) -> runs of positions of a span, {site: (position, feature) bits}, one after the
other from its first position on. `Tally` may write to them."""


@dataclass
class LayerCounts:
    """What some layers of a span add to their sequence.

    layers: counted from 0 among the captured. hits: site -> (layer, W) int64 at the deciding magnitude. moments: site ->
    (4, layer, W) float64. reach: site -> (layer,) float32, largest finite magnitudes. hooks: (layer, 2, W) bool, whether
    attn_in and mlp_in had a hit by the legacy rule.
    """

    layers: range
    hits: dict[str, NDArray[np.int64]]
    moments: dict[str, NDArray[np.float64]]
    reach: dict[str, NDArray[np.float32]]
    hooks: NDArray[np.bool_]

    @classmethod
    def zero(cls, frame: Frame, layers: range) -> LayerCounts:
        return cls(
            layers=layers,
            hits={site: np.zeros((len(layers), frame.width(site)), np.int64) for site in frame.sites},
            moments={site: np.zeros((4, len(layers), width), np.float64) for site, width in frame.widths},
            reach={site: np.zeros(len(layers), np.float32) for site in frame.captured},
            hooks=np.zeros((len(layers), 2, frame.block_width), np.bool_),
        )


@dataclass
class Span:
    """Some positions of a sequence, and what is counted of them so far.

    marks: (kind, position) bool, see `Corpus.marks`. shares: calls of `Tally.count` that its layers are
    split into. keys: site -> (W, position), see `arguments.KEY_SHIFT`; touched: site -> (W,) bool, the features that have a
    key. Once closed, union: site -> (W,) int64, tokens with a hit in any layer; legacy_union: (W,) int64, the same by the
    legacy rule.
    """

    sequence: int
    start: int
    length: int
    marks: NDArray[np.bool_]
    shares: int = 1
    keys: dict[str, NDArray[Any]] = field(default_factory=dict)
    touched: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    union: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    legacy_union: NDArray[np.int64] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def join(self, keys: dict[str, NDArray[Any]], touched: dict[str, NDArray[np.bool_]]) -> bool:
        """Add the keys of one share; returns whether it was the last."""
        with self.lock:
            if not self.keys:
                self.keys, self.touched = keys, touched
            else:
                for site, mine in self.keys.items():
                    spans.join(mine, keys[site], np.flatnonzero(touched[site]))
                    self.touched[site] |= touched[site]
            self.shares -= 1
            return self.shares == 0


class Group:
    """The sites that are counted together (the two of the block, or one), and the arrays that a layer of them is counted in."""

    def __init__(self, frame: Frame, sites: tuple[str, ...], rows: int) -> None:
        form, width, steps = FORMATS[frame.dtype], frame.width(sites[0]), len(frame.ladder)
        signed = np.dtype(f"<i{form.bits.itemsize}")
        self.sites = sites
        self.reached = np.zeros((2, width), form.bits)
        """Bits of the largest magnitudes of the layer, by site and feature."""
        info = np.iinfo(signed)
        extremes = np.empty((2, 2, width), signed)
        extremes[:, 0], extremes[:, 1] = info.max, info.min
        self.counters = Counters(
            extremes=extremes,
            moments=np.zeros((2, 4, width), np.float64),
            histograms=np.zeros((2, PATTERNS), np.uint32),
            nonfinite=np.zeros((2, width), np.int64),
            hits=np.zeros((3, steps, width), np.uint32),
            first_hits=np.zeros((3, steps, width), np.uint32),
        )
        self.scratch = Scratch(
            tops=np.zeros((2, width), form.bits),
            floats=np.empty((tile.GROUP, width), np.float32),
            transposed=np.empty((2, hits.LANES, rows), form.bits),
        )


class Tally:
    """The totals of a Summary, filled by any number of threads: each may call `count`.

    begun: a Summary to go on with, which then has the bits of one that was never put down.
    """

    def __init__(self, frame: Frame, begun: Summary | None = None) -> None:
        self.frame = frame
        self.summary = Summary.zero(frame) if begun is None else begun
        self.limits = limits_of(frame)
        self._layers = [threading.Lock() for _ in range(frame.num_layers)]
        self._rest = threading.Lock()
        # no magnitude below these can enter a list that is full
        self._top_floors = np.zeros(frame.width(frame.site), np.int64)
        self._massive_floors = np.zeros(frame.num_layers, np.float64)
        self._massive_cells: list[list[NDArray[Any]]] = [[] for _ in range(frame.num_layers)]
        if begun is not None:
            self._raise_top_floors()
            for layer in np.unique(begun.massive["layer"]).tolist():
                self._keep_massive(layer, begun.massive[begun.massive["layer"] == layer])

    def count(self, span: Span, layers: range, tiles: Tiles, rows: int) -> LayerCounts:
        """Count some layers of a span; the last share of a span also closes it. rows: the most positions of a tile."""
        found = LayerCounts.zero(self.frame, layers)
        keys, touched = zero_keys(self.frame, span.length)
        groups = [Group(self.frame, sites, min(rows, span.length)) for sites in site_groups(self.frame.captured)]
        for layer in layers:
            at = 0
            for values in tiles(layer):
                for group in groups:
                    self.count_tile(group, span, layer, at, values, keys)
                at += next(iter(values.values())).shape[0]
            for group in groups:
                self.flush(group, span, layer, found, touched)
        if span.join(keys, touched):
            self.close(span)
        return found

    def count_tile(
        self,
        group: Group,
        span: Span,
        layer: int,
        at: int,
        values: dict[str, NDArray[Any]],
        keys: dict[str, NDArray[Any]],
    ) -> None:
        """Count one tile of the sites of a group. at: position of its first row in the span. values: may be written to."""
        captured = self.frame.captured
        tiles = tuple(values[site] for site in group.sites)
        tile_keys = TileKeys(
            keys=tuple(keys[site] for site in group.sites),
            sources=tuple(layer * len(captured) + captured.index(site) for site in group.sites),
            column=at,
            begins=span.start + at == 0,
        )
        reached = tile.count_tile(tiles, self.limits, group.counters, group.scratch, tile_keys)
        np.maximum(group.reached, group.scratch.tops, out=group.reached)
        # Sun's rule is a strict comparison; 100 is a value of every dtype here
        if group.sites == ("resid",) and reached > self.limits.massive:
            self._massive(span, layer, at, tiles[0])

    def flush(
        self, group: Group, span: Span, layer: int, found: LayerCounts, touched: dict[str, NDArray[np.bool_]]
    ) -> None:
        """Add the counters of a layer of the span to the totals, and empty them."""
        sites, number = self.summary.sites, layer - found.layers.start
        place = Place(layer, number, span.length, self.frame.deciding_step, self.limits.kind)
        with self._layers[layer]:
            if len(group.sites) == 2:
                totals.flush_block(place, group.counters, sites[BLOCK].arrays, found.hits[BLOCK])
            for index, site in enumerate(group.sites):
                own = Found(found.hits[site], found.moments[site])
                totals.flush(index, place, group.counters, sites[site].arrays, own)
        for index, site in enumerate(group.sites):
            found.reach[site][number] = bits_to_float(group.reached[index].max(), self.frame.dtype)
            touched[site] |= group.reached[index] >= self.limits.floor
        if len(group.sites) == 2:
            found.hooks[number] = group.reached >= self.limits.legacy
        group.reached.fill(0)

    def _massive(self, span: Span, layer: int, at: int, values: NDArray[Any]) -> None:
        """Values at resid whose magnitude exceeds 100, with the median magnitude of their token."""
        rows, columns, lower, upper = massive.above(values, self.limits.massive)
        self.add_massive(span.sequence, layer, (rows + at + span.start, columns), values[rows, columns], (lower, upper))

    def add_massive(
        self,
        sequence: int,
        layer: int,
        where: tuple[NDArray[np.int64], NDArray[np.int64]],
        bits: NDArray[Any],
        middle: tuple[NDArray[np.int64], NDArray[np.int64]],
    ) -> None:
        """Add values at resid whose magnitude exceeds 100.

        where: (n,) positions in the sequence, and features. bits: (n,), the values. middle: (n,) bits of the two middle
        magnitudes of the token of each.
        """
        dtype, total = self.frame.dtype, self.summary
        (positions, columns), (lower, upper) = where, middle
        medians = (bits_to_float(lower, dtype).astype(np.float64) + bits_to_float(upper, dtype)) / 2
        found = bits_to_float(bits, dtype)
        sizes = np.abs(found)
        with self._rest:
            total.massive_cells[layer] += bits.size
            total.massive_by_token[layer] += np.count_nonzero(sizes.astype(np.float64) >= MASSIVE_RATIO * medians)
        kept = np.flatnonzero(sizes >= self._massive_floors[layer])
        if kept.size > MASSIVE_KEPT:
            least = np.partition(sizes[kept], -MASSIVE_KEPT)[-MASSIVE_KEPT]
            kept = kept[sizes[kept] >= least]
        cells = np.zeros(kept.size, CELL)
        cells["feature"], cells["position"] = columns[kept], positions[kept]
        cells["sequence"], cells["layer"] = sequence, layer
        cells["site"] = self.frame.captured.index("resid")
        cells["value"], cells["magnitude"], cells["token_median"] = found[kept], sizes[kept], medians[kept]
        with self._rest:
            mine = self._massive_cells[layer]
            mine.append(cells)
            if sum(map(len, mine)) > 4 * MASSIVE_KEPT:
                self._keep_massive(layer, largest(np.concatenate(mine), "layer", MASSIVE_KEPT))

    def _keep_massive(self, layer: int, cells: NDArray[Any]) -> None:
        """Take the largest massive cells of a layer so far, largest first."""
        self._massive_cells[layer] = [cells]
        if cells.size == MASSIVE_KEPT:
            self._massive_floors[layer] = cells["magnitude"][-1]

    def finish(self) -> Summary:
        """The Summary, after the last call of `count`."""
        cells = [part for layer in self._massive_cells for part in layer]
        if cells:
            self.summary.massive = largest(np.concatenate(cells), "layer", MASSIVE_KEPT)
        return self.summary

    def close(self, span: Span) -> None:
        """Add what only all layers of the span together say: union counts, and where the deciding site's hits are."""
        frame = self.frame
        for site in frame.sites:
            members = BLOCK_SITES if site == BLOCK else (site,)
            touched = np.logical_or.reduce([span.touched[member] for member in members])
            keys = SpanKeys(span.keys[members[0]], span.keys[members[-1]], np.flatnonzero(touched))
            counts, firsts = (np.zeros((len(frame.ladder), frame.width(site)), np.int64) for _ in range(2))
            union = Union(counts, firsts, np.zeros((2, frame.width(site)), np.int64))
            spans.count_union(keys, self.limits, span.start == 0, union)
            span.union[site] = union.own[0]
            if site == BLOCK:
                span.legacy_union = union.own[1]
            with self._rest:
                self.summary.sites[site].union += union.hits
                self.summary.sites[site].first_union += union.first_hits
            if site == frame.site:
                self._find_tokens(span, keys, union.first_hits[frame.deciding_step])
        span.keys = {}

    def _find_tokens(self, span: Span, keys: SpanKeys, firsts: NDArray[np.int64]) -> None:
        """Add the positions, the delimiters and the largest tokens of the deciding site in this span.

        firsts: (W,) int64, whether the first token of the sequence has a hit.
        """
        total, width = self.summary, self.frame.width(self.frame.site)
        positions = Positions(
            start=span.start,
            bin_positions=self.frame.bin_positions,
            marks=span.marks,
            bins=np.zeros_like(total.position_tokens),
            marked=np.zeros((len(span.marks), width), np.int64),
        )
        shape = (keys.columns.size, TOP_TOKENS)
        top = TopTokens(self._top_floors, np.empty(shape, np.int64), np.empty(shape, keys.one.dtype))
        spans.find_top_tokens(keys, self.limits, positions, top)
        cells = cells_of(self.frame, span.sequence, span.start, keys.columns, top)
        self.add_tokens(positions.bins, positions.marked, firsts, cells)

    def add_tokens(
        self, bins: NDArray[np.int64], marked: NDArray[np.int64], firsts: NDArray[np.int64], cells: NDArray[Any]
    ) -> None:
        """Add where tokens of the deciding site with a hit are, as `arguments.Positions` has it, and the largest ones as CELL."""
        total = self.summary
        with self._rest:
            total.position_tokens += bins
            total.delimiter_tokens += marked[0]
            total.special_tokens += marked[1]
            if total.kind_tokens is not None:
                total.kind_tokens += marked[2:]
            total.first_tokens += firsts
            if not cells.size:
                return
            total.top = largest(np.concatenate([total.top, cells]), "feature", TOP_TOKENS)
            self._raise_top_floors()

    def _raise_top_floors(self) -> None:
        """No smaller magnitude enters the list of a feature that is full."""
        top = self.summary.top
        last = np.flatnonzero(np.r_[top["feature"][1:] != top["feature"][:-1], True]) if top.size else np.zeros(0, int)
        full = last[np.diff(np.r_[-1, last]) == TOP_TOKENS]
        self._top_floors[top["feature"][full]] = float_to_bits(top["magnitude"][full], self.frame.dtype)


def cells_of(frame: Frame, sequence: int, start: int, features: NDArray[np.int64], top: TopTokens) -> NDArray[Any]:
    """The largest tokens of a span as CELL. start: position of its column 0. features: (n,) int64, those of the rows of `top`."""
    number, slot = np.nonzero(top.columns >= 0)
    cells = np.zeros(number.size, CELL)
    key = top.keys[number, slot].astype(np.uint64)
    magnitude, sign = key >> np.uint64(KEY_SHIFT), key & np.uint64(1)
    source = LAST_SOURCE - ((key >> np.uint64(1)) & np.uint64(LAST_SOURCE)).astype(np.int64)
    cells["feature"], cells["sequence"] = features[number], sequence
    cells["position"] = top.columns[number, slot] + start
    cells["layer"], cells["site"] = np.divmod(source, len(frame.captured))
    cells["magnitude"] = bits_to_float(magnitude, frame.dtype)
    cells["value"] = np.where(sign == 1, -cells["magnitude"], cells["magnitude"])
    return cells


def zero_keys(frame: Frame, length: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[np.bool_]]]:
    """The keys of a span before anything is counted, and which features have one: see `Span`."""
    kind = np.dtype(f"<u{2 * FORMATS[frame.dtype].bits.itemsize}")
    keys = {site: np.zeros((width, length), kind) for site, width in frame.widths}
    return keys, {site: np.zeros(width, np.bool_) for site, width in frame.widths}


def limits_of(frame: Frame) -> Limits:
    """The bits of every magnitude of a frame, in its dtype."""
    ladder = [threshold_bits(magnitude, frame.dtype) for magnitude in frame.ladder]
    legacy = legacy_threshold_bits(frame.magnitude, frame.dtype)
    return Limits(
        kind={"bfloat16": BFLOAT16, "float16": FLOAT16, "float32": FLOAT32}[frame.dtype],
        infinity=FORMATS[frame.dtype].inf,
        ladder=np.array(ladder, np.int64),
        floor=min(ladder[0], legacy),
        deciding=threshold_bits(frame.magnitude, frame.dtype),
        legacy=legacy,
        massive=threshold_bits(MASSIVE_MAGNITUDE, frame.dtype),
    )


def is_compiled() -> bool:
    """Whether the loops were compiled on this machine before; numba caches them next to the program, or where it can write."""
    return compiled.is_cached(tile.COMPILED)


def site_groups(captured: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The captured sites in groups that are counted together: the two of the block, and each other one alone."""
    pair = tuple(BLOCK_SITES) if has_block(captured) else ()
    return [*([pair] if pair else []), *((site,) for site in captured if site not in pair)]
