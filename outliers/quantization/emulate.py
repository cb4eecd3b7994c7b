"""Number formats as functions of tensors: what a value is after it was quantized and dequantized.

Every rule is in docs/quantization.md with its source, and is held bit by bit to the library compressed-tensors where that has
it. All arithmetic is float32, whatever the tensor's dtype: a quantizing kernel computes its scales so. It works on any device
of torch and gives the same bits there, for it only adds, multiplies, divides and rounds to nearest, ties to even. Knows
tensors, nothing of captures; `kernels` has the same rules compiled, for sums over a whole capture.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from outliers.errors import BadInput
from outliers.spec.formats import Format

FP8_MAX: Final = 448.0
"""Largest finite value of E4M3 (OCP 8-bit floating point specification 1.0, table 1)."""
FP4_MAX: Final = 6.0
"""Largest value of E2M1 (OCP microscaling formats specification 1.0, section 5.3.3)."""
NVFP4_ZERO_SCALE: Final = 0.125
"""Scale of a group whose own scale rounds to 0 in E4M3: every value of it then rounds to 0."""
FLOAT32_EPS: Final = 2.0**-23
"""Scale of what is 0 everywhere, or too small for a scale of its own."""
INT_HALF: Final = {"int8": 128, "int4": 8}
"""Half of the codes: they are -half to half - 1, and the scale is absmax / (half - 0.5)."""
MX_OFFSET: Final = {"mxfp8": 8, "mxfp4": 2}
"""Exponent of the largest value of the element's format (OCP MX 1.0, section 6.3)."""
MX_ROUND: Final = {"floor": 0, "even": 0x200000, "rceil": 0x1FFFFF}
"""What is added to the bits of a group's float32 maximum before its exponent is read: nothing; a quarter, which carries from 1.75
on, where E2M1 would round up to the next power of two; just less, which carries above 1.75 = 448 / 256."""


def emulate(x: Tensor, fmt: Format, *, amax: float | Tensor | None = None, held: Tensor | None = None) -> Tensor:
    """Values after quantizing and dequantizing, in the shape and dtype of `x`.

    x: (..., feature), any floating dtype; the float32 result is rounded to it. A token with a value that is not finite is NaN
    in every feature, so that it is seen.
    amax: the largest magnitude of the corpus, for static formats alone, of rotated values where the format rotates, without
    the held features: a number (int8_tensor, fp8_tensor, and nvfp4's global scale) or (feature,) (int8_channel). held:
    (feature,) bool, features that stay as they are: 0 while the others are rotated, scaled and rounded, and put back after.
    Raises BadInput where a static format has no range, or a shape or the rotation does not fit the features.
    """
    return _emulated(x, fmt, amax, held, weight=False)


def emulate_weight(w: Tensor, fmt: Format) -> Tensor:
    """A weight after quantizing and dequantizing, in its shape and dtype.

    w: (out, in). Groups and the rotation run along the input dimension. int8_channel and the formats of a token have a scale
    an output row; those of a tensor, and nvfp4's global scale, the weight's own largest magnitude. A row with a value that is
    not finite is NaN everywhere. Raises BadInput.
    """
    if w.ndim != 2:
        raise BadInput(f"a weight has the shape (out, in), this one {tuple(w.shape)}")
    return _emulated(w, fmt, None, None, weight=True)


def _emulated(x: Tensor, fmt: Format, amax: float | Tensor | None, held: Tensor | None, *, weight: bool) -> Tensor:
    if not x.is_floating_point() or not x.ndim:
        raise BadInput(f"{fmt.name} quantizes floating point values, this is {x.dtype} of shape {tuple(x.shape)}")
    check_rotation(fmt, x.shape[-1])
    if held is not None and (held.dtype != torch.bool or held.shape != x.shape[-1:]):
        raise BadInput(f"held features are bool of shape ({x.shape[-1]},), not {held.dtype} of {tuple(held.shape)}")
    values = x.detach().float()
    finite = values.isfinite().all(dim=-1, keepdim=True)
    values = torch.where(finite, values, 0.0)
    if held is not None:
        held = held.to(x.device)
        values = torch.where(held, 0.0, values)
    values = rotate(values, fmt.rotation)
    if weight:
        amax = values.abs().max() if fmt.is_static and values.numel() else 0.0
        base = "int8_token" if fmt.base == "int8_channel" else fmt.base
    else:
        amax, base = _checked_range(fmt, amax, values), fmt.base
    out = rotate(_quantized(values, base, amax), fmt.rotation)
    if x.dtype == torch.float16:
        # a scale that was rounded up may lead beyond the largest value, which is not infinity
        out = out.clamp(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max)
    out = torch.where(finite, out, math.nan).to(x.dtype)
    return out if held is None else torch.where(held & finite, x.detach(), out)


def check_rotation(fmt: Format, width: int) -> None:
    """Raise BadInput where the blocks of the rotation do not divide the features."""
    if fmt.rotation and width % fmt.rotation:
        raise BadInput(f"{fmt.name} rotates blocks of {fmt.rotation} features, and {width} is not a multiple of it")


def rotate(x: Tensor, block: int) -> Tensor:
    """Each block of `block` neighbouring features times the Hadamard matrix of Sylvester's order over sqrt(block); float32.

    It is its own inverse. block: a power of two that divides the features, or 0, which changes nothing. The sums run in the
    order of the fast transform, stage by stage.
    """
    if not block:
        return x
    half = 1
    while half < block:
        pairs = x.reshape(*x.shape[:-1], x.shape[-1] // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return x * rotation_factor(block)


def rotation_factor(block: int) -> float:
    """1 / sqrt(block), as the float32 that both directions multiply by."""
    return float(torch.tensor(1 / math.sqrt(block), dtype=torch.float32))


def _checked_range(fmt: Format, amax: float | Tensor | None, values: Tensor) -> Tensor:
    """The range of a static format as float32 on the tensor's device; 0 for others."""
    if not fmt.is_static:
        return values.new_zeros(())
    if amax is None:
        raise BadInput(f"{fmt.name} is static: its scale needs amax, the largest magnitude of the corpus")
    found = torch.as_tensor(amax, dtype=torch.float32).to(values.device)
    wanted = values.shape[-1:] if fmt.base == "int8_channel" else torch.Size()
    if found.shape != wanted and not (found.numel() == 1 and wanted == torch.Size()):
        raise BadInput(f"amax of {fmt.name} has the shape {tuple(wanted)}, not {tuple(found.shape)}")
    if not bool((found.isfinite() & (found >= 0)).all()):
        raise BadInput(f"amax of {fmt.name} is a finite magnitude, not negative: {found.flatten()[:4].tolist()}")
    return found.reshape(wanted)


def _quantized(values: Tensor, base: str, amax: float | Tensor) -> Tensor:
    """Finite float32 values by the rule of a base format. amax: of static formats."""
    if not values.numel():
        return values
    kind, _, scope = base.partition("_")
    largest = torch.as_tensor(amax, dtype=torch.float32, device=values.device)
    if kind == "nvfp4":
        return _nvfp4(values, largest)
    if kind in MX_OFFSET:
        return _mx(values, kind, MX_ROUND[scope])
    if scope == "token":
        largest = values.abs().amax(dim=-1, keepdim=True)
    if kind == "fp8":
        scale = _above_zero(_divided(largest, FP8_MAX), FLOAT32_EPS)
        return round_e4m3(values / scale + 0.0) * scale
    half = INT_HALF[kind]
    scale = _above_zero(_divided(largest, half - 0.5), FLOAT32_EPS)
    # + 0.0 gives -0.0 the sign that the library's zero point gives it
    return (values / scale + 0.0).clamp(-half, half - 1).round() * scale


def _nvfp4(values: Tensor, amax: Tensor) -> Tensor:
    """Groups of 16 with a scale in E4M3, under one float32 scale of the tensor."""
    groups, width = _grouped(values, 16)
    overall = global_scale(amax)
    local = round_e4m3(overall * _divided(groups.abs().amax(dim=-1, keepdim=True), FP4_MAX))
    scale = _above_zero(local, NVFP4_ZERO_SCALE) / overall
    return (round_e2m1(groups / scale + 0.0) * scale).flatten(-2)[..., :width]


def global_scale(amax: Tensor) -> Tensor:
    """nvfp4's scale of a tensor, (1 / amax) * 2688 in float32, rounded twice as in the library; 1 where that is not finite."""
    found = amax.clamp_min(torch.finfo(torch.float32).tiny).reciprocal() * (FP8_MAX * FP4_MAX)
    return torch.where(found.isfinite(), found, 1.0)


def _mx(values: Tensor, kind: str, added: int) -> Tensor:
    """Groups of 32 with a scale that is a power of two, 2^-127 to 2^127 (E8M0)."""
    groups, width = _grouped(values, 32)
    bits = groups.abs().amax(dim=-1, keepdim=True).view(torch.int32)
    exponent = ((bits + added) >> 23) - 127 - MX_OFFSET[kind]
    scale = torch.ldexp(torch.ones_like(groups[..., :1]), exponent.clamp_min(-127))
    rounded = round_e2m1 if kind == "mxfp4" else round_e4m3
    return (rounded(groups / scale + 0.0) * scale).flatten(-2)[..., :width]


def _grouped(values: Tensor, size: int) -> tuple[Tensor, int]:
    """(..., group, size), and the number of features. The last group may have fewer features; zeros stand for the others."""
    width = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -width % size))
    return padded.reshape(*values.shape[:-1], padded.shape[-1] // size, size), width


def _divided(x: Tensor, by: float) -> Tensor:
    """A division on every device: CUDA multiplies by the reciprocal where the divisor is a number."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def _above_zero(scale: Tensor, instead: float) -> Tensor:
    return torch.where(scale == 0, instead, scale)


def round_e4m3(x: Tensor) -> Tensor:
    """float32 to the nearest value of E4M3, ties to even, magnitudes above 448 to 448."""
    return _rounded(x, FP8_MAX, mantissa=3, least_exponent=-6)


def round_e2m1(x: Tensor) -> Tensor:
    """float32 to the nearest value of E2M1 (0, .5, 1, 1.5, 2, 3, 4, 6), ties to even, magnitudes above 6 to 6."""
    return _rounded(x, FP4_MAX, mantissa=1, least_exponent=0)


def _rounded(x: Tensor, largest: float, *, mantissa: int, least_exponent: int) -> Tensor:
    """To `mantissa` bits behind the leading one: a power of two is added whose last bit is that bit, and taken away again."""
    size = x.abs().clamp_max(largest)
    exponent = (size.view(torch.int32) & 0x7F800000).clamp_min((127 + least_exponent) << 23)
    power = (exponent + ((23 - mantissa) << 23)).view(torch.float32)
    return torch.copysign((size + power) - power, x)
