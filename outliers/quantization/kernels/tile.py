"""Sums over a tile of captured values: the squared error of a format, the squares of the values, the largest magnitudes.

A tile is some tokens of one layer at one site, (token, feature): bits of bfloat16 and float16 in uint16, of float32 in uint32.
`open_tile` makes float32 of it once, and every format reads that. Sums run down a column in the order of its tokens, in
float64, so that no number depends on how a sequence is cut into tiles or on a processor's registers.
"""

from __future__ import annotations

import numpy as np

from outliers.quantization.kernels.compiled import compiled
from outliers.quantization.kernels.rules import quantize_row, rotate_row

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
"""Kinds of value: how bits become numbers."""
LARGEST = 2.0**100
"""A token with a magnitude of this or more is left out, as one with a value that is not finite: its rotation, its scale or its
square could leave the range of the arithmetic."""


@compiled
def open_tile(bits, kind, values, good):
    """Fill `values` (token, padded feature) float32, and `good` (token,) bool with which tokens are measured; their number.

    bits: (token, feature), whose padding in `values` is set to 0.
    """
    rows, width = bits.shape
    found = 0
    for r in range(rows):
        row = values[r]
        _as_floats(bits[r], kind, row)
        for j in range(width, row.size):
            row[j] = np.float32(0)
        most = np.int32(0)
        whole = row.view(np.int32)
        for j in range(width):
            most = max(most, np.int32(whole[j] & 0x7FFFFFFF))
        good[r] = most < np.int32((127 + 100) << 23)
        found += int(good[r])
    return found


@compiled
def _as_floats(row, kind, out):
    """Bits as float32, exactly; what is not finite in float16 becomes NaN."""
    whole = out.view(np.uint32)
    if kind == FLOAT32:
        for j in range(row.size):
            whole[j] = row[j]
    elif kind == BFLOAT16:
        for j in range(row.size):
            whole[j] = np.uint32(row[j]) << 16
    else:
        for j in range(row.size):
            size = np.uint32(row[j]) & 0x7FFF
            whole[j] = ((np.uint32(row[j]) & 0x8000) << 16) | (size << 13)
            # the exponents of float16 are 112 below those of float32; a product with a power of two is exact
            out[j] = out[j] * np.float32(2.0**112) if size < 0x7C00 else np.float32(np.nan)


@compiled
def add_squares(values, good, squares):
    """Add the squares of the measured tokens to `squares`, (padded feature,) float64."""
    for r in range(values.shape[0]):
        if good[r]:
            row = values[r]
            for j in range(row.size):
                wide = np.float64(row[j])
                squares[j] += wide * wide


@compiled
def add_errors(values, good, held, width, rule, scratch, errors):
    """Add the squared errors of the measured tokens by one format to `errors`, (padded feature,) float64.

    held: (padded feature,) float32, 0 for the features that are held out, else 1; their own columns of `errors` mean nothing.
    width: features without padding. rule: kind, scope, amax, channel and added, as `rules.quantize_row` takes them, then block
    and factor of the rotation, 0 for none. scratch: (3, padded feature) float32, overwritten.
    """
    kind, scope, amax, channel, added, block, factor = rule
    out = scratch[1]
    copied = block > 0 or held[:width].min() == np.float32(0)
    for r in range(values.shape[0]):
        if not good[r]:
            continue
        row = values[r]
        x = scratch[0] if copied else row
        if copied:
            for j in range(row.size):
                x[j] = row[j] * held[j]
        if block:
            rotate_row(x, width, block, factor, scratch[2])
        quantize_row(x, out, scratch[2], kind, scope, amax, channel, added)
        if block:
            rotate_row(out, width, block, factor, scratch[2])
        for j in range(row.size):
            wide = np.float64(out[j]) - np.float64(row[j])
            errors[j] += wide * wide


@compiled
def raise_ranges(values, good, held, width, block, factor, scratch, largest):
    """Raise `largest`, (padded feature,) float32, to the magnitudes of the measured tokens, rotated where `block` is not 0."""
    x = scratch[0]
    for r in range(values.shape[0]):
        if not good[r]:
            continue
        row = values[r]
        for j in range(row.size):
            x[j] = row[j] * held[j]
        if block:
            rotate_row(x, width, block, factor, scratch[2])
        for j in range(row.size):
            largest[j] = max(largest[j], abs(x[j]))
