"""Compiled loops that find the massive activations of a tile: the values above a magnitude, with the exact median of their token.

Medians are found by bisection of the bit patterns, only for the tokens that have such a value. Knows arrays, nothing of what
is kept of them.
"""

from __future__ import annotations

import numpy as np

from outliers.counting.kernels.compiled import at_least, compiled


@compiled
def above(bits, limit):
    """The values of a tile whose magnitude exceeds `limit`, with the two middle magnitudes of their token.

    Returns (rows, columns, lower, upper), int64: where the values are, and the bits of the two middle magnitudes of the row,
    equal where its number of values is odd.
    """
    count = 0
    for r in range(bits.shape[0]):
        count += at_least(bits[r], limit + 1)
    rows, columns = np.empty(count, np.int64), np.empty(count, np.int64)
    lower, upper = np.empty(count, np.int64), np.empty(count, np.int64)
    mask = 0x7FFF if bits.itemsize == 2 else 0x7FFFFFFF
    n = 0
    for r in range(bits.shape[0]):
        if at_least(bits[r], limit + 1) == 0:
            continue
        middle = _middle(bits[r])
        for j in range(bits.shape[1]):
            if (bits[r, j] & mask) > limit:
                rows[n], columns[n], lower[n], upper[n] = r, j, middle[0], middle[1]
                n += 1
    return rows, columns, lower, upper


@compiled
def _middle(row):
    """Bits of the two middle magnitudes of one token's values, equal where their number is odd."""
    size = row.size
    lower = _at_rank(row, (size - 1) // 2)
    if size % 2 == 1 or size - at_least(row, lower + 1) > size // 2:
        return lower, lower
    return lower, _next_above(row, lower)


@compiled
def _at_rank(row, rank):
    """Bits of the magnitude of rank `rank`, 0-based, by bisection: one fast pass for each bit, whatever the values."""
    low, high = np.int64(0), np.int64(0x7FFF if row.itemsize == 2 else 0x7FFFFFFF)
    while low < high:
        half = (low + high) // 2
        if row.size - at_least(row, half + 1) > rank:
            high = half
        else:
            low = half + 1
    return low


@compiled
def _next_above(row, limit):
    mask = 0x7FFF if row.itemsize == 2 else 0x7FFFFFFF
    best = mask
    for j in range(row.size):
        value = row[j] & mask
        if value > limit and value < best:
            best = value
    return best
