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
    """Bits of the smallest value of `dtype` that is >= magnitude (infinity's where none is)."""
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


def magnitudes(values: NDArray[Any], dtype: str) -> tuple[NDArray[Any], int]:
    """Bits of abs(values), same shape, and how many values are not finite; those read as 0 and so never hit."""
    form = FORMATS[dtype]
    mags = values.view(form.bits) & form.bits.type(form.sign - 1)
    if mags.size == 0 or int(mags.max()) < form.inf:
        return mags, 0
    wild = mags >= form.inf
    mags[wild] = 0
    return mags, int(np.count_nonzero(wild))


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored values as float32, exactly; same shape."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def bits_to_float(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Bit patterns of `dtype` as float32, exactly; same shape."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return (
        bits.astype(FORMATS[dtype].bits).view({"float16": np.float16, "float32": np.float32}[dtype]).astype(np.float32)
    )


def histogram_patterns(values: NDArray[Any], dtype: str) -> NDArray[np.uint16]:
    """The 16-bit pattern under which each value is counted: its own bits, or a float32 rounded to bfloat16."""
    if dtype != "float32":
        return values.view(np.uint16)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # the largest float32 would round to infinity: it is finite, and counted as the largest finite
    finite = (bits & np.uint32(0x7FFF_FFFF)) < np.uint32(0x7F80_0000)
    over = finite & ((rounded & np.uint32(0x7FFF)) >= np.uint32(0x7F80))
    rounded[over] -= np.uint32(1)
    return rounded.astype(np.uint16)


def pattern_values(dtype: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Value of each of the 65,536 patterns as float64, and which are finite. For float32 the patterns are bfloat16."""
    patterns = np.arange(PATTERNS, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaNs among the patterns
        values = bits_to_float(patterns, "float16" if dtype == "float16" else "bfloat16").astype(np.float64)
    return values, np.isfinite(values)
