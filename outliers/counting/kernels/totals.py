"""Compiled loops that add one layer's counters to the totals, and empty them for the next layer in the same pass.

Integers and extremes are added to arrays that all threads share, under a lock that the caller holds. Float sums are copied:
the caller adds them in a fixed order. Knows arrays, nothing of tiles.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from outliers.counting.kernels.arguments import BFLOAT16, FLOAT32, Counters, Found, Place, Totals
from outliers.counting.kernels.compiled import compiled


def flush(s: int, place: Place, counters: Counters, totals: Totals, found: Found) -> None:
    """Add the counters of site `s` of a group, 0 or 1, to the totals, and empty them.

    totals: of the site, added to. found: its row `place.row` takes the hits at the deciding magnitude and the moments.
    """
    _flush(s, tuple(place), tuple(counters), tuple(totals), tuple(found))


@compiled
def _flush(s, place, counters, totals, found):
    place, counters, totals, found = Place(*place), Counters(*counters), Totals(*totals), Found(*found)
    layer, extremes, nonfinite, moments = place.layer, counters.extremes[s], counters.nonfinite[s], counters.moments[s]
    _flush_histogram(counters.histograms[s], totals.histogram[layer])
    for j in range(nonfinite.size):
        totals.finite[layer, j] += place.tokens - nonfinite[j]
        totals.nonfinite[layer] += nonfinite[j]
        nonfinite[j] = 0
    for power in range(4):
        for j in range(nonfinite.size):
            found.moments[power, place.row, j] = moments[power, j]
            moments[power, j] = 0
    _flush_extremes(extremes, place, totals)
    _flush_hits(counters.hits[s], counters.first_hits[s], place, totals, found.hits)
    for j in range(nonfinite.size):
        extremes[0, j] = np.iinfo(extremes.dtype).max
        extremes[1, j] = np.iinfo(extremes.dtype).min


def flush_block(place: Place, counters: Counters, totals: Totals, hits: NDArray[np.int64]) -> None:
    """Add to the totals of the block, before its two sites are flushed: a cell is hit where either site is, and counts once.

    hits: (row, W) int64, whose row `place.row` takes the hits at the deciding magnitude. Empties the third of `counters.hits`
    and `counters.first_hits`.
    """
    _flush_block(tuple(place), tuple(counters), tuple(totals), hits)


@compiled
def _flush_block(place, counters, totals, hits):
    place, counters, totals = Place(*place), Counters(*counters), Totals(*totals)
    counts, firsts = counters.hits, counters.first_hits
    for k in range(counts.shape[1]):
        for j in range(counts.shape[2]):
            counts[2, k, j] = counts[0, k, j] + counts[1, k, j] - counts[2, k, j]
            firsts[2, k, j] = firsts[0, k, j] + firsts[1, k, j] - firsts[2, k, j]
    for s in range(2):
        _flush_extremes(counters.extremes[s], place, totals)
    _flush_hits(counts[2], firsts[2], place, totals, hits)


@compiled
def _flush_hits(counts, firsts, place, totals, hits):
    for j in range(counts.shape[1]):
        hits[place.row, j] = counts[place.step, j]
    for k in range(counts.shape[0]):
        for j in range(counts.shape[1]):
            totals.hits[k, place.layer, j] += counts[k, j]
            totals.first_hits[k, place.layer, j] += firsts[k, j]
            counts[k, j] = 0
            firsts[k, j] = 0


@compiled
def _flush_extremes(extremes, place, totals):
    least, greatest = totals.min[place.layer], totals.max[place.layer]
    for j in range(least.size):
        if extremes[0, j] <= extremes[1, j]:
            least[j] = min(least[j], _value(extremes[0, j], place.kind))
            greatest[j] = max(greatest[j], _value(extremes[1, j], place.kind))


@compiled
def _value(ordered, kind):
    """The value of a `tile._ordered` integer, as float32."""
    mask = 0x7FFFFFFF if kind == FLOAT32 else 0x7FFF
    magnitude = np.int64(ordered) if ordered >= 0 else (np.int64(ordered) ^ mask) & mask
    if kind == FLOAT32:
        value = np.uint32(magnitude).view(np.float32)
    elif kind == BFLOAT16:
        value = np.uint32(magnitude << 16).view(np.float32)
    else:
        value = np.uint32(magnitude << 13).view(np.float32) * np.float32(2.0**112)
    # -0.0 becomes 0.0: which of the two is the least or the greatest would depend on the order of the values
    return -value if ordered < 0 and magnitude != 0 else value


@compiled
def _flush_histogram(histogram, total):
    """Add a histogram to a total, (65536,) int64, and empty it; few patterns are used, the others are only read."""
    pairs = histogram.view(np.uint64)
    for n in range(0, pairs.size, 4):
        if pairs[n] | pairs[n + 1] | pairs[n + 2] | pairs[n + 3]:
            for i in range(2 * n, 2 * n + 8):
                total[i] += histogram[i]
                histogram[i] = 0
