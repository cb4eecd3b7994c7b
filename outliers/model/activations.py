"""The memory that one decoder layer takes besides its weights while tokens pass through it, from its modules' shapes.

An upper bound: reasoned, then measured (`tests/model/test_activations.py` measures five families on a processor). Only the hidden
state is kept from layer to layer, so the layer that takes most decides. Linear layers are found by type and experts by
name; no family is special except for what the constants say.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

HELD_WIDTHS = 4
"""Hidden states alive throughout: the residual, its sum, the norm's output, and what a hook is copying."""
WIDEST_COPIES = 4
"""Copies of the widest output of a block, besides each linear layer's own. An activation function written in Python takes
four (GPT-2's: half the input, its cube, a product and a sum); gates, rotation and repeated heads take fewer."""
NORM_FLOATS = 3
"""A norm's input, its square and its product in float32, whatever the dtype."""
RECURRENT_FLOATS = 6
"""float32 tensors of a linear-attention layer, in channels of its convolution: queries, keys, values, each decayed and
weighted (`torch_chunk_gated_delta_rule`; the fused kernels take less)."""
SCORE_COPIES = 4
"""Attention scores of eager attention in the dtype: product, with the mask, less their maximum, softmax (gpt-oss)..."""
SCORE_FLOATS = 2
"""...or, where softmax computes in float32: once in the dtype, and twice in float32 (Llama)."""
MASK_BYTES = 4
"""A boolean mask, the one it was combined from, and one in the dtype, for each pair of positions of a sequence."""


class ActivationMemory(BaseModel):
    """Elements a token in the layer that takes most: in the model's dtype, and in float32."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    elements: int
    float_elements: int
    heads: int
    windowed: bool
    """Whether some layers see a window of the sequence, for which there is an explicit mask."""
    unequal_heads: bool
    """Whether queries and values differ in width (multi-head latent attention): a processor's fused attention takes no
    such heads and the scores are written out; a GPU's may."""

    def bytes(self, sequences: int, positions: int, item_bytes: int, *, eager: bool, padded: bool) -> int:
        """Of one pass of `sequences` x `positions`. eager: attention that writes its scores out; padded: with a mask."""
        pairs = sequences * positions**2
        total = sequences * positions * (self.elements * item_bytes + self.float_elements * 4)
        if eager or self.unequal_heads:
            total += pairs * self.heads * max(SCORE_COPIES * item_bytes, item_bytes + SCORE_FLOATS * 4)
        if eager or padded or self.windowed:
            total += pairs * MASK_BYTES
        return total


def activation_memory(model: Any, layers_path: str, experts: tuple[int, int] | None) -> ActivationMemory:
    """What the layers at `layers_path` of `model` (values not needed) take; experts: (of a layer, a token's own)."""
    config = model.config.get_text_config()
    layers = list(model.get_submodule(layers_path))
    hidden = int(config.hidden_size)
    chosen = experts[1] if experts else 0
    return ActivationMemory(
        elements=max(_elements(layer, hidden, chosen) for layer in layers),
        float_elements=max(NORM_FLOATS * hidden + RECURRENT_FLOATS * _channels(layer) for layer in layers),
        heads=int(config.num_attention_heads),
        windowed=getattr(config, "sliding_window", None) is not None,
        unequal_heads=getattr(config, "v_head_dim", None) != getattr(config, "qk_head_dim", None),
    )


def _elements(layer: torch.nn.Module, hidden: int, chosen: int) -> int:
    linear, widest, routed = 0, 0, 0
    for path, module in layer.named_modules():
        weights = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
        if "experts" in path.split("."):
            routed = max([routed, *(_routed(tuple(p.shape), hidden) for p in weights if p.dim() == 3)])
        else:
            outputs = [_outputs(module, tuple(p.shape)) for p in weights]
            linear += sum(outputs)
            widest = max([widest, *outputs])
    return HELD_WIDTHS * hidden + linear + WIDEST_COPIES * widest + chosen * routed


def _routed(shape: tuple[int, ...], hidden: int) -> int:
    """Elements that one expert of one token takes. shape: (expert, out, in) or its transpose.

    grouped_mm copies: the token sorted to its expert, its weighted output, that in the order of the tokens, five widths
    with the products themselves; or, at the activation, about nine of an expert's own with both halves of the first product.
    """
    inner = math.prod(shape[1:]) // hidden  # twice the expert's width where two projections are fused
    own = math.ceil(inner / 2)
    return max(5 * hidden + own, hidden + 9 * own)


def _outputs(module: Any, shape: tuple[int, ...]) -> int:
    """Outputs a token of a weight (out, in); the transposed layers of GPT-2 say `nf` themselves."""
    return int(getattr(module, "nf", shape[0]))


def _channels(layer: Any) -> int:
    """Channels of the convolution before linear attention; 0 if there is none."""
    return max((int(module.out_channels) for module in layer.modules() if hasattr(module, "out_channels")), default=0)
