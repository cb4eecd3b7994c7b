"""The rules of `quantization.emulate` for one token at a time: the same operations in the same order, so the same bits.

A row is float32, padded with zeros to a multiple of 32, which gives the last group of a narrower site zeros for what it lacks.
Maxima of groups come from folding the row by halves, and each scale is spread over its group first, so that every loop runs over
the row, has no branch and becomes vector instructions; a loop of a group's length would be unrolled into scalar ones. Knows
arrays, no files and no sums.
"""

from __future__ import annotations

import numpy as np

from outliers.quantization.kernels.compiled import compiled

INT8, INT4, FP8, MXFP8, MXFP4, NVFP4 = 0, 1, 2, 3, 4, 5
"""Kinds of number."""
BY_TOKEN, BY_TENSOR, BY_CHANNEL, BY_GROUP = 0, 1, 2, 3
"""What shares a scale."""
PADDING = 32
"""A padded row is a multiple of the largest group."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_EXPONENT = np.int32(0x7F800000)
_SIGN = np.int32(-0x80000000)
_EPS = np.float32(2.0**-23)
_NEAREST = np.float32(12582912.0)
"""1.5 * 2^23: added and taken away again, it rounds magnitudes below 2^22 to the nearest integer, ties to even."""


@compiled
def quantize_row(x, out, spare, kind, scope, amax, channel, added):
    """Set `out` to `x` after quantizing and dequantizing; both (padded feature,) float32. spare: a row that is overwritten.

    kind, scope: codes. amax: of the tensor, float32. channel: (padded feature,) float32, the scales of int8_channel. added:
    what MX adds to a group's maximum, see `emulate.MX_ROUND`.
    """
    if kind == NVFP4:
        _nvfp4(x, out, spare, amax)
    elif kind in (MXFP4, MXFP8):
        _mx(x, out, spare, kind, added)
    elif scope == BY_CHANNEL:
        for j in range(x.size):
            scaled = min(max(x[j] / channel[j], np.float32(-128)), np.float32(127))
            out[j] = ((scaled + _NEAREST) - _NEAREST) * channel[j]
    else:
        largest = amax if scope == BY_TENSOR else _largest(x)
        if kind == FP8:
            scale = _scale(largest / np.float32(448))
            for j in range(x.size):
                out[j] = _e4m3(x[j] / scale) * scale
        else:
            half = np.float32(128) if kind == INT8 else np.float32(8)
            scale = _scale(largest / np.float32(half - np.float32(0.5)))
            low, high = -half, half - np.float32(1)
            for j in range(x.size):
                scaled = min(max(x[j] / scale, low), high)
                out[j] = ((scaled + _NEAREST) - _NEAREST) * scale


@compiled
def _float(bits):
    """The float32 of these bits."""
    return np.int32(bits).view(np.float32)


@compiled
def _bits(x):
    return np.float32(x).view(np.int32)


@compiled
def _scale(found):
    return found if found != np.float32(0) else _EPS


@compiled
def _largest(x):
    """The largest magnitude of a row: magnitudes compare as their bits do."""
    bits = x.view(np.int32)
    top = np.int32(0)
    for j in range(bits.size):
        top = max(top, np.int32(bits[j] & _MAGNITUDE))
    return _float(top)


@compiled
def _rounded(x, largest, mantissa, least):
    """As `emulate._rounded`. least: bits of the least normal power of two."""
    bits = _bits(x)
    size = min(_float(bits & _MAGNITUDE), largest)
    exponent = max(np.int32(_bits(size) & _EXPONENT), least)
    power = _float(exponent + mantissa)
    return _float(_bits((size + power) - power) | (bits & _SIGN))


@compiled
def _e4m3(x):
    return _rounded(x, np.float32(448), np.int32(20 << 23), np.int32(121 << 23))


@compiled
def _e2m1(x):
    return _rounded(x, np.float32(6), np.int32(22 << 23), np.int32(127 << 23))


@compiled
def _nvfp4(x, out, spare, amax):
    overall = np.float32(np.float32(1) / max(amax, np.float32(2.0**-126))) * np.float32(2688)
    if overall == np.float32(np.inf):
        overall = np.float32(1)
    bits = x.view(np.int32)
    one, other = spare.view(np.int32), out.view(np.int32)
    _pairs(bits, one)
    _fold(one, other, x.size // 4)
    _fold(other, one, x.size // 8)
    _fold(one, other, x.size // 16)
    for g in range(x.size // 16):
        local = _e4m3(overall * (out[g] / np.float32(6)))
        out[g] = (local if local != np.float32(0) else np.float32(0.125)) / overall
    _spread(out, 16)
    for j in range(x.size):
        scale = out[j]
        out[j] = _e2m1(x[j] / scale) * scale


@compiled
def _mx(x, out, spare, kind, added):
    offset = np.int32(8) if kind == MXFP8 else np.int32(2)
    bits = x.view(np.int32)
    one, other = out.view(np.int32), spare.view(np.int32)
    _pairs(bits, one)
    _fold(one, other, x.size // 4)
    _fold(other, one, x.size // 8)
    _fold(one, other, x.size // 16)
    _fold(other, one, x.size // 32)
    for g in range(x.size // 32):
        exponent = max(np.int32(((one[g] + added) >> 23) - 127 - offset), np.int32(-127))
        # 2^-127 is subnormal
        one[g] = np.int32(0x00400000) if exponent == -127 else np.int32((exponent + 127) << 23)
    _spread(out, 32)
    if kind == MXFP8:
        for j in range(x.size):
            scale = out[j]
            out[j] = _e4m3(x[j] / scale) * scale
    else:
        for j in range(x.size):
            scale = out[j]
            out[j] = _e2m1(x[j] / scale) * scale


@compiled
def _pairs(bits, tops):
    """The larger magnitude of each two neighbours, as bits."""
    for j in range(bits.size // 2):
        one, other = bits[np.uintp(2 * j)] & _MAGNITUDE, bits[np.uintp(2 * j + 1)] & _MAGNITUDE
        tops[j] = max(np.int32(one), np.int32(other))


@compiled
def _fold(tops, larger, count):
    """The larger of each two neighbours among the first 2 * count."""
    for j in range(count):
        larger[j] = max(tops[np.uintp(2 * j)], tops[np.uintp(2 * j + 1)])


@compiled
def _spread(scales, group):
    """The first values of a row, each to the places of its group: from the end, so that none is lost."""
    for g in range(scales.size // group - 1, -1, -1):
        own = scales[g]
        run = scales[g * group : (g + 1) * group]
        for j in range(run.size):
            run[j] = own


@compiled
def rotate_row(x, width, block, factor, turned):
    """As `emulate.rotate`, in place, on the first `width` values of a row. turned: a row that is overwritten.

    The n-th values of all blocks lie side by side while the stages run, so that a stage adds vectors.
    """
    blocks = width // block
    for n in range(block):
        for q in range(blocks):
            turned[np.uintp(n * blocks + q)] = x[np.uintp(q * block + n)]
    half = 1
    while half < block:
        for at in range(0, block, 2 * half):
            for n in range(at, at + half):
                low = turned[n * blocks : (n + 1) * blocks]
                high = turned[(n + half) * blocks : (n + half + 1) * blocks]
                for q in range(low.size):
                    a, b = low[q], high[q]
                    low[q] = a + b
                    high[q] = a - b
        half *= 2
    for q in range(blocks):
        for n in range(block):
            x[np.uintp(q * block + n)] = turned[np.uintp(n * blocks + q)] * factor
