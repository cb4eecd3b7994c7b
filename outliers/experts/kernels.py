"""Compiled loops that count what the experts of one layer got and gave, row by row. numba compiles them once on a machine.

Values come as bits: bfloat16 and float16 in uint16, float32 in uint32. The loops release the GIL. Integers are exact; float64
sums run in the order of the given rows and are not reassociated, so no number depends on how rows or experts are divided
between threads. Knows arrays, nothing of models.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from outliers.compiling import compiler

compiled = compiler([Path(__file__)])

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
"""Kinds of value: how bits become numbers."""
GROUP = 4
"""Rows that are added together: the sums of a column stay in registers."""
LANES = 64
"""Columns that are searched together."""
ROUNDED_UP = 0x7F7F8000
"""Bits of the least finite float32 that is infinite when it is rounded to bfloat16."""


@compiled
def add_inputs(values, limits, order, span, tile, sums, extremes, counts, histogram, largest):
    """Add the inputs of a span of experts. Arguments that belong together are plain tuples: numba takes those fastest.

    values: bits, (R, I), and their kind. limits: (1 + K,) int64, bits of infinity and of each magnitude. order: slots, places
    and starts, as `order_slots` sets them. span: the first expert and the one behind the last. tile: (2, I) int16 or int32,
    overwritten. sums: total and squares, (E, I) float64 each. extremes: low and high, (E, I) float32 each. counts: nonfinite,
    (E,), and hits, (K, E), int64. histogram: (65536,) unsigned. largest: magnitudes and columns, (T x k,) float32 and uint16,
    set for each slot.
    """
    bits, kind = values
    slots, places, starts = order
    first, last = span
    tops, columns = largest
    width = bits.shape[1]
    floats = np.empty((GROUP, width), np.float32)
    ordered = np.empty((2, width), bits.dtype)
    patterns = np.empty(width, np.uint16)
    rows = np.empty(GROUP, np.int64)
    for e in range(first, last):
        if starts[e] == starts[e + 1]:
            continue
        tile[0, :] = np.iinfo(tile.dtype).max
        tile[1, :] = np.iinfo(tile.dtype).min
        for start in range(starts[e], starts[e + 1], GROUP):
            several = min(GROUP, starts[e + 1] - start)
            finite = True
            for n in range(several):
                slot = slots[start + n]
                rows[n] = places[slot]
                top = _tally(bits[rows[n]], kind, limits, counts, e, histogram, patterns)
                finite = finite and top < limits[0]
                _place_top(bits[rows[n]], kind, limits[0], top, slot, tops, columns)
            total, squares = sums[0][e], sums[1][e]
            if several == GROUP and finite:
                _extremes(bits[rows[0]], bits[rows[1]], bits[rows[2]], bits[rows[3]], tile)
                if kind == BFLOAT16:
                    _add_bfloat16(bits[rows[0]], bits[rows[1]], bits[rows[2]], bits[rows[3]], total, squares)
                elif kind == FLOAT32:
                    a, b = bits[rows[0]].view(np.float32), bits[rows[1]].view(np.float32)
                    c, d = bits[rows[2]].view(np.float32), bits[rows[3]].view(np.float32)
                    _add(a, b, c, d, total, squares)
                else:
                    for n in range(GROUP):
                        _convert(bits[rows[n]], kind, floats[n])
                    _add(floats[0], floats[1], floats[2], floats[3], total, squares)
            else:
                for n in range(several):
                    _convert(bits[rows[n]], kind, floats[0])
                    _add_finite(bits[rows[n]], limits[0], floats[0], total, squares, tile)
        _widen(tile, ordered, kind, extremes[0][e], extremes[1][e])


@compiled
def add_outputs(values, infinity, weights, order, span, counted, largest):
    """Add the squares of the weighted outputs of a span of experts.

    values: bits, (R, H), and their kind. weights: (T x k,) float32. counted: energy, (E, H) float64, and rows with a value that
    is not finite, (E,) int64. The others as in `add_inputs`.
    """
    bits, kind = values
    slots, places, starts = order
    first, last = span
    energy, lost = counted
    tops, columns = largest
    width = bits.shape[1]
    floats = np.empty((GROUP, width), np.float32)
    factors = np.empty(GROUP, np.float64)
    rows = np.empty(GROUP, np.int64)
    for e in range(first, last):
        for start in range(starts[e], starts[e + 1], GROUP):
            several = min(GROUP, starts[e + 1] - start)
            finite = True
            for n in range(several):
                slot = slots[start + n]
                rows[n], factors[n] = places[slot], np.float64(weights[slot])
                top = _largest(bits[rows[n]])
                lost[e] += top >= infinity
                finite = finite and top < infinity and np.isfinite(factors[n])
                _place_top(bits[rows[n]], kind, infinity, top, slot, tops, columns)
            if several == GROUP and finite:
                if kind == BFLOAT16:
                    _energy_bfloat16(bits[rows[0]], bits[rows[1]], bits[rows[2]], bits[rows[3]], factors, energy[e])
                elif kind == FLOAT32:
                    a, b = bits[rows[0]].view(np.float32), bits[rows[1]].view(np.float32)
                    c, d = bits[rows[2]].view(np.float32), bits[rows[3]].view(np.float32)
                    _energy(a, b, c, d, factors, energy[e])
                else:
                    for n in range(GROUP):
                        _convert(bits[rows[n]], kind, floats[n])
                    _energy(floats[0], floats[1], floats[2], floats[3], factors, energy[e])
            else:
                for n in range(several):
                    _convert(bits[rows[n]], kind, floats[0])
                    _energy_finite(floats[0], factors[n], energy[e])


@compiled
def add_squares(bits, kind, infinity, tokens, first, last, energy):
    """Add the squares of columns `first` to `last` (exclusive) of some rows, (H,) float64."""
    width = last - first
    floats = np.empty((GROUP, width), np.float32)
    ones = np.ones(GROUP)
    part = energy[first:last]
    for start in range(0, tokens.size, GROUP):
        several = min(GROUP, tokens.size - start)
        finite = True
        for n in range(several):
            row = bits[tokens[start + n], first:last]
            finite = finite and _largest(row) < infinity
            _convert(row, kind, floats[n])
        if several == GROUP and finite:
            _energy(floats[0], floats[1], floats[2], floats[3], ones, part)
        else:
            for n in range(several):
                _energy_finite(floats[n], 1.0, part)


@compiled
def _largest(row):
    """Bits of the largest magnitude of a row, of what is not finite too."""
    if row.itemsize == 2:
        half = np.uint16(0)
        for j in range(row.size):
            half = max(half, np.uint16(row[j] & 0x7FFF))
        return np.int64(half)
    whole = np.uint32(0)
    for j in range(row.size):
        whole = max(whole, np.uint32(row[j] & 0x7FFFFFFF))
    return np.int64(whole)


@compiled
def _place_top(row, kind, infinity, top, slot, tops, columns):
    """Set the largest finite magnitude of a row and the first column that has it, where there is one."""
    mask = 0x7FFF if row.itemsize == 2 else 0x7FFFFFFF
    if top >= infinity:
        top = -1
        for j in range(row.size):
            magnitude = np.int64(row[j]) & mask
            if magnitude < infinity:
                top = max(top, magnitude)
    if top < 0:
        return
    tops[slot] = _magnitude(top, kind)
    for start in range(0, row.size, LANES):
        # the largest of some columns at once, then one by one
        if _largest(row[start : start + LANES]) >= top:
            for j in range(start, min(start + LANES, row.size)):
                if np.int64(row[j]) & mask == top:
                    columns[slot] = j
                    return


@compiled
def _magnitude(top, kind):
    """The value of magnitude bits."""
    if kind == FLOAT32:
        return np.uint32(top).view(np.float32)
    if kind == BFLOAT16:
        return np.uint32(np.uint32(top) << 16).view(np.float32)
    return np.uint32(np.uint32(top) << 13).view(np.float32) * np.float32(2.0**112)


@compiled
def _tally(row, kind, limits, counts, e, histogram, patterns):
    """Count the hits, patterns and values of a row that are not finite; returns the bits of its largest magnitude.

    patterns: (I,) uint16, overwritten.
    """
    top = _largest(row)
    if top >= limits[0]:
        _tally_finite(row, kind, limits, counts, e, histogram)
        return top
    for k in range(limits.size - 1):
        if top < limits[k + 1]:
            break  # the magnitudes ascend
        counts[1][k, e] += _at_least(row, limits[k + 1])
    if kind == FLOAT32 and top < ROUNDED_UP:
        # in two loops, of which the first takes many values at once; no sum leaves 32 bits
        for j in range(row.size):
            u = np.uint32(row[j])
            even = np.uint32(np.uint32(u >> np.uint32(16)) & np.uint32(1))
            patterns[j] = np.uint16(np.uint32(u + np.uint32(0x7FFF) + even) >> np.uint32(16))
        for j in range(row.size):
            histogram[patterns[j]] += np.uint32(1)
    elif kind == FLOAT32:
        for j in range(row.size):
            histogram[_pattern(row[j])] += np.uint32(1)
    else:
        for j in range(row.size):
            histogram[row[j]] += np.uint32(1)
    return top


@compiled
def _tally_finite(row, kind, limits, counts, e, histogram):
    mask = 0x7FFF if row.itemsize == 2 else 0x7FFFFFFF
    for j in range(row.size):
        magnitude = np.int64(row[j]) & mask
        if magnitude >= limits[0]:
            counts[0][e] += 1
            continue
        histogram[_pattern(row[j]) if kind == FLOAT32 else np.uint32(row[j])] += np.uint32(1)
        for k in range(limits.size - 1):
            counts[1][k, e] += magnitude >= limits[k + 1]


@compiled
def _pattern(bits):
    """A finite float32 rounded to bfloat16, ties to even; what would round to infinity is the largest finite bfloat16."""
    u = np.uint32(bits)
    rounded = np.uint32((np.uint64(u) + 0x7FFF + ((u >> 16) & 1)) >> 16)
    if (rounded & 0x7FFF) == 0x7F80:
        rounded = np.uint32(rounded - 1)
    return rounded & 0xFFFF


@compiled
def _at_least(row, limit):
    found = np.uint32(0)
    if row.itemsize == 2:
        least = np.uint16(limit)
        for r in range(row.size):
            found += np.uint32((row[r] & 0x7FFF) >= least)
    else:
        whole = np.uint32(limit)
        for r in range(row.size):
            found += np.uint32((row[r] & 0x7FFFFFFF) >= whole)
    return found


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
            u = np.uint32(row[j])
            whole[j] = ((u & 0x8000) << 16) | ((u & 0x7FFF) << 13)
        for j in range(row.size):
            # exponents of float16 are 112 below those of float32; the product with a power of two is exact, also of subnormals
            if (row[j] & 0x7FFF) >= 0x7C00:
                out[j] = np.float32(np.inf)
            else:
                out[j] = out[j] * np.float32(2.0**112)


@compiled
def _extremes(a, b, c, d, tile):
    """Least and greatest of each column as `_ordered` integers, which compare as the values do."""
    low, high = tile[0], tile[1]
    p, q, r, s = a.view(low.dtype), b.view(low.dtype), c.view(low.dtype), d.view(low.dtype)
    # numba computes in 64 bits; the casts tell the compiler that 16 or 32 are enough, so that more fit into a register
    if a.itemsize == 2:
        for j in range(low.size):
            w = np.int16(p[j] ^ ((p[j] >> 15) & 0x7FFF))
            x = np.int16(q[j] ^ ((q[j] >> 15) & 0x7FFF))
            y = np.int16(r[j] ^ ((r[j] >> 15) & 0x7FFF))
            z = np.int16(s[j] ^ ((s[j] >> 15) & 0x7FFF))
            low[j] = min(low[j], min(min(w, x), min(y, z)))
            high[j] = max(high[j], max(max(w, x), max(y, z)))
    else:
        for j in range(low.size):
            ww = np.int32(p[j] ^ ((p[j] >> 31) & 0x7FFFFFFF))
            xx = np.int32(q[j] ^ ((q[j] >> 31) & 0x7FFFFFFF))
            yy = np.int32(r[j] ^ ((r[j] >> 31) & 0x7FFFFFFF))
            zz = np.int32(s[j] ^ ((s[j] >> 31) & 0x7FFFFFFF))
            low[j] = min(low[j], min(min(ww, xx), min(yy, zz)))
            high[j] = max(high[j], max(max(ww, xx), max(yy, zz)))


@compiled
def _ordered(signed, itemsize):
    """A signed integer in the order of the values: the magnitude bits of negative values are inverted. Its own inverse."""
    return signed ^ ((signed >> 15) & 0x7FFF) if itemsize == 2 else signed ^ ((signed >> 31) & 0x7FFFFFFF)


@compiled
def _widen(tile, bits, kind, low, high):
    """Widen the extremes by those of `tile`, where a column has any. A zero has no sign, which would depend on an order.

    bits: overwritten, of the shape of `tile`.
    """
    values = np.empty((2, tile.shape[1]), np.float32)
    for n in range(2):
        signed = bits[n].view(tile.dtype)
        for j in range(tile.shape[1]):
            signed[j] = _ordered(tile[n, j], tile.itemsize)
        _convert(bits[n], kind, values[n])
    for j in range(tile.shape[1]):
        if tile[0, j] <= tile[1, j]:
            low[j] = min(low[j], values[0, j]) + np.float32(0.0)
            high[j] = max(high[j], values[1, j]) + np.float32(0.0)


@compiled
def _add_bfloat16(a, b, c, d, total, squares):
    """Four rows of bfloat16 into the sums: `_convert` and `_add` in one, without intermediate memory."""
    for j in range(a.size):
        w = np.float64(np.uint32(np.uint32(a[j]) << 16).view(np.float32))
        x = np.float64(np.uint32(np.uint32(b[j]) << 16).view(np.float32))
        y = np.float64(np.uint32(np.uint32(c[j]) << 16).view(np.float32))
        z = np.float64(np.uint32(np.uint32(d[j]) << 16).view(np.float32))
        total[j] = total[j] + w + x + y + z
        squares[j] = squares[j] + w * w + x * x + y * y + z * z


@compiled
def _add(a, b, c, d, total, squares):
    for j in range(a.size):
        w, x, y, z = np.float64(a[j]), np.float64(b[j]), np.float64(c[j]), np.float64(d[j])
        total[j] = total[j] + w + x + y + z
        squares[j] = squares[j] + w * w + x * x + y * y + z * z


@compiled
def _add_finite(row, infinity, floats, total, squares, tile):
    """The finite values of one row into sums and extremes."""
    mask = 0x7FFF if row.itemsize == 2 else 0x7FFFFFFF
    signed = row.view(tile.dtype)
    for j in range(row.size):
        if (np.int64(row[j]) & mask) < infinity:
            x = np.float64(floats[j])
            total[j] += x
            squares[j] += x * x
            ordered = _ordered(signed[j], row.itemsize)
            tile[0, j] = min(tile[0, j], ordered)
            tile[1, j] = max(tile[1, j], ordered)


@compiled
def _energy_bfloat16(a, b, c, d, factors, energy):
    f, g, h, i = factors[0], factors[1], factors[2], factors[3]
    for j in range(a.size):
        w = f * np.float64(np.uint32(np.uint32(a[j]) << 16).view(np.float32))
        x = g * np.float64(np.uint32(np.uint32(b[j]) << 16).view(np.float32))
        y = h * np.float64(np.uint32(np.uint32(c[j]) << 16).view(np.float32))
        z = i * np.float64(np.uint32(np.uint32(d[j]) << 16).view(np.float32))
        energy[j] = energy[j] + w * w + x * x + y * y + z * z


@compiled
def _energy(a, b, c, d, factors, energy):
    f, g, h, i = factors[0], factors[1], factors[2], factors[3]
    for j in range(a.size):
        w, x, y, z = f * np.float64(a[j]), g * np.float64(b[j]), h * np.float64(c[j]), i * np.float64(d[j])
        energy[j] = energy[j] + w * w + x * x + y * y + z * z


@compiled
def _energy_finite(row, factor, energy):
    """The squares of the weighted values of one row that are finite."""
    for j in range(row.size):
        x = factor * np.float64(row[j])
        if np.isfinite(x):
            energy[j] += x * x
