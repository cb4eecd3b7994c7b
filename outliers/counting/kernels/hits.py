"""Hits of a tile, compiled: which values reach a magnitude of the ladder, how many a feature, and each token's largest.

Only columns whose largest magnitude reaches the lowest one are looked at: a few one by one, many turned over together, and
where few of their values count for anything, eight bytes at a time are passed over. Counts are exact and the same whichever
way was taken. Knows arrays, nothing of layers or sequences. Before it: `kernels`, which has each column's largest magnitude.
After it: `kernel_totals` for the counts, `kernel_spans` for the keys.
"""

from __future__ import annotations

import numpy as np

from outliers.counting.kernels.compiled import KEY_SHIFT, LAST_SOURCE, at_least, compiled

LANES = 32
"""Columns turned over together: a cache line of 16-bit values."""
FEW = 8
"""Up to so many columns with a hit are read one by one; more are turned over with their neighbours."""
SPARSE = 4
"""Where fewer than one run of eight bytes in so many holds a value that counts for anything, each is looked up instead."""
SAMPLE = 4
"""Every so manyeth row is asked for that."""


@compiled
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


@compiled
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


@compiled
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


@compiled
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


@compiled
def _climb(magnitude, limits, first, counts, firsts, j):
    for k in range(limits.size):
        if magnitude < limits[k]:
            break
        counts[k, j] += 1
        if first:
            firsts[k, j] += 1


@compiled
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


@compiled
def _keep_smaller(a, b):
    """a becomes the smaller magnitude of both."""
    mask = 0x7FFF if a.itemsize == 2 else 0x7FFFFFFF
    for r in range(a.size):
        a[r] = min(a[r] & mask, b[r] & mask)


@compiled
def _count(column, top, limits, begins, counts, firsts, j):
    mask = 0x7FFF if column.itemsize == 2 else 0x7FFFFFFF
    for k in range(limits.size):
        limit = limits[k]
        if top < limit:
            break  # the ladder ascends: nothing above is hit either
        counts[k, j] += at_least(column, limit)
        if begins:
            firsts[k, j] += (column[0] & mask) >= limit


@compiled
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
