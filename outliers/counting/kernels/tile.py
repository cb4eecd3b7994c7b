"""The inner loops of counting, compiled: a tile of values -> all that is counted of it, while it is in the cache.

A tile is some tokens of one layer at one site as they are stored, (row, feature): bits of bfloat16 and float16 in uint16, of
float32 in uint32. The loops release the GIL. Counts are exact; float sums run down a column in the order of its rows and are
not reassociated (no fastmath), so that no number depends on how wide a processor's registers are.
docs/performance.md says why numba compiles this: numpy and torch take a pass over memory for each statistic.
Extremes, moments and histogram are here, hits in `kernel_hits`. Knows arrays, nothing of sequences or files.
Before it: `bits`. After it: `kernel_totals`, which empties what was counted, and `accumulate`, which calls both.
"""

from __future__ import annotations

import numpy as np

from outliers.counting.kernels.compiled import BFLOAT16, FLOAT32, compiled
from outliers.counting.kernels.hits import hits

GROUP = 4
"""Rows taken together: a column's sums stay in registers while they are added."""


@compiled
def take(tiles, kind, infinity, extremes, tops, moments, histograms, wild, floats, hit, begins, keys, at, turned):
    """Count one tile of one site, or one each of the two sites of the block; returns the largest magnitude's bits.

    tiles: one or two (row, feature) of equal shape; non-finite values are set to 0 in them. infinity: its bits. extremes:
    (2, 2, feature) int16 or int32, lowered and raised to the least and the greatest finite value of each site, as integers
    of `_ordered`. tops: (2, feature), overwritten with the tile's largest magnitudes. moments: (2, 4, feature) float64, to
    which the sums of x, x^2, x^3, x^4 are added; histograms: (2, 65536) uint32, counts by pattern; wild: (2, feature) int64,
    non-finite values. hit: (limits, floor, sources, counts, firsts), see `hits`, as the rest is. floats: (4, feature) float32,
    scratch.
    """
    largest = 0
    width = tiles[0].shape[1]
    tile = np.empty((2, width), extremes.dtype)
    for s in range(len(tiles)):
        _extremes(tiles[s], tile[0], tile[1])
        reached = _reach(tile[0], tile[1], tops[s])
        if reached >= infinity:
            removed = _scrub(tiles[s], infinity, tops[s], tile[0], tile[1], wild[s])
            reached = _reach(tile[0], tile[1], tops[s])
            _sums(tiles[s], kind, moments[s], histograms[s], floats)
            histograms[s, 0] -= np.uint32(removed)  # what was not finite was counted there as 0
        else:
            _sums(tiles[s], kind, moments[s], histograms[s], floats)
        _fold(tile, extremes[s])
        largest = max(largest, reached)
    limits, floor, sources, counts, firsts = hit
    if largest >= floor:
        hits(tiles, tops, limits, floor, sources, begins, counts, firsts, keys, at, turned)
    return largest


@compiled
def _sums(bits, kind, moments, histogram, floats):
    """Moments and histogram of one tile."""
    rows = bits.shape[0]
    for r in range(0, rows - GROUP + 1, GROUP):
        if kind == BFLOAT16:
            _add_bfloat16(bits[r], bits[r + 1], bits[r + 2], bits[r + 3], moments)
        else:
            for n in range(GROUP):
                _convert(bits[r + n], kind, floats[n])
            _add(floats[0], floats[1], floats[2], floats[3], moments)
        for n in range(GROUP):
            _tally(bits[r + n], kind, histogram)
    for r in range(rows - rows % GROUP, rows):
        _convert(bits[r], kind, floats[0])
        _add_one(floats[0], moments)
        _tally(bits[r], kind, histogram)


@compiled
def _extremes(bits, low, high):
    """Least and greatest value of each column as `_ordered` integers: sign and magnitude made a number that compares alike."""
    rows, width = bits.shape
    signed = bits.view(low.dtype)
    for j in range(width):
        low[j] = np.iinfo(low.dtype).max
        high[j] = np.iinfo(high.dtype).min
    # numba computes in 64 bits; the casts tell the compiler that 16 or 32 will do, and so how many go into a register
    for r in range(0, rows - GROUP + 1, GROUP):
        if bits.itemsize == 2:
            for j in range(width):
                a = np.int16(signed[r, j] ^ ((signed[r, j] >> 15) & 0x7FFF))
                b = np.int16(signed[r + 1, j] ^ ((signed[r + 1, j] >> 15) & 0x7FFF))
                c = np.int16(signed[r + 2, j] ^ ((signed[r + 2, j] >> 15) & 0x7FFF))
                d = np.int16(signed[r + 3, j] ^ ((signed[r + 3, j] >> 15) & 0x7FFF))
                low[j] = min(low[j], min(min(a, b), min(c, d)))
                high[j] = max(high[j], max(max(a, b), max(c, d)))
        else:
            for j in range(width):
                a = np.int32(signed[r, j] ^ ((signed[r, j] >> 31) & 0x7FFFFFFF))
                b = np.int32(signed[r + 1, j] ^ ((signed[r + 1, j] >> 31) & 0x7FFFFFFF))
                c = np.int32(signed[r + 2, j] ^ ((signed[r + 2, j] >> 31) & 0x7FFFFFFF))
                d = np.int32(signed[r + 3, j] ^ ((signed[r + 3, j] >> 31) & 0x7FFFFFFF))
                low[j] = min(low[j], min(min(a, b), min(c, d)))
                high[j] = max(high[j], max(max(a, b), max(c, d)))
    for r in range(rows - rows % GROUP, rows):
        for j in range(width):
            value = _ordered(signed[r, j], bits.itemsize)
            low[j] = min(low[j], value)
            high[j] = max(high[j], value)


@compiled
def _ordered(signed, itemsize):
    """A signed integer in the order of the values: negative ones have the bits of their magnitude turned over."""
    return signed ^ ((signed >> 15) & 0x7FFF) if itemsize == 2 else signed ^ ((signed >> 31) & 0x7FFFFFFF)


@compiled
def _reach(low, high, top):
    """top[j]: bits of the largest magnitude in column j, 0 where low > high: nothing finite; returns the largest of all."""
    mask = 0x7FFF if low.itemsize == 2 else 0x7FFFFFFF
    largest = 0
    for j in range(low.size):
        above = np.int64(high[j]) if high[j] >= 0 else 0
        below = (np.int64(low[j]) ^ mask) & mask if low[j] < 0 else 0
        top[j] = max(above, below)
        largest = max(largest, max(above, below))
    return largest


@compiled
def _scrub(bits, infinity, top, low, high, wild):
    """Set what is not finite to 0, count it a column, and mend the extremes of its columns; returns how many there were."""
    mask = 0x7FFF if bits.itemsize == 2 else 0x7FFFFFFF
    signed = bits.view(low.dtype)
    removed = 0
    for j in range(bits.shape[1]):
        if top[j] < infinity:
            continue
        low[j] = np.iinfo(low.dtype).max
        high[j] = np.iinfo(high.dtype).min
        for r in range(bits.shape[0]):
            if (bits[r, j] & mask) >= infinity:
                bits[r, j] = 0
                wild[j] += 1
                removed += 1
            else:
                value = _ordered(signed[r, j], bits.itemsize)
                low[j] = min(low[j], value)
                high[j] = max(high[j], value)
    return removed


@compiled
def _fold(tile, extremes):
    for j in range(tile.shape[1]):
        extremes[0, j] = min(extremes[0, j], tile[0, j])
        extremes[1, j] = max(extremes[1, j], tile[1, j])


@compiled
def _convert(row, kind, out):
    """Bits of one row as float32, exactly."""
    whole = out.view(np.uint32)
    if kind == FLOAT32:
        for j in range(row.size):
            whole[j] = row[j]
    elif kind == BFLOAT16:
        for j in range(row.size):
            whole[j] = np.uint32(row[j]) << 16
    else:
        for j in range(row.size):
            whole[j] = ((np.uint32(row[j]) & 0x8000) << 16) | ((np.uint32(row[j]) & 0x7FFF) << 13)
        for j in range(row.size):
            # exponents of float16 are 112 below those of float32; a product with a power of two is exact, subnormals too
            out[j] = out[j] * np.float32(2.0**112)


@compiled
def _add_bfloat16(a, b, c, d, moments):
    """Four rows of bfloat16 into the sums: `_convert` and `_add` in one, without a way through memory."""
    for j in range(a.size):
        w = np.float64(np.uint32(np.uint32(a[j]) << 16).view(np.float32))
        x = np.float64(np.uint32(np.uint32(b[j]) << 16).view(np.float32))
        y = np.float64(np.uint32(np.uint32(c[j]) << 16).view(np.float32))
        z = np.float64(np.uint32(np.uint32(d[j]) << 16).view(np.float32))
        ww, xx, yy, zz = w * w, x * x, y * y, z * z
        moments[0, j] = moments[0, j] + w + x + y + z
        moments[1, j] = moments[1, j] + ww + xx + yy + zz
        moments[2, j] = moments[2, j] + ww * w + xx * x + yy * y + zz * z
        moments[3, j] = moments[3, j] + ww * ww + xx * xx + yy * yy + zz * zz


@compiled
def _add(a, b, c, d, moments):
    for j in range(a.size):
        w, x, y, z = np.float64(a[j]), np.float64(b[j]), np.float64(c[j]), np.float64(d[j])
        ww, xx, yy, zz = w * w, x * x, y * y, z * z
        moments[0, j] = moments[0, j] + w + x + y + z
        moments[1, j] = moments[1, j] + ww + xx + yy + zz
        moments[2, j] = moments[2, j] + ww * w + xx * x + yy * y + zz * z
        moments[3, j] = moments[3, j] + ww * ww + xx * xx + yy * yy + zz * zz


@compiled
def _add_one(a, moments):
    for j in range(a.size):
        x = np.float64(a[j])
        xx = x * x
        moments[0, j] = moments[0, j] + x
        moments[1, j] = moments[1, j] + xx
        moments[2, j] = moments[2, j] + xx * x
        moments[3, j] = moments[3, j] + xx * xx


@compiled
def _tally(row, kind, histogram):
    if kind == FLOAT32:
        for j in range(row.size):
            u = np.uint32(row[j])
            rounded = np.uint32((np.uint64(u) + 0x7FFF + ((u >> 16) & 1)) >> 16)
            # the largest float32 would round to infinity: it is finite, and counted as the largest finite
            if (rounded & 0x7FFF) == 0x7F80 and (u & 0x7FFFFFFF) < 0x7F800000:
                rounded = np.uint32(rounded - 1)
            histogram[rounded & 0xFFFF] += np.uint32(1)
    else:
        for j in range(row.size):
            histogram[row[j]] += np.uint32(1)
