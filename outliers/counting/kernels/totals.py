"""One layer's counts into the totals, compiled: added, and emptied for the next layer in the same pass.

Integers and extremes are added to what all threads share, under a lock that the caller holds; float sums are handed over as they
are. Knows arrays, nothing of tiles. Before it: `kernels` and `kernel_hits`, which filled the counts. After it: `summary`.
"""

from __future__ import annotations

import numpy as np

from outliers.counting.kernels.compiled import BFLOAT16, FLOAT32, compiled


@compiled
def settle(layer, number, step, length, kind, extremes, wild, histogram, moments, counts, firsts, totals, hits, sums):
    """Add what was counted of one layer of a span at one site to the totals, and empty it.

    length: tokens of the span. extremes: (2, feature), see `take`, as wild, histogram, moments, counts and firsts are. totals:
    the arrays of `summary.SiteTotals`, (hits, first_hits, min, max, finite, nonfinite, histogram). hits: (layer, feature)
    int64, row `number` of which takes the counts at the deciding `step`; sums: (4, layer, feature) takes the moments.
    """
    all_hits, all_firsts, least, greatest, finite, nonfinite, patterns = totals
    _pour(histogram, patterns[layer])
    for j in range(wild.size):
        finite[layer, j] += length - wild[j]
        nonfinite[layer] += wild[j]
        wild[j] = 0
    for power in range(4):
        for j in range(wild.size):
            sums[power, number, j] = moments[power, j]
            moments[power, j] = 0
    _settle_extremes(extremes, kind, least[layer], greatest[layer])
    _settle_hits(layer, number, step, counts, firsts, all_hits, all_firsts, hits)
    for j in range(wild.size):
        extremes[0, j] = np.iinfo(extremes.dtype).max
        extremes[1, j] = np.iinfo(extremes.dtype).min


@compiled
def settle_block(layer, number, step, kind, extremes, counts, firsts, totals, hits):
    """The same for the block, before its two sites: a cell is hit where either is, and not twice where both are."""
    all_hits, all_firsts, least, greatest = totals
    for k in range(counts.shape[1]):
        for j in range(counts.shape[2]):
            counts[2, k, j] = counts[0, k, j] + counts[1, k, j] - counts[2, k, j]
            firsts[2, k, j] = firsts[0, k, j] + firsts[1, k, j] - firsts[2, k, j]
    for s in range(2):
        _settle_extremes(extremes[s], kind, least[layer], greatest[layer])
    _settle_hits(layer, number, step, counts[2], firsts[2], all_hits, all_firsts, hits)


@compiled
def _settle_hits(layer, number, step, counts, firsts, all_hits, all_firsts, hits):
    for j in range(counts.shape[1]):
        hits[number, j] = counts[step, j]
    for k in range(counts.shape[0]):
        for j in range(counts.shape[1]):
            all_hits[k, layer, j] += counts[k, j]
            all_firsts[k, layer, j] += firsts[k, j]
            counts[k, j] = 0
            firsts[k, j] = 0


@compiled
def _settle_extremes(extremes, kind, least, greatest):
    for j in range(least.size):
        if extremes[0, j] <= extremes[1, j]:
            least[j] = min(least[j], _value(extremes[0, j], kind))
            greatest[j] = max(greatest[j], _value(extremes[1, j], kind))


@compiled
def _value(ordered, kind):
    """The number behind an `_ordered` integer, as float32."""
    mask = 0x7FFFFFFF if kind == FLOAT32 else 0x7FFF
    magnitude = np.int64(ordered) if ordered >= 0 else (np.int64(ordered) ^ mask) & mask
    if kind == FLOAT32:
        value = np.uint32(magnitude).view(np.float32)
    elif kind == BFLOAT16:
        value = np.uint32(magnitude << 16).view(np.float32)
    else:
        value = np.uint32(magnitude << 13).view(np.float32) * np.float32(2.0**112)
    # 0.0 and -0.0 become 0.0: which of the two is the least or the greatest would depend on the order
    return -value if ordered < 0 and magnitude != 0 else value


@compiled
def _pour(histogram, total):
    """Add a histogram to a total, (65536,) int64, and empty it; few patterns are used, and the rest is only looked at."""
    pairs = histogram.view(np.uint64)
    for n in range(0, pairs.size, 4):
        if pairs[n] | pairs[n + 1] | pairs[n + 2] | pairs[n + 3]:
            for i in range(2 * n, 2 * n + 8):
                total[i] += histogram[i]
                histogram[i] = 0
