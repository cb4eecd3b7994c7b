"""Counts one layer by the Triton kernels of `triton_kernels`: two launches a group and one more for its second site.

Knows tensors of one layer, and how they are handed to a kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from outliers.counting.in_pass import triton_kernels as kernels
from outliers.counting.in_pass.counter import PassShape
from outliers.counting.in_pass.state import DeviceState, Group
from outliers.counting.kernels.arguments import LAST_SOURCE
from outliers.spec import BLOCK

MOMENT_COLUMNS = 32
"""Columns of a program that adds float sums: a warp's."""


def count_group(state: DeviceState, shape: PassShape, group: Group) -> None:
    """Add a group to the state of its device, as `torch_ops.count_group` does."""
    if state.device.type == "cuda":
        # a launch goes to the current device, which is not that of every layer of a model that is split
        with torch.cuda.device(state.device):
            _launch(state, shape, group)
    else:
        _launch(state, shape, group)


def _launch(state: DeviceState, shape: PassShape, group: Group) -> None:
    sites, layer, tensors, lengths = group
    frame, rules = state.frame, state.rules
    values = [tensor.contiguous() for tensor in tensors]
    one, other = state.sites[sites[0]], state.sites[sites[-1]]
    both = state.sites[BLOCK] if len(sites) == 2 else one
    batch, positions, width = values[0].shape
    own = state.lengths_of(lengths)
    sources = [(LAST_SOURCE - (layer * len(frame.captured) + frame.captured.index(site))) << 1 for site in sites]
    kind = {"KIND": rules.kind, "MASK": rules.mask, "INFINITY": rules.infinity}
    grid = (_ceil(positions, kernels.ROWS.value), _ceil(width, kernels.COLUMNS.value), batch)
    pairs: list[Any] = []
    for name in ("hits", "first_hits", "own_hits"):
        pairs += [getattr(one, name), getattr(other, name), getattr(both, name)]
    for name in ("extremes", "nonfinite", "histogram", "tops", "keys"):
        pairs += [getattr(one, name), getattr(other, name)]
    kernels.count_tile[grid](
        *(values[0], values[-1], own, rules.ladder, *pairs),
        *(positions, shape.positions, width, layer, frame.num_layers, sources[0], sources[-1]),
        PAIR=len(sites) == 2,
        STEPS=len(frame.ladder),
        DECIDING=rules.deciding_step,
        num_warps=4,
        **kind,
    )
    for site, bits in zip(sites, values, strict=True):
        kernels.add_moments[(_ceil(width, MOMENT_COLUMNS),)](
            *(bits, own, state.sites[site].moments, positions, width, layer, frame.num_layers, batch),
            shape.span_positions,
            WIDE=MOMENT_COLUMNS,
            num_warps=1,
            enable_fp_fusion=False,
            **kind,
        )


def _ceil(size: int, step: int) -> int:
    return -(-size // step)
