"""Compiled loops that count the hits of a tile, by feature and magnitude of the ladder, and raise the key of each token.

Only columns whose largest magnitude reaches the floor are read: a few of them one by one, many transposed together, and where
few of their values reach the floor, eight bytes at a time are skipped. Counts are exact, and the same in all three ways.
Knows arrays, nothing of layers or sequences.
"""

from __future__ import annotations

import numpy as np

from outliers.counting.kernels.arguments import KEY_SHIFT, LAST_SOURCE
from outliers.counting.kernels.compiled import at_least, compiled

LANES = 32
"""Columns that are transposed together: a cache line of 16-bit values."""
FEW = 8
"""Up to FEW columns with a hit are read one by one; more are transposed with their neighbours."""
SPARSE = 4
"""Values are counted one by one where fewer than one of SPARSE groups of eight bytes has a magnitude at the floor or above."""
SAMPLE = 4
"""Sample every SAMPLE-th row to decide that."""


@compiled
def count_hits(tiles, limits, counters, scratch, keys):
    """Hits of one tile, at one site or at the two of the block, and for these the cells that are hits at both.

    Arguments as in `tile.count_tile`; `scratch.tops` has the largest magnitude of each column.
    """
    width = tiles[0].shape[1]
    for start in range(0, width, LANES):
        columns = 0
        for j in range(start, min(start + LANES, width)):
            columns += max(scratch.tops[0, j], scratch.tops[len(tiles) - 1, j]) >= limits.floor
        if columns == 0:
            continue
        if columns > FEW and width % LANES == 0 and _is_sparse(tiles, start, limits.floor):
            for s in range(len(tiles)):
                _count_values(tiles, s, start, limits, counters, keys)
        else:
            _count_columns(tiles, start, limits, counters, scratch, keys)


@compiled
def _count_columns(tiles, start, limits, counters, scratch, keys):
    """Count LANES columns of a tile, or those that are left, each as a row of `scratch.transposed`."""
    rows, width = tiles[0].shape
    stop = min(start + LANES, width)
    for s in range(len(tiles)):
        top = scratch.tops[s]
        if not _transpose(tiles[s], top, start, stop, limits.floor, scratch.transposed[s]):
            continue
        for j in range(start, stop):
            if top[j] >= limits.floor:
                column = scratch.transposed[s, j - start, :rows]
                _count(column, top[j], limits.ladder, keys.begins, counters.hits[s], counters.first_hits[s], j)
                _raise_keys(column, keys.sources[s], keys.keys[s][j, keys.column : keys.column + rows])
    if len(tiles) == 2:
        for j in range(start, stop):
            least = min(scratch.tops[0, j], scratch.tops[1, j])
            if least >= limits.ladder[0]:
                column = scratch.transposed[0, j - start, :rows]
                _keep_smaller(column, scratch.transposed[1, j - start, :rows])
                _count(column, least, limits.ladder, keys.begins, counters.hits[2], counters.first_hits[2], j)


@compiled
def _lanes(itemsize, floor):
    """(mask, addend, carry) to compare eight bytes at once: (word & mask) + addend has a carry bit where a magnitude >= floor."""
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
    """Whether few values of LANES columns reach the floor, so that counting them one by one is faster than transposing all."""
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
def _count_values(tiles, s, start, limits, counters, keys):
    """Count LANES columns of site `s` value by value, the same as `_count_columns`; groups of eight bytes whose magnitudes
    are all below the floor are skipped. With the block's first site, count the cells that are hits at the second site too.
    """
    bits, other, token_keys, shared = tiles[s], tiles[-1], keys.keys[s], len(tiles) == 2 and s == 0
    rows, width = bits.shape
    mask, sign = (0x7FFF, 15) if bits.itemsize == 2 else (0x7FFFFFFF, 31)
    lanes, addend, carry = _lanes(bits.itemsize, limits.floor)
    each = 8 // bits.itemsize
    words = bits.reshape(rows * width).view(np.uint64)
    origin = (LAST_SOURCE - keys.sources[s]) << 1
    for r in range(rows):
        first = (r * width + start) // each
        carried = np.uint64(0)
        for n in range(first, first + LANES // each):
            carried |= (words[n] & lanes) + addend
        if carried & carry == 0:
            continue
        begins = keys.begins and r == 0
        for n in range(first, first + LANES // each):
            if ((words[n] & lanes) + addend) & carry == 0:
                continue
            column = n * each - r * width
            for j in range(column, column + each):
                value = np.int64(bits[r, j])
                magnitude = value & mask
                if magnitude < limits.floor:
                    continue
                _count_value(magnitude, limits.ladder, begins, counters.hits[s], counters.first_hits[s], j)
                if shared:
                    least = min(magnitude, np.int64(other[r, j]) & mask)
                    _count_value(least, limits.ladder, begins, counters.hits[2], counters.first_hits[2], j)
                key = (magnitude << KEY_SHIFT) | origin | (value >> sign)
                if key > token_keys[j, keys.column + r]:
                    token_keys[j, keys.column + r] = key


@compiled
def _count_value(magnitude, ladder, begins, counts, firsts, j):
    for k in range(ladder.size):
        if magnitude < ladder[k]:
            break
        counts[k, j] += 1
        if begins:
            firsts[k, j] += 1


@compiled
def _transpose(bits, top, start, stop, floor, transposed):
    """Copy columns start to stop of a tile to rows of `transposed`, at least those with a hit; returns how many have one."""
    found = 0
    for j in range(start, stop):
        found += top[j] >= floor
    if found > FEW:
        for r in range(bits.shape[0]):
            for j in range(start, stop):
                transposed[j - start, r] = bits[r, j]
    elif found:
        for j in range(start, stop):
            if top[j] >= floor:
                for r in range(bits.shape[0]):
                    transposed[j - start, r] = bits[r, j]
    return found


@compiled
def _keep_smaller(a, b):
    """Set each element of a to the smaller magnitude of both."""
    mask = 0x7FFF if a.itemsize == 2 else 0x7FFFFFFF
    for r in range(a.size):
        a[r] = min(a[r] & mask, b[r] & mask)


@compiled
def _count(column, top, ladder, begins, counts, firsts, j):
    mask = 0x7FFF if column.itemsize == 2 else 0x7FFFFFFF
    for k in range(ladder.size):
        limit = ladder[k]
        if top < limit:
            break  # the ladder ascends
        counts[k, j] += at_least(column, limit)
        if begins:
            firsts[k, j] += (column[0] & mask) >= limit


@compiled
def _raise_keys(column, source, keys):
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
