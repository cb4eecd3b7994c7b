"""The inner loops of counting, compiled: a tile of values -> all that is counted of it, while it is in the cache.

A tile is some tokens of one layer at one site as they are stored, (row, feature): bits of bfloat16 and float16 in uint16, of
float32 in uint32. The loops release the GIL. Counts are exact; float sums run down a column in the order of its rows and are
not reassociated (no fastmath), so that no number depends on how wide a processor's registers are.
docs/performance.md says why numba compiles this: numpy and torch take a pass over memory for each statistic.
Knows arrays, nothing of sequences or files. Before it: `bits`. After it: `accumulate`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
"""Kinds of value: how bits become numbers."""
KEY_SHIFT = 17
"""A key is magnitude << 17 | (65535 - source) << 1 | sign: the largest has the largest magnitude, of the first source."""
LAST_SOURCE = 0xFFFF
GROUP = 4
"""Rows taken together: a column's sums stay in registers while they are added."""
LANES = 32
"""Columns turned over together: a cache line of 16-bit values."""
FEW = 8
"""Up to so many columns with a hit are read one by one; more are turned over with their neighbours."""
SPARSE = 4
"""Where fewer than one run of eight bytes in so many holds a value that counts for anything, each is looked up instead."""
SAMPLE = 4
"""Every so manyeth row is asked for that."""


def _compiled(function):
    """Compiled at the first call and kept for later processes, where there is a folder for that: it takes seconds."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # "cannot cache function: no locator available": neither beside the program nor in a home
        return njit(**options)(function)


@_compiled
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


@_compiled
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


@_compiled
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


@_compiled
def _ordered(signed, itemsize):
    """A signed integer in the order of the values: negative ones have the bits of their magnitude turned over."""
    return signed ^ ((signed >> 15) & 0x7FFF) if itemsize == 2 else signed ^ ((signed >> 31) & 0x7FFFFFFF)


@_compiled
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


@_compiled
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


@_compiled
def _fold(tile, extremes):
    for j in range(tile.shape[1]):
        extremes[0, j] = min(extremes[0, j], tile[0, j])
        extremes[1, j] = max(extremes[1, j], tile[1, j])


@_compiled
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


@_compiled
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


@_compiled
def _add(a, b, c, d, moments):
    for j in range(a.size):
        w, x, y, z = np.float64(a[j]), np.float64(b[j]), np.float64(c[j]), np.float64(d[j])
        ww, xx, yy, zz = w * w, x * x, y * y, z * z
        moments[0, j] = moments[0, j] + w + x + y + z
        moments[1, j] = moments[1, j] + ww + xx + yy + zz
        moments[2, j] = moments[2, j] + ww * w + xx * x + yy * y + zz * z
        moments[3, j] = moments[3, j] + ww * ww + xx * xx + yy * yy + zz * zz


@_compiled
def _add_one(a, moments):
    for j in range(a.size):
        x = np.float64(a[j])
        xx = x * x
        moments[0, j] = moments[0, j] + x
        moments[1, j] = moments[1, j] + xx
        moments[2, j] = moments[2, j] + xx * x
        moments[3, j] = moments[3, j] + xx * xx


@_compiled
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


@_compiled
def hits(tiles, tops, limits, floor, sources, begins, counts, firsts, keys, at, turned):
    """Hits of one tile, at one site or at the two of the block, and there also the cells that are hits at both.

    tiles: one or two (row, feature). tops: (2, feature), largest magnitudes of each (`reach`). limits: (K,) ascending bits;
    floor: the least magnitude that counts for anything, at most limits[0]. counts, firsts: (3, K, feature) int64, to whose
    first and second the sites' hits are added, to the third those of both; firsts takes row 0 alone, where a sequence
    `begins`. keys: (feature, position) of each site, raised to the largest key of a token over the layers, from column `at`
    on. turned: (2, LANES, rows), scratch.
    """
    rows, width = tiles[0].shape
    for start in range(0, width, LANES):
        stop = min(start + LANES, width)
        columns = 0
        for j in range(start, stop):
            columns += max(tops[0, j], tops[len(tiles) - 1, j]) >= floor
        if columns == 0:
            continue
        if columns > FEW and width % LANES == 0 and _is_sparse(tiles, start, floor):
            for s in range(len(tiles)):
                shared = len(tiles) == 2 and s == 0
                _pick(
                    tiles[s],
                    tiles[-1],
                    shared,
                    start,
                    limits,
                    floor,
                    sources[s],
                    begins,
                    s,
                    counts,
                    firsts,
                    keys[s],
                    at,
                )
            continue
        for s in range(len(tiles)):
            top = tops[s]
            if not _bring(tiles[s], top, start, stop, floor, turned[s]):
                continue
            for j in range(start, stop):
                if top[j] >= floor:
                    column = turned[s, j - start, :rows]
                    _count(column, top[j], limits, begins, counts[s], firsts[s], j)
                    _raise(column, sources[s], keys[s][j, at : at + rows])
        if len(tiles) == 2:
            for j in range(start, stop):
                least = min(tops[0, j], tops[1, j])
                if least >= limits[0]:
                    column = turned[0, j - start, :rows]
                    _keep_smaller(column, turned[1, j - start, :rows])
                    _count(column, least, limits, begins, counts[2], firsts[2], j)


@_compiled
def _lanes(itemsize, floor):
    """(mask, addend, carry) by which eight bytes are looked at together: the sum has a carry where a magnitude >= floor."""
    if itemsize == 2:
        return (
            np.uint64(0x7FFF7FFF7FFF7FFF),
            np.uint64(0x8000 - floor) * np.uint64(0x0001000100010001),
            np.uint64(0x8000800080008000),
        )
    return (
        np.uint64(0x7FFFFFFF7FFFFFFF),
        np.uint64(0x80000000 - floor) * np.uint64(0x0000000100000001),
        np.uint64(0x8000000080000000),
    )


@_compiled
def _is_sparse(tiles, start, floor):
    """Whether so few values of LANES columns count for anything that each is better looked up than all turned over."""
    rows, width = tiles[0].shape
    each = 8 // tiles[0].itemsize
    mask, addend, carry = _lanes(tiles[0].itemsize, floor)
    found = np.uint32(0)
    for s in range(len(tiles)):
        words = tiles[s].reshape(rows * width).view(np.uint64)
        for r in range(0, rows, SAMPLE):
            at = (r * width + start) // each
            for n in range(at, at + LANES // each):
                found += np.uint32((((words[n] & mask) + addend) & carry) != 0)
    return found * SPARSE < len(tiles) * ((rows + SAMPLE - 1) // SAMPLE) * (LANES // each)


@_compiled
def _pick(bits, other, shared, start, limits, floor, source, begins, s, counts, firsts, keys, at):
    """What the columns' way does for site s, value by value, for LANES columns; eight bytes without one that counts are
    passed over. shared: count the cells that are hits at the other site too.
    """
    rows, width = bits.shape
    mask, sign = (0x7FFF, 15) if bits.itemsize == 2 else (0x7FFFFFFF, 31)
    lanes, addend, carry = _lanes(bits.itemsize, floor)
    each = 8 // bits.itemsize
    words = bits.reshape(rows * width).view(np.uint64)
    origin = (LAST_SOURCE - source) << 1
    for r in range(rows):
        first = (r * width + start) // each
        carried = np.uint64(0)
        for n in range(first, first + LANES // each):
            carried |= (words[n] & lanes) + addend
        if carried & carry == 0:
            continue
        for n in range(first, first + LANES // each):
            if ((words[n] & lanes) + addend) & carry == 0:
                continue
            column = n * each - r * width
            for j in range(column, column + each):
                value = np.int64(bits[r, j])
                magnitude = value & mask
                if magnitude < floor:
                    continue
                _climb(magnitude, limits, begins and r == 0, counts[s], firsts[s], j)
                if shared:
                    least = min(magnitude, np.int64(other[r, j]) & mask)
                    _climb(least, limits, begins and r == 0, counts[2], firsts[2], j)
                key = (magnitude << KEY_SHIFT) | origin | (value >> sign)
                if key > keys[j, at + r]:
                    keys[j, at + r] = key


@_compiled
def _climb(magnitude, limits, first, counts, firsts, j):
    for k in range(limits.size):
        if magnitude < limits[k]:
            break
        counts[k, j] += 1
        if first:
            firsts[k, j] += 1


@_compiled
def _bring(bits, top, start, stop, floor, turned):
    """Columns start to stop of a tile as rows of `turned`, those with a hit at least; returns how many have one."""
    found = 0
    for j in range(start, stop):
        found += top[j] >= floor
    if found > FEW:
        for r in range(bits.shape[0]):
            for j in range(start, stop):
                turned[j - start, r] = bits[r, j]
    elif found:
        for j in range(start, stop):
            if top[j] >= floor:
                for r in range(bits.shape[0]):
                    turned[j - start, r] = bits[r, j]
    return found


@_compiled
def _keep_smaller(a, b):
    """a becomes the smaller magnitude of both."""
    mask = 0x7FFF if a.itemsize == 2 else 0x7FFFFFFF
    for r in range(a.size):
        a[r] = min(a[r] & mask, b[r] & mask)


@_compiled
def _count(column, top, limits, begins, counts, firsts, j):
    mask = 0x7FFF if column.itemsize == 2 else 0x7FFFFFFF
    for k in range(limits.size):
        limit = limits[k]
        if top < limit:
            break  # the ladder ascends: nothing above is hit either
        counts[k, j] += _at_least(column, limit)
        if begins:
            firsts[k, j] += (column[0] & mask) >= limit


@_compiled
def _at_least(bits, limit):
    """How many magnitudes of a run of values are at least `limit`."""
    found = np.uint32(0)
    if bits.itemsize == 2:
        least = np.uint16(limit)
        for r in range(bits.size):
            found += np.uint32((bits[r] & 0x7FFF) >= least)
    else:
        least = np.uint32(limit)
        for r in range(bits.size):
            found += np.uint32((bits[r] & 0x7FFFFFFF) >= least)
    return found


@_compiled
def _raise(column, source, keys):
    if column.itemsize == 2:
        for r in range(column.size):
            u = np.uint32(column[r])
            key = np.uint32(((u & 0x7FFF) << KEY_SHIFT) | (np.uint32(LAST_SOURCE - source) << 1) | (u >> 15))
            keys[r] = max(keys[r], key)
    else:
        for r in range(column.size):
            u = np.uint64(column[r])
            key = np.uint64(((u & 0x7FFFFFFF) << KEY_SHIFT) | (np.uint64(LAST_SOURCE - source) << 1) | (u >> 31))
            keys[r] = max(keys[r], key)


@_compiled
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


@_compiled
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


@_compiled
def _settle_hits(layer, number, step, counts, firsts, all_hits, all_firsts, hits):
    for j in range(counts.shape[1]):
        hits[number, j] = counts[step, j]
    for k in range(counts.shape[0]):
        for j in range(counts.shape[1]):
            all_hits[k, layer, j] += counts[k, j]
            all_firsts[k, layer, j] += firsts[k, j]
            counts[k, j] = 0
            firsts[k, j] = 0


@_compiled
def _settle_extremes(extremes, kind, least, greatest):
    for j in range(least.size):
        if extremes[0, j] <= extremes[1, j]:
            least[j] = min(least[j], _value(extremes[0, j], kind))
            greatest[j] = max(greatest[j], _value(extremes[1, j], kind))


@_compiled
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


@_compiled
def _pour(histogram, total):
    """Add a histogram to a total, (65536,) int64, and empty it; few patterns are used, and the rest is only looked at."""
    pairs = histogram.view(np.uint64)
    for n in range(0, pairs.size, 4):
        if pairs[n] | pairs[n + 1] | pairs[n + 2] | pairs[n + 3]:
            for i in range(2 * n, 2 * n + 8):
                total[i] += histogram[i]
                histogram[i] = 0


@_compiled
def join(keys, others, columns):
    """Raise keys, (feature, position), to others in the named columns of features."""
    for j in columns:
        for t in range(keys.shape[1]):
            keys[j, t] = max(keys[j, t], others[j, t])


@_compiled
def close(one, other, columns, limits, deciding, legacy, begins, counts, firsts, own, scratch):
    """Tokens with a hit in any layer, from the keys of one site, or of the two of the block.

    one, other: (feature, position) keys, the same array twice for a single site. columns: the features that have any.
    counts, firsts: (K, feature) int64, to which such tokens are added; firsts takes position 0 alone, where a sequence
    `begins`. own: (2, feature) int64, to which those at the limits `deciding` and `legacy` are added. scratch: (position,).
    """
    for j in columns:
        for t in range(scratch.size):
            scratch[t] = max(one[j, t], other[j, t]) >> KEY_SHIFT
        top = scratch.max()
        for k in range(limits.size):
            if top < limits[k]:
                break
            counts[k, j] += _at_least(scratch, limits[k])
            if begins:
                firsts[k, j] += scratch[0] >= limits[k]
        own[0, j] += _at_least(scratch, deciding)
        own[1, j] += _at_least(scratch, legacy)


@_compiled
def places(one, other, columns, deciding, floors, start, bin_positions, delimiters, bins, delimited, keep, found, keys):
    """Where the hits of the deciding site sit.

    one, other, columns: as in `close`. deciding: the limit. floors: (feature,) int64, magnitudes below which a token can't
    be among a feature's largest any more. start: position of column 0. delimiters: (position,) bool. bins: (bin, feature)
    int64 and delimited: (feature,) int64, to which tokens with a hit are added. found: (len(columns), keep) int64,
    overwritten with the positions of each feature's largest magnitudes, in order, -1 where there are no more; keys: the
    same shape, their keys.
    """
    scratch = np.empty(one.shape[1], one.dtype)
    for n in range(columns.size):
        j = columns[n]
        for t in range(scratch.size):
            scratch[t] = max(one[j, t], other[j, t])
        least = deciding << KEY_SHIFT
        count = 0
        for t in range(scratch.size):
            key = np.int64(scratch[t])
            if key < least:
                continue
            bins[(start + t) // bin_positions, j] += 1
            delimited[j] += delimiters[t]
            magnitude = key >> KEY_SHIFT
            if magnitude < floors[j] or (count == keep and magnitude <= keys[n, keep - 1] >> KEY_SHIFT):
                continue
            count = min(count + 1, keep)
            slot = count - 1
            while slot > 0 and np.int64(keys[n, slot - 1] >> KEY_SHIFT) < magnitude:
                found[n, slot], keys[n, slot] = found[n, slot - 1], keys[n, slot - 1]
                slot -= 1
            found[n, slot], keys[n, slot] = t, key
        found[n, count:] = -1


@_compiled
def above(bits, limit):
    """The values of a tile whose magnitude exceeds `limit`, with the middle of their token.

    Returns (rows, columns, lower, upper), int64: where they are, and the bits of the two middle magnitudes of the row,
    equal where its number of values is odd.
    """
    count = 0
    for r in range(bits.shape[0]):
        count += _at_least(bits[r], limit + 1)
    rows, columns = np.empty(count, np.int64), np.empty(count, np.int64)
    lower, upper = np.empty(count, np.int64), np.empty(count, np.int64)
    mask = 0x7FFF if bits.itemsize == 2 else 0x7FFFFFFF
    n = 0
    for r in range(bits.shape[0]):
        if _at_least(bits[r], limit + 1) == 0:
            continue
        middle = _middle(bits[r])
        for j in range(bits.shape[1]):
            if (bits[r, j] & mask) > limit:
                rows[n], columns[n], lower[n], upper[n] = r, j, middle[0], middle[1]
                n += 1
    return rows, columns, lower, upper


@_compiled
def _middle(row):
    """Bits of the two middle magnitudes of one token's values, equal where their number is odd."""
    size = row.size
    lower = _at_rank(row, (size - 1) // 2)
    if size % 2 == 1 or size - _at_least(row, lower + 1) > size // 2:
        return lower, lower
    return lower, _next_above(row, lower)


@_compiled
def _at_rank(row, rank):
    """Bits of the magnitude of rank `rank`, 0-based: halving the patterns takes a fast pass a bit, whatever the values."""
    low, high = np.int64(0), np.int64(0x7FFF if row.itemsize == 2 else 0x7FFFFFFF)
    while low < high:
        half = (low + high) // 2
        if row.size - _at_least(row, half + 1) > rank:
            high = half
        else:
            low = half + 1
    return low


@_compiled
def _next_above(row, limit):
    mask = 0x7FFF if row.itemsize == 2 else 0x7FFFFFFF
    best = mask
    for j in range(row.size):
        value = row[j] & mask
        if value > limit and value < best:
            best = value
    return best
