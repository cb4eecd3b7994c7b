"""Number formats by the letter, one value at a time, for the tests: shares no code with outliers.quantization.

Scales are numpy's float32, one operation a line; rounding is a search for the nearest code in a table, exact in fractions.
"""

from __future__ import annotations

import bisect
import math
from fractions import Fraction

import numpy as np

F = np.float32


def e4m3_codes() -> list[float]:
    """The 127 magnitudes of E4M3, in the order of their codes."""
    codes = [code for code in range(0x80) if code != 0x7F]
    return [
        math.ldexp(code & 7, -9) if code >> 3 == 0 else math.ldexp(8 + (code & 7), (code >> 3) - 7 - 3)
        for code in codes
    ]


E4M3 = e4m3_codes()
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(value: float, table: list[float]) -> float:
    """The nearest entry, with the value's sign; of two that are as near, the one of the even code."""
    size = min(abs(float(value)), table[-1])
    above = bisect.bisect_left(table, size)
    if table[above] == size:
        return math.copysign(size, value)
    middle = (table[above - 1] + table[above]) / 2
    even = above if above % 2 == 0 else above - 1
    code = even if size == middle else above if size > middle else above - 1
    return math.copysign(table[code], value)


def nearest_integer(value: float, low: int, high: int) -> int:
    """Ties to the even integer, then clamped."""
    exact = Fraction(float(value))
    floor = math.floor(exact)
    rest = exact - floor
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and floor % 2 == 1)
    return max(low, min(high, floor + int(up)))


def power_scale(amax: float, rule: str, largest: int, mantissa: float) -> F:
    """The scale of an MX group: a power of two. largest: exponent of the element format's largest value."""
    if amax == 0:
        return F(2.0**-127)
    part, exponent = math.frexp(float(amax))
    part, exponent = part * 2, exponent - 1  # 1 <= part < 2
    exact = {
        "floor": exponent - largest,
        "even": exponent - largest + int(part >= 1.75),
        "rceil": math.ceil(Fraction(exponent - largest)) + int(Fraction(part) > Fraction(mantissa)),
    }[rule]
    return F(2.0 ** max(-127, min(127, exact)))


def quantize_row(row: np.ndarray, base: str, amax: object = None) -> np.ndarray:
    """One token, float32, finite. amax: a number, or one a feature, for static formats."""
    row = row.astype(F)
    if base.startswith("mx"):
        kind, rule = base.split("_")
        table, largest, top = (E4M3, 8, 1.75) if kind == "mxfp8" else (E2M1, 2, 1.5)
        scales = []
        for at in range(0, row.size, 32):
            group = row[at : at + 32]
            scales += [power_scale(float(np.abs(group).max()), rule, largest, top)] * group.size
        return _by_table(row, scales, table)
    if base == "nvfp4":
        with np.errstate(over="ignore"):
            overall = F(1) / max(F(amax), np.finfo(F).tiny) * F(448 * 6)
        overall = overall if np.isfinite(overall) else F(1)
        scales = []
        for at in range(0, row.size, 16):
            group = row[at : at + 16]
            local = F(nearest(overall * (np.abs(group).max() / F(6)), E4M3))
            scales += [(local or F(0.125)) / overall] * group.size
        return _by_table(row, scales, E2M1)
    kind, scope = base.split("_")
    ranges = [np.abs(row).max()] * row.size if scope == "token" else np.broadcast_to(np.asarray(amax, F), row.shape)
    if kind == "fp8":
        return _by_table(row, [F(one) / F(448) or F(2.0**-23) for one in ranges], E4M3)
    half = 128 if kind == "int8" else 8
    out = np.empty_like(row)
    for j, value in enumerate(row):
        scale = F(ranges[j]) / F(half - 0.5) or F(2.0**-23)
        out[j] = F(nearest_integer(value / scale, -half, half - 1)) * scale
    return out


def _by_table(row: np.ndarray, scales: list[F], table: list[float]) -> np.ndarray:
    return np.array([F(nearest(value / scale, table)) * scale for value, scale in zip(row, scales, strict=True)], F)


def hadamard(block: int) -> np.ndarray:
    """Sylvester's matrix over sqrt(block), float64: the sign is the parity of the bits that both numbers have."""
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]
    return np.array(signs) / math.sqrt(block)
