"""Stored values as integers: `abs(x) >= magnitude` is an integer comparison on the bits, exact in every dtype.

For IEEE formats without their sign bit, the order of the bits is the order of the magnitudes. Knows the three
dtypes and numpy; nothing of sites or captures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Format:
    """One dtype: `bits` unsigned integer of its size, `sign` its sign bit, `inf` the bits of infinity."""

    bits: np.dtype[Any]
    sign: int
    inf: int


FORMATS = {
    "bfloat16": Format(np.dtype("<u2"), 0x8000, 0x7F80),
    "float16": Format(np.dtype("<u2"), 0x8000, 0x7C00),
    "float32": Format(np.dtype("<u4"), 0x8000_0000, 0x7F80_0000),
}
PATTERNS = 65_536
"""Signed 16-bit patterns: the bins of a histogram."""


def threshold_bits(magnitude: float, dtype: str) -> int:
    """Bits of the smallest value of `dtype` that is >= magnitude (of infinity if there is none)."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = np.float16(magnitude)
        if float(half) < magnitude:
            half = np.nextafter(half, np.float16(np.inf))
        return int(half.view(np.uint16))
    with np.errstate(over="ignore"):
        single = np.float32(magnitude)
    if float(single) < magnitude:
        single = np.nextafter(single, np.float32(np.inf))
    bits = int(single.view(np.uint32))
    if dtype == "float32":
        return bits
    return (bits >> 16) + (1 if bits & 0xFFFF else 0)


def legacy_threshold_bits(magnitude: float, dtype: str) -> int:
    """Bits of the smallest value of `dtype` that is >= magnitude once rounded to bfloat16, ties to even."""
    target = threshold_bits(magnitude, "bfloat16")
    if dtype == "bfloat16":
        return target
    # halfway between the bfloat16 below the target and the target: it rounds to whichever is even
    halfway = ((target - 1) << 16) + 0x8000 + (target & 1)
    if dtype == "float32":
        return halfway
    return threshold_bits(float(np.uint32(halfway).view(np.float32)), "float16")


def bits_to_float(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Bit patterns of `dtype` as float32, exactly; same shape."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return (
        bits.astype(FORMATS[dtype].bits).view({"float16": np.float16, "float32": np.float32}[dtype]).astype(np.float32)
    )


def float_to_bits(values: NDArray[np.float32], dtype: str) -> NDArray[np.int64]:
    """Bits of non-negative values that `dtype` has exactly; same shape."""
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16).astype(np.int64)
    bits = values.astype(np.float32).view(np.uint32).astype(np.int64)
    return bits >> 16 if dtype == "bfloat16" else bits


def pattern_values(dtype: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Value of each of the 65,536 patterns as float64, and which are finite. For float32 the patterns are bfloat16."""
    patterns = np.arange(PATTERNS, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaNs among the patterns
        values = bits_to_float(patterns, "float16" if dtype == "float16" else "bfloat16").astype(np.float64)
    return values, np.isfinite(values)
