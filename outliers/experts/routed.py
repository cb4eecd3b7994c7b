"""The experts of one layer in one forward pass, in one form for every family and every implementation of its products.

A token is a position of a sequence of the batch: `token = row * positions + position`. A slot is one of the k experts that a
token is routed to. Padding is routed too: who counts leaves out the positions beyond a sequence's length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shared:
    """One shared expert, which every token reaches. T tokens, J its width, H hidden dimensions.

    down_in: (T, J), the input of its second projection. output: (T, H), what that projection gives. weight: (T,) float32, what
    the output is multiplied by before it is added; None for 1.
    """

    down_in: torch.Tensor
    output: torch.Tensor
    weight: torch.Tensor | None


@dataclass(frozen=True)
class Routing:
    """Where the tokens of one layer go, as far as the router decides it. experts, weights: as in `Routed`."""

    layer: int
    experts: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Routed:
    """The experts of one layer. T tokens, k slots, R = T x k rows, I the width of an expert, H hidden dimensions.

    layer: of the model. experts: (T, k) int64. weights: (T, k) float32, what an output is multiplied by before it is added, in
    the slots' order. applied: whether `output` holds the weight already (Llama4, whose inputs are multiplied). margin: (T,)
    float32, the smallest score of a chosen expert less the largest of one that was not chosen, in the score by which the router
    chooses; NaN where every expert is chosen. rows: (R,) int64, row r of the next two is the slot rows[r] % k of the token
    rows[r] // k. down_in: (R, I), output: (R, H), in the model's dtype: the input of the expert's second projection, and what it
    gives with its bias. block: (T, H), the sum that the layer adds to its residual stream. These four are None where kernels hide
    them and routing alone is read; all but `block` are where each expert was handed over as it was computed. The tensors are the
    model's own and valid until the hook returns.
    """

    layer: int
    experts: torch.Tensor
    weights: torch.Tensor
    applied: bool
    margin: torch.Tensor
    rows: torch.Tensor | None
    down_in: torch.Tensor | None
    output: torch.Tensor | None
    block: torch.Tensor | None
    shared: tuple[Shared, ...]
