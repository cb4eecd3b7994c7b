"""FP8 weights of a checkpoint and their scales: which belong together, and the plain weight that they make.

A weight is stored as float8 values, with one scale for each block of rows and columns, or one for all: weight = values *
scale. The last blocks may be smaller: DeepSeek-V3's `kv_a_proj_with_mqa` has 576 rows in blocks of 128. A scale that is
missing, has another name, or does not fit is refused; no weight is used without its scale. transformers' own code divides
the number of rows by the number of rows of scales instead, which is another product where the last block is smaller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from outliers.errors import UnknownModel
from outliers.hub.headers import Tensor, named

if TYPE_CHECKING:
    import torch

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""dtypes of a header whose values are weights without their scale."""
SCALES = ("F32", "BF16", "F16", "F8_E8M0")
"""dtypes of a header that a scale may have; F8_E8M0 is a power of two."""
DEFAULT_BLOCK = (128, 128)
"""Rows and columns of a block where quantization_config names none (transformers' FineGrainedFP8Config)."""

_SUFFIX = "_scale_inv"
_ACTIVATIONS = re.compile(r"(^|[._])activation_scale(_inv)?$")
"""Scales of what a layer receives, where it is quantized too: they do not belong to a weight."""


class Pair(NamedTuple):
    """Names of a float8 weight and its scale in the checkpoint, and the rows and columns of a block."""

    weight: str
    scale: str
    block: tuple[int, int]


def pairs(tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None, name: str) -> list[Pair]:
    """Each float8 weight of a checkpoint with its scale. `quantization`: its quantization_config.

    Raises UnknownModel, naming the model `name`, where a float8 weight has no scale that fits it.
    """
    weights = [key for key, tensor in tensors.items() if tensor.dtype in FLOAT8 and not _is_scale(key)]
    if weights and quantization is None:
        raise UnknownModel(
            f"{name} holds {len(weights)} weights in FP8, first {named(weights)}, and its config.json has no "
            f"quantization_config that says how they are scaled: {_REMEDY}"
        )
    scales = {key: scale for key in weights if (scale := _scale_of(key, tensors)) is not None}
    unscaled = [key for key in weights if key not in scales]
    if unscaled:
        others = [key for key in tensors if key.startswith(unscaled[0].removesuffix("weight")) and "scale" in key]
        others_there = f" (there is {named(others)})" if others else ""
        raise UnknownModel(
            f"{name} holds {len(unscaled)} weights in FP8 without their scale, first {named(unscaled)}: "
            f"{unscaled[0]}{_SUFFIX} is not there{others_there}, and without it the weight has another size: {_REMEDY}"
        )
    return [_fitting(key, scale, tensors, quantization or {}, name) for key, scale in scales.items()]


_REMEDY = "take a checkpoint of the same model in bfloat16, or one that transformers wrote"


def weight_of(key: str, names: Collection[str]) -> str | None:
    """The name of the weight that a scale belongs to, as the names alone tell; None where `key` is not such a scale."""
    owners = (key.removesuffix(_SUFFIX), f"{key.removesuffix('.scale')}.weight")
    return next((name for name in owners if name != key and name in names), None) if _is_scale(key) else None


def is_activation_scale(key: str) -> bool:
    """Whether a name is of a scale of what a layer receives: it belongs to no weight."""
    return _ACTIVATIONS.search(key) is not None


def _is_scale(key: str) -> bool:
    return key.endswith((_SUFFIX, ".scale"))


def _scale_of(key: str, tensors: Mapping[str, Tensor]) -> str | None:
    """`X_scale_inv` of a weight `X`; `Y.scale` of `Y.weight`, which transformers takes for the same."""
    other = f"{key.removesuffix('.weight')}.scale"
    return next((name for name in (key + _SUFFIX, other) if name in tensors), None)


def _fitting(key: str, scale: str, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any], name: str) -> Pair:
    """The pair of a weight and its scale, whose grid must be that of the blocks, or one number."""
    shape, grid, dtype = tensors[key].shape, tensors[scale].shape, tensors[scale].dtype
    rows, columns = shape[-2:] if len(shape) > 1 else (1, math.prod(shape))
    given = quantization.get("weight_block_size", DEFAULT_BLOCK)
    # `configs` refused anything but two whole numbers
    block = (max(1, rows), max(1, columns)) if given is None else (int(given[0]), int(given[1]))
    wanted = (*shape[:-2], math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    one = math.prod(grid) == 1 and (math.prod(wanted) == 1 or quantization.get("weight_block_size") is None)
    if dtype not in SCALES or not (one or grid == wanted):
        raise UnknownModel(
            f"{name}: {scale} is {dtype} of shape {list(grid)}, and {key} of shape {list(shape)} in blocks of "
            f"{block[0]} x {block[1]} has scales of shape {list(wanted)}: {_REMEDY}"
        )
    return Pair(key, scale, block)


def plain_shapes(
    tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None, name: str
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each weight once scales are applied: those of weights are gone, those of activations too.

    Raises UnknownModel where a scale is missing or does not fit.
    """
    used = {pair.scale for pair in pairs(tensors, quantization, name)}
    return {
        key: tensor.shape
        for key, tensor in tensors.items()
        if key not in used and not (quantization is not None and is_activation_scale(key))
    }


@dataclass(frozen=True)
class LazyWeight:
    """A float8 weight that is read, and multiplied by its scales, when transformers' loader slices it with `[...]`."""

    values: Any
    """safetensors' slice of a float8 tensor."""
    scales: Any
    block: tuple[int, int]

    def __getitem__(self, _: object) -> torch.Tensor:
        return dequantize(self.values[...], self.scales[...], self.block)


def dequantize(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """float32 weight of float8 `values` (..., row, column) and their `scales` (..., block of rows, block of columns).

    One scale for all where there is one number. The last block of rows and of columns may be smaller than the others.
    """
    plain, scales = values.float(), scales.float()
    if scales.numel() == 1:
        return plain * scales.reshape(())
    rows, columns = plain.shape[-2:]
    by_row = scales.repeat_interleave(block[0], dim=-2)[..., :rows, :]  # (..., row, block of columns)
    return plain * by_row.repeat_interleave(block[1], dim=-1)[..., :columns]
