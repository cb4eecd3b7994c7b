"""Compiled loops that count all statistics of a tile of values while it is in the cache.

A tile is some tokens of one layer at one site as they are stored, (row, feature): bits of bfloat16 and float16 in uint16, of
float32 in uint32. The loops release the GIL. Counts are exact; float sums run down a column in the order of its rows and are
not reassociated (no fastmath), so that no number depends on the width of a processor's registers.
docs/performance.md says why numba compiles this: numpy and torch take a pass over memory for each statistic.
Extremes, moments and histograms are here, hits are in `hits`. Knows arrays, nothing of sequences or files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.counting.kernels.arguments import BFLOAT16, FLOAT32, Counters, Limits, Scratch, TileKeys
from outliers.counting.kernels.compiled import compiled
from outliers.counting.kernels.hits import count_hits

GROUP = 4
"""Rows that are added together: the sums of a column stay in registers."""


def count_tile(
    tiles: tuple[NDArray[Any], ...], limits: Limits, counters: Counters, scratch: Scratch, keys: TileKeys
) -> int:
    """Count one tile of one site, or one of each of the two sites of the block; returns the bits of the largest magnitude.

    tiles: one or two arrays (row, feature) of equal shape; non-finite values in them are set to 0. counters: added to. keys:
    raised to the largest key of each token over the layers.
    """
    largest: int = _count_tile(tiles, tuple(limits), tuple(counters), tuple(scratch), tuple(keys))
    return largest


@compiled
def _count_tile(tiles, limits, counters, scratch, keys):
    limits, counters, scratch, keys = Limits(*limits), Counters(*counters), Scratch(*scratch), TileKeys(*keys)
    largest = 0
    width = tiles[0].shape[1]
    tile = np.empty((2, width), counters.extremes.dtype)
    for s in range(len(tiles)):
        top, moments, histogram = scratch.tops[s], counters.moments[s], counters.histograms[s]
        _extremes(tiles[s], tile[0], tile[1])
        reached = _largest_magnitudes(tile[0], tile[1], top)
        removed = 0
        if reached >= limits.infinity:
            removed = _zero_nonfinite(tiles[s], limits.infinity, top, tile[0], tile[1], counters.nonfinite[s])
            reached = _largest_magnitudes(tile[0], tile[1], top)
        _sums(tiles[s], limits.kind, moments, histogram, scratch.floats)
        histogram[0] -= np.uint32(removed)  # the zeros that stand for values that are not finite
        _widen(tile, counters.extremes[s])
        largest = max(largest, reached)
    if largest >= limits.floor:
        count_hits(tiles, limits, counters, scratch, keys)
    return largest


COMPILED = _count_tile
"""The compiled function that every analysis calls."""


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
    """Least and greatest value of each column as `_ordered` integers, which compare as the values do."""
    rows, width = bits.shape
    signed = bits.view(low.dtype)
    for j in range(width):
        low[j] = np.iinfo(low.dtype).max
        high[j] = np.iinfo(high.dtype).min
    # numba computes in 64 bits; the casts tell the compiler that 16 or 32 are enough, so that more fit into a register
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
    """A signed integer in the order of the values: the magnitude bits of negative values are inverted."""
    return signed ^ ((signed >> 15) & 0x7FFF) if itemsize == 2 else signed ^ ((signed >> 31) & 0x7FFFFFFF)


@compiled
def _largest_magnitudes(low, high, top):
    """Set top[j] to the bits of the largest magnitude of column j, 0 where low > high: nothing is finite. Returns the largest."""
    mask = 0x7FFF if low.itemsize == 2 else 0x7FFFFFFF
    largest = 0
    for j in range(low.size):
        above = np.int64(high[j]) if high[j] >= 0 else 0
        below = (np.int64(low[j]) ^ mask) & mask if low[j] < 0 else 0
        top[j] = max(above, below)
        largest = max(largest, max(above, below))
    return largest


@compiled
def _zero_nonfinite(bits, infinity, top, low, high, nonfinite):
    """Set values that are not finite to 0, count them by column, correct the extremes of their columns; returns their number."""
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
                nonfinite[j] += 1
                removed += 1
            else:
                value = _ordered(signed[r, j], bits.itemsize)
                low[j] = min(low[j], value)
                high[j] = max(high[j], value)
    return removed


@compiled
def _widen(tile, extremes):
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
            # exponents of float16 are 112 below those of float32; the product with a power of two is exact, also of subnormals
            out[j] = out[j] * np.float32(2.0**112)


@compiled
def _add_bfloat16(a, b, c, d, moments):
    """Four rows of bfloat16 into the sums: `_convert` and `_add` in one, without intermediate memory."""
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
            # the largest float32 would round to infinity; it is counted as the largest finite bfloat16
            if (rounded & 0x7FFF) == 0x7F80 and (u & 0x7FFFFFFF) < 0x7F800000:
                rounded = np.uint32(rounded - 1)
            histogram[rounded & 0xFFFF] += np.uint32(1)
    else:
        for j in range(row.size):
            histogram[row[j]] += np.uint32(1)
