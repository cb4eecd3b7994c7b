"""Counts one layer by torch's own operators: on any device, and the reference of the Triton kernels.

About 150 launches a layer, which is too slow for a GPU that computes the model in the same time. Knows tensors of one layer.
"""

from __future__ import annotations

import torch

from outliers.counting.bits import PATTERNS
from outliers.counting.in_pass.counter import PassShape
from outliers.counting.in_pass.state import KEY_BASE, DeviceState, Group, SiteState
from outliers.counting.kernels.arguments import BFLOAT16, FLOAT16, FLOAT32, KEY_SHIFT, LAST_SOURCE
from outliers.spec import BLOCK


def count_group(state: DeviceState, shape: PassShape, group: Group) -> None:
    """Add a group to the state of its device."""
    sites, layer, tensors, lengths = group
    for row, length in enumerate(lengths):
        magnitudes = []
        for site, tensor in zip(sites, tensors, strict=True):
            signed = tensor[row, :length].int()  # (position, feature), sign-extended
            magnitudes.append(_count_site(state, shape, site, layer, row, signed))
        if len(sites) == 2:
            _count_hits(state, state.sites[BLOCK], layer, row, torch.maximum(*magnitudes))


def _count_site(
    state: DeviceState, shape: PassShape, site: str, layer: int, row: int, signed: torch.Tensor
) -> torch.Tensor:
    """Count one site; returns its magnitudes as bits, -1 where a value is not finite."""
    rules, own, length = state.rules, state.sites[site], signed.shape[0]
    magnitude = signed & rules.mask
    finite = magnitude < rules.infinity
    own.nonfinite[layer] += (~finite).sum(0)
    ordered = signed ^ ((signed >> 31) & rules.mask)
    least = torch.where(finite, ordered, own.extremes[0, layer]).amin(0)
    greatest = torch.where(finite, ordered, own.extremes[1, layer]).amax(0)
    own.extremes[0, layer] = torch.minimum(own.extremes[0, layer], least)
    own.extremes[1, layer] = torch.maximum(own.extremes[1, layer], greatest)
    own.histogram[layer] += torch.bincount(_patterns(signed, rules.kind)[finite], minlength=PATTERNS)
    found = torch.where(finite, magnitude, -1)
    own.tops[row, layer] = found.amax(0).clamp(min=0)
    _count_hits(state, own, layer, row, found)
    _add_moments(own, shape, layer, torch.where(finite, _values(signed, rules.kind), 0.0))
    captured = state.frame.captured
    source = LAST_SOURCE - (layer * len(captured) + captured.index(site))
    key = (magnitude.long() << KEY_SHIFT) | (source << 1) | (signed < 0)
    key = torch.where(finite, key, 0) + KEY_BASE[state.frame.dtype]
    own.keys[row, :length] = torch.maximum(own.keys[row, :length], key.to(own.keys.dtype))
    return found


def _count_hits(state: DeviceState, own: SiteState, layer: int, row: int, magnitudes: torch.Tensor) -> None:
    for step, limit in enumerate(state.rules.ladder):
        hits = magnitudes >= limit
        own.hits[step, layer] += hits.sum(0)
        own.first_hits[step, layer] += hits[0]
        if step == state.rules.deciding_step:
            own.own_hits[row, layer] = hits.sum(0).int()


def _add_moments(own: SiteState, shape: PassShape, layer: int, values: torch.Tensor) -> None:
    """Add the powers of (position, feature) float64 row after row, a span at a time, as the compiled loops do."""
    square = values * values
    powers = torch.stack([values, square, square * values, square * square])  # (4, position, feature)
    for start, count in shape.spans(values.shape[0]):
        total = torch.zeros_like(powers[:, 0])
        for position in range(start, start + count):
            total += powers[:, position]
        own.moments[:, layer] += total


def _values(signed: torch.Tensor, kind: int) -> torch.Tensor:
    """int32 of sign-extended bits as float64, exactly."""
    if kind == FLOAT32:
        return signed.view(torch.float32).double()
    if kind == BFLOAT16:
        return (signed << 16).view(torch.float32).double()
    return signed.to(torch.int16).view(torch.float16).double()


def _patterns(signed: torch.Tensor, kind: int) -> torch.Tensor:
    """The histogram's bins of values, int64: the pattern, of float32 that of the value rounded to bfloat16, ties to even."""
    if kind in (BFLOAT16, FLOAT16):
        return signed.long() & 0xFFFF
    bits = signed.long() & 0xFFFF_FFFF
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # the largest float32 would round to infinity; it is counted as the largest finite bfloat16
    return torch.where((rounded & 0x7FFF) == 0x7F80, rounded - 1, rounded) & 0xFFFF
