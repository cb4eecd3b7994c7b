"""One sequence, block by block -> a Summary and the sequence's own counts.

Arithmetic on arrays, and nothing of files: `analyze` reads the blocks, `summary` says what the totals mean.
`block` is a site of its own: its magnitude is the larger of attn_in's and mlp_in's in each cell, so that its hits are
the logical or.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.bits import (
    PATTERNS,
    bits_to_float,
    histogram_patterns,
    legacy_threshold_bits,
    magnitudes,
    threshold_bits,
    to_float32,
)
from outliers.spec import BLOCK, BLOCK_SITES, has_block
from outliers.summary import (
    CELL,
    MASSIVE_KEPT,
    MASSIVE_MAGNITUDE,
    TOP_TOKENS,
    Frame,
    SiteTotals,
    Summary,
    largest,
)

TILE = 256
"""Rows computed at once: 256 x 2048 of float64 are 4 MB, so temporaries do not grow with a chunk. Not tuned."""


@dataclass
class SequenceCounts:
    """One sequence's counts at the deciding magnitude.

    hits: site -> (L, W) int64. union: site -> (W,) int64. hooks: (W,) int64, hooks of both block sites with a hit by
    the legacy rule; legacy_union: (W,) int64, tokens with such a hit. tokens: of the sequence.
    """

    sequence: int
    tokens: int
    hits: dict[str, NDArray[np.int64]]
    union: dict[str, NDArray[np.int64]]
    hooks: NDArray[np.int64]
    legacy_union: NDArray[np.int64]


@dataclass
class Thresholds:
    """Bits of every magnitude of a frame in its dtype."""

    ladder: tuple[int, ...]
    deciding: int
    legacy: int
    massive: int

    @classmethod
    def of(cls, frame: Frame) -> Thresholds:
        return cls(
            ladder=tuple(threshold_bits(m, frame.dtype) for m in frame.ladder),
            deciding=threshold_bits(frame.magnitude, frame.dtype),
            legacy=legacy_threshold_bits(frame.magnitude, frame.dtype),
            massive=threshold_bits(MASSIVE_MAGNITUDE, frame.dtype),
        )


@dataclass
class _Span:
    """Running maxima over the layers of one span of positions. Arrays are (position, feature)."""

    peak: dict[str, NDArray[Any]] = field(default_factory=dict)
    source: NDArray[np.int32] | None = None
    value: NDArray[Any] | None = None


class SequenceAccumulator:
    """Adds the blocks of one sequence to a Summary; each span of positions is one `span`, all layers and sites in it."""

    def __init__(self, summary: Summary, sequence: int, delimiters: NDArray[np.bool_]) -> None:
        frame = summary.frame
        self.summary, self.frame, self.sequence = summary, frame, sequence
        self.delimiters = delimiters
        self.limits = Thresholds.of(frame)
        self.tokens = 0
        self.hits = {site: np.zeros((frame.num_layers, frame.width(site)), np.int64) for site in frame.sites}
        self.union = {site: np.zeros(frame.width(site), np.int64) for site in frame.sites}
        block = has_block(frame.captured)
        self.hooks = np.zeros((2 * frame.num_layers if block else 0, frame.width(BLOCK) if block else 0), np.bool_)
        self.legacy_union = np.zeros(self.hooks.shape[1], np.int64)

    def span(self, start: int, layers: Any) -> None:
        """Add one span of positions from `start`; `layers` yields, for each layer, {site: values (position, feature)}."""
        span = _Span()
        length = 0
        for layer, values in enumerate(layers):
            length = next(iter(values.values())).shape[0]
            self._layer(span, layer, start, values)
        self.tokens += length
        self._close(span, start, length)

    def finish(self) -> SequenceCounts:
        """Record the sequence in the Summary, and give its own counts."""
        total = self.summary
        total.sequences = np.sort(np.append(total.sequences, self.sequence))
        total.tokens += self.tokens
        return SequenceCounts(
            sequence=self.sequence,
            tokens=self.tokens,
            hits=self.hits,
            union=self.union,
            hooks=self.hooks.sum(axis=0, dtype=np.int64),
            legacy_union=self.legacy_union,
        )

    def _layer(self, span: _Span, layer: int, start: int, values: dict[str, NDArray[Any]]) -> None:
        frame = self.frame
        mags: dict[str, NDArray[Any]] = {}
        for site in frame.captured:
            mags[site], wild = magnitudes(values[site], frame.dtype)
            totals = self.summary.sites[site]
            totals.nonfinite[layer] += wild
            _add_values(totals, layer, values[site], frame.dtype, wild > 0)
            if site == "resid":
                self._candidates(layer, start, values[site], mags[site])
        if has_block(frame.captured):
            mags[BLOCK] = np.maximum(mags["attn_in"], mags["mlp_in"])
            block, parts = self.summary.sites[BLOCK], [self.summary.sites[site] for site in BLOCK_SITES]
            block.max[layer] = np.maximum(block.max[layer], np.maximum(parts[0].max[layer], parts[1].max[layer]))
            block.min[layer] = np.minimum(block.min[layer], np.minimum(parts[0].min[layer], parts[1].min[layer]))
            for number, site in enumerate(BLOCK_SITES):
                self.hooks[2 * layer + number] |= mags[site].max(axis=0) >= self.limits.legacy
        for site, mag in mags.items():
            self._count(site, layer, start, mag)
        self._trace(span, layer, values, mags)
        for site, mag in mags.items():
            span.peak[site] = np.maximum(span.peak[site], mag) if site in span.peak else mag

    def _count(self, site: str, layer: int, start: int, mag: NDArray[Any]) -> None:
        totals = self.summary.sites[site]
        top = int(mag.max())
        for step, limit in enumerate(self.limits.ladder):
            if top < limit:
                break  # the ladder ascends: nothing above is hit either
            count = np.count_nonzero(mag >= limit, axis=0)
            totals.ladder_hits[step, layer] += count
            if step == self.frame.deciding_step:
                self.hits[site][layer] += count
        if start == 0:
            totals.first_token_hits[layer] += mag[0] >= self.limits.deciding

    def _trace(self, span: _Span, layer: int, values: dict[str, NDArray[Any]], mags: dict[str, NDArray[Any]]) -> None:
        """Remember, for each hit of the deciding site, the layer and value of the token's largest magnitude so far."""
        site = self.frame.site
        mag = mags[site]
        if span.source is None:
            span.source, span.value = np.full(mag.shape, -1, np.int32), np.zeros(mag.shape, values_dtype(values))
        where = np.flatnonzero(mag >= self.limits.deciding)
        if site in span.peak:
            where = where[mag.flat[where] > span.peak[site].flat[where]]
        if not where.size or span.value is None:
            return
        members = BLOCK_SITES if site == BLOCK else (site,)
        names = self.frame.captured
        chosen = np.full(where.size, names.index(members[0]), np.int32)
        bits = values[members[0]].flat[where]
        for other in members[1:]:
            larger = mags[other].flat[where] > mags[members[0]].flat[where]
            chosen[larger] = names.index(other)
            bits = np.where(larger, values[other].flat[where], bits)
        span.source.flat[where] = layer * len(names) + chosen
        span.value.flat[where] = bits

    def _candidates(self, layer: int, start: int, values: NDArray[Any], mag: NDArray[Any]) -> None:
        """Cells at resid whose magnitude exceeds 100, with the median magnitude of their token."""
        # Sun's rule is a strict comparison; 100 is a value of every dtype here
        over = np.flatnonzero(mag > self.limits.massive)
        self.summary.massive_cells[layer] += over.size
        if not over.size:
            return
        rows, columns = np.divmod(over, mag.shape[1])
        named, back = np.unique(rows, return_inverse=True)
        medians = np.median(bits_to_float(mag[named], self.frame.dtype).astype(np.float64), axis=1)
        cells = np.zeros(over.size, CELL)
        cells["feature"], cells["sequence"], cells["position"] = columns, self.sequence, rows + start
        cells["layer"], cells["site"] = layer, self.frame.captured.index("resid")
        cells["value"] = to_float32(values.flat[over], self.frame.dtype)
        cells["magnitude"] = np.abs(cells["value"])
        cells["token_median"] = medians[back]
        self.summary.massive = largest(np.concatenate([self.summary.massive, cells]), "layer", MASSIVE_KEPT)

    def _close(self, span: _Span, start: int, length: int) -> None:
        for site, peak in span.peak.items():
            totals = self.summary.sites[site]
            for step, limit in enumerate(self.limits.ladder):
                totals.union[step] += np.count_nonzero(peak >= limit, axis=0)
            self.union[site] += np.count_nonzero(peak >= self.limits.deciding, axis=0)
        if self.legacy_union.size:
            self.legacy_union += np.count_nonzero(span.peak[BLOCK] >= self.limits.legacy, axis=0)
        self._where(span, start, length)

    def _where(self, span: _Span, start: int, length: int) -> None:
        """Positions, delimiters and the largest tokens of the deciding site in this span."""
        hit = span.peak[self.frame.site] >= self.limits.deciding  # (position, feature)
        rows, columns = np.nonzero(hit)
        if not rows.size or span.source is None or span.value is None:
            return
        total = self.summary
        np.add.at(total.position_tokens, ((rows + start) // self.frame.bin_positions, columns), 1)
        np.add.at(total.delimiter_tokens, columns[self.delimiters[start : start + length][rows]], 1)
        if start == 0:
            total.first_tokens += hit[0]
        if rows.size > TOP_TOKENS * hit.shape[1]:
            # many hits: only what reaches its feature's TOP_TOKENS-th largest can stay
            peak = span.peak[self.frame.site]
            least = np.partition(peak, -min(TOP_TOKENS, length), axis=0)[-min(TOP_TOKENS, length)]
            rows, columns = np.nonzero(hit & (peak >= least))
        source = span.source[rows, columns]
        cells = np.zeros(rows.size, CELL)
        cells["feature"], cells["sequence"], cells["position"] = columns, self.sequence, rows + start
        cells["layer"], cells["site"] = np.divmod(source, len(self.frame.captured))
        cells["value"] = to_float32(span.value[rows, columns], self.frame.dtype)
        cells["magnitude"] = np.abs(cells["value"])
        total.top = largest(np.concatenate([total.top, cells]), "feature", TOP_TOKENS)


def values_dtype(values: dict[str, NDArray[Any]]) -> np.dtype[Any]:
    """The storage dtype of a block of values."""
    return next(iter(values.values())).dtype


def _add_values(totals: SiteTotals, layer: int, values: NDArray[Any], dtype: str, wild: bool) -> None:
    """Extremes, moments and histogram of one chunk (position, feature); non-finite values enter none of them."""
    for at in range(0, values.shape[0], TILE):
        tile = values[at : at + TILE]
        single = to_float32(tile, dtype)
        finite = np.isfinite(single) if wild else None
        # adding 0.0 turns -0.0 into 0.0: which of the two a maximum keeps depends on the order
        high = (single if finite is None else np.where(finite, single, -np.inf)).max(axis=0) + np.float32(0)
        low = (single if finite is None else np.where(finite, single, np.inf)).min(axis=0) + np.float32(0)
        totals.max[layer] = np.maximum(totals.max[layer], high)
        totals.min[layer] = np.minimum(totals.min[layer], low)
        double = single.astype(np.float64)
        totals.finite[layer] += tile.shape[0] if finite is None else np.count_nonzero(finite, axis=0)
        if finite is not None:
            double[~finite] = 0.0
        square = double * double
        totals.moments[0, layer] += double.sum(axis=0)
        totals.moments[1, layer] += square.sum(axis=0)
        totals.moments[2, layer] += np.einsum("tw,tw->w", square, double)
        totals.moments[3, layer] += np.einsum("tw,tw->w", square, square)
        patterns = histogram_patterns(tile, dtype)
        if finite is not None:
            patterns = patterns[finite]
        totals.histogram[layer] += np.bincount(patterns.ravel(), minlength=PATTERNS)
