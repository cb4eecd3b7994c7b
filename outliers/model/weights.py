"""Counts a model's parameters, its bytes on disk, and its bytes in memory part by part, from its modules without values.

It works on a model on the meta device: shapes and names are enough. Weights that share memory are counted once, where the
forward pass meets them first. All experts are counted in memory, of which a token uses some.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from outliers.model.activations import ActivationMemory, activation_memory

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

MXFP4_BLOCK = 32
"""Weights that share one 8-bit scale; each takes 4 bits (OCP Microscaling Formats 1.0): 4.25 bits a weight."""
BNB_BLOCK = 64
"""Weights that share one float32 scale in bitsandbytes' 4-bit formats, its default; double quantization takes less."""

FUSED_METHODS = ("mxfp4", "fp8")
"""Methods that quantize experts, which are 3-D parameters. The others quantize linear layers only and leave experts plain."""


class Weights(BaseModel):
    """Numbers of parameters and bytes of one model, in its parts in the order of a forward pass.

    `active_parameters`: all but the routed experts, and of those the share that one token is routed to. Embedding and
    head are in both numbers; some publications leave the embedding out of theirs. `checkpoint_bytes` is what lies on
    disk, the rest is memory once loaded. `..._modules` are names in the model, for a device map.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    total_parameters: int
    active_parameters: int
    checkpoint_bytes: int
    embedding_bytes: int
    layer_bytes: tuple[int, ...]
    rest_bytes: int
    embedding_modules: tuple[str, ...]
    """The embedding, and what has no weights of its own: rotary tables, dropout, a head that is the embedding."""
    rest_modules: tuple[str, ...]
    """Final norm, head, vision tower: all that is neither embedding nor decoder layer."""
    work: ActivationMemory

    @property
    def parts(self) -> tuple[int, ...]:
        """Bytes of embedding, each decoder layer, and the rest."""
        return (self.embedding_bytes, *self.layer_bytes, self.rest_bytes)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return sum(self.parts)


class _Weight(NamedTuple):
    name: str
    module: torch.nn.Module
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def path(self) -> str:
        """Of the module it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def routed(self) -> bool:
        """One of the experts among which a router chooses; shared experts have another name."""
        return "experts" in self.name.split(".")


def weigh(
    model: torch.nn.Module,
    layers_path: str,
    dtype: str,
    quantization: Mapping[str, Any] | None,
    experts: tuple[int, int] | None,
    *,
    checkpoint_dtype: str | None = None,
) -> Weights:
    """Weights of `model` (values not needed), whose decoder layers are the list at `layers_path`.

    dtype: of what is not quantized. quantization: the checkpoint's quantization_config where weights stay quantized in
    memory, None where they are plain or are made plain on loading; an unknown method is counted in `dtype`, an upper
    bound. experts: (experts of a layer, those a token is routed to). checkpoint_dtype: where it is another on disk.
    Buffers are left out: those of a decoder layer stay below a kilobyte an expert.
    """
    sizes = _sizes(model, ITEM_BYTES[dtype], quantization, kept_in_float32(model, dtype))
    parts = _parts(model, layers_path)
    total, routed = 0, 0
    for weight in _weights(model, "", set()):
        total += weight.numel
        routed += weight.numel * weight.routed
    active = total if experts is None else total - routed + routed * experts[1] // experts[0]
    seen: set[int] = set()
    taken = {name: sum(map(sizes, _weights(part, name, seen))) for name, part in _in_order(parts)}
    rest = [name for name in parts.around if taken[name]]
    return Weights(
        total_parameters=total,
        active_parameters=active,
        checkpoint_bytes=_checkpoint_bytes(model, layers_path, checkpoint_dtype or dtype),
        embedding_bytes=sum(taken[name] for name in parts.before),
        layer_bytes=tuple(taken[name] for name in parts.layers),
        rest_bytes=sum(taken[name] for name in rest),
        embedding_modules=(*parts.before, *(name for name in parts.around if not taken[name])),
        rest_modules=tuple(rest),
        work=activation_memory(model, layers_path, experts),
    )


class _Parts(NamedTuple):
    """Modules and parameters that together are the whole model, by name: what the forward pass meets before the layers,
    the layers, and all the rest."""

    before: dict[str, Any]
    layers: dict[str, Any]
    around: dict[str, Any]


def _parts(model: torch.nn.Module, layers_path: str) -> _Parts:
    parts = _Parts({}, {}, {})
    node, prefix = model, ""
    steps = layers_path.split(".")
    for depth, step in enumerate(steps, 1):
        parts.around.update((prefix + name, weight) for name, weight in node.named_parameters(recurse=False))
        group = parts.before if depth == len(steps) else parts.around
        for name, child in node.named_children():
            if name == step:
                group = parts.around
            else:
                group[prefix + name] = child
        node, prefix = node.get_submodule(step), f"{prefix}{step}."
    parts.layers.update((prefix + name, layer) for name, layer in node.named_children())
    return parts


def _in_order(parts: _Parts) -> Iterator[tuple[str, Any]]:
    for group in parts:
        yield from group.items()


def _weights(part: Any, name: str, seen: set[int]) -> Iterator[_Weight]:
    """Each parameter of a module (or the one that `part` is) that is not in `seen`, with the module it belongs to."""
    if not hasattr(part, "named_modules"):
        if id(part) not in seen:
            seen.add(id(part))
            yield _Weight(name, part, tuple(part.shape))
        return
    for path, module in part.named_modules(prefix=name):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield _Weight(f"{path}.{leaf}" if path else leaf, module, tuple(parameter.shape))


def _checkpoint_bytes(model: Any, layers_path: str, dtype: str) -> int:
    """Bytes on disk: as the config says it is quantized, with the layers for further tokens that are not loaded."""
    config = model.config.get_text_config()
    stored = getattr(model.config, "quantization_config", None) or getattr(config, "quantization_config", None)
    item = ITEM_BYTES[dtype]
    size = _sizes(model, item, stored if stored is None or isinstance(stored, Mapping) else stored.to_dict())
    total = sum(map(size, _weights(model, "", set())))
    extra = int(getattr(config, "num_nextn_predict_layers", None) or 0)
    if not extra:
        return total
    # each is a decoder layer with a projection of two hidden states to one, and copies of embedding and head
    deepest = f"{layers_path}.{int(config.num_hidden_layers) - 1}"
    layer = sum(map(size, _weights(model.get_submodule(deepest), deepest, set())))
    return total + extra * (layer + 2 * item * int(config.hidden_size) * int(config.vocab_size + config.hidden_size))


def kept_in_float32(model: Any, dtype: str) -> re.Pattern[str] | None:
    """Finds the names of the weights that transformers loads in float32 although `dtype` is asked for; None without any.

    Families name them: `_keep_in_fp32_modules_strict` under every dtype, `_keep_in_fp32_modules` under float16 alone
    (PreTrainedModel._get_dtype_plan). A `*` stands for any characters. From transformers 5.24 on they are the routers of
    DeepSeek-V3 and GLM-4.5, for instance.
    """
    names = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == "float16":
        names += getattr(model, "_keep_in_fp32_modules", None) or ()
    return re.compile("|".join(name.replace("*", ".*") for name in names)) if names else None


def _sizes(
    model: Any, item_bytes: int, quantization: Mapping[str, Any] | None, wide: re.Pattern[str] | None = None
) -> Callable[[_Weight], int]:
    """The function _Weight -> bytes under a quantization_config. wide: names of weights that are plain in float32."""
    method = str(quantization.get("quant_method", "")) if quantization else ""

    def unquantized(weight: _Weight) -> int:
        return weight.numel * (ITEM_BYTES["float32"] if wide and wide.search(weight.name) else item_bytes)

    if not quantization or method not in _METHODS:
        return unquantized
    plain = _plain_modules(model, quantization)

    def size(weight: _Weight) -> int:
        fused = weight.routed and len(weight.shape) == 3 and method in FUSED_METHODS
        linear = type(weight.module).__name__ == "Linear" and len(weight.shape) == 2 and method != "mxfp4"
        if (fused or linear) and not any(_matches(pattern, weight.path) for pattern in plain):
            return _METHODS[method](weight.shape, quantization)
        return unquantized(weight)

    return size


def _plain_modules(model: Any, quantization: Mapping[str, Any]) -> list[str]:
    """Patterns of modules that stay plain: those the config names, else the head, as transformers has it."""
    named = quantization.get("modules_to_not_convert") or quantization.get("llm_int8_skip_modules")
    if named is not None:
        return list(named)
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern of modules_to_not_convert means the module at `path`: a beginning, or an end."""
    return bool(re.match(pattern, path)) or path.endswith(pattern)


def _mxfp4_bytes(shape: tuple[int, ...], _: Mapping[str, Any]) -> int:
    numel = math.prod(shape)
    return numel // 2 + math.ceil(numel / MXFP4_BLOCK)


def _fp8_bytes(shape: tuple[int, ...], quantization: Mapping[str, Any]) -> int:
    """A byte a weight and a float32 scale a block, or one a matrix where the config gives no block size."""
    rows, columns = quantization.get("weight_block_size") or shape[-2:]
    blocks = math.prod(shape[:-2]) * math.ceil(shape[-2] / rows) * math.ceil(shape[-1] / columns)
    return math.prod(shape) + 4 * blocks


def _grouped_bytes(shape: tuple[int, ...], quantization: Mapping[str, Any]) -> int:
    """GPTQ, AWQ: `bits` a weight; a group has a 16-bit scale and a zero point; a column its group's number."""
    out_features, in_features = shape
    bits, group = int(quantization.get("bits", 4)), int(quantization.get("group_size", 128))
    groups = 1 if group <= 0 else math.ceil(in_features / group)
    return math.ceil((bits * math.prod(shape) + groups * out_features * (16 + bits)) / 8) + 4 * in_features


def _bnb_bytes(shape: tuple[int, ...], quantization: Mapping[str, Any]) -> int:
    numel = math.prod(shape)
    if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
        return math.ceil(numel / 2) + 4 * math.ceil(numel / BNB_BLOCK)
    return numel + 4 * shape[0]


_METHODS = {
    "mxfp4": _mxfp4_bytes,
    "fp8": _fp8_bytes,
    "gptq": _grouped_bytes,
    "awq": _grouped_bytes,
    "bitsandbytes": _bnb_bytes,
    "bitsandbytes_4bit": _bnb_bytes,
    "bitsandbytes_8bit": _bnb_bytes,
}
