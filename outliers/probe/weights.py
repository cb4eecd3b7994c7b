"""Changes weights for the time of a pass: one set to zero, or those behind a site quantized, layer by layer.

A changed weight takes the place of the original in its module, and the original comes back as the object that it was: nothing
is written into it. Only one layer's weights are there twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from outliers.errors import BadInput
from outliers.probe.edits import Place
from outliers.probe.readers import Reader
from outliers.quantization.emulate import emulate_weight
from outliers.spec.formats import Format

_OUTPUT = "down"
"""How a fused weight of experts begins that reads what is between the two projections, not the site."""


@dataclass(frozen=True)
class ReadingWeight:
    """A weight that multiplies a site's tensor. transposed: whether its dimensions are (in, out), experts apart."""

    module: torch.nn.Module
    name: str
    transposed: bool

    @property
    def tensor(self) -> torch.Tensor:
        """The weight that is in the module."""
        found = self.module._parameters[self.name]
        if found is None:
            raise BadInput(f"{type(self.module).__name__} has no weight {self.name}")
        return found

    def rows(self) -> torch.Tensor:
        """The weight as (out, in), or (expert, out, in): a view."""
        return self.tensor.transpose(-1, -2) if self.transposed else self.tensor


def reading_weights(readers: Sequence[Reader]) -> list[ReadingWeight]:
    """The weights of the readers of one site that multiply its tensor, routers left out."""
    found = []
    for reader in readers:
        if reader.is_router:
            continue
        for name, weight in reader.module.named_parameters(recurse=False):
            if weight.dim() == 2 or (weight.dim() == 3 and not name.startswith(_OUTPUT)):
                found.append(ReadingWeight(reader.module, name, _is_transposed(reader.module, weight)))
    return found


def _is_transposed(module: torch.nn.Module, weight: torch.Tensor) -> bool:
    if weight.dim() == 3:
        # transformers says it of experts; Llama 4's own class does not, and is transposed
        return bool(getattr(module, "is_transposed", type(module).__name__.startswith("Llama4")))
    return is_transposed(module)


def is_transposed(module: torch.nn.Module) -> bool:
    """Whether a linear layer keeps its weight as (in, out): GPT-2's Conv1D."""
    return hasattr(module, "nf") and not hasattr(module, "in_features")


def column_magnitudes(readers: Sequence[Reader]) -> torch.Tensor:
    """(feature,) float32: the largest magnitude of each column of the weights that multiply a site's tensor."""
    found = [weight.rows().detach().abs().amax(-2) for weight in reading_weights(readers)]
    flat = [(one.amax(0) if one.dim() == 2 else one).float() for one in found]
    return torch.stack([one.to(flat[0].device) for one in flat]).amax(0)


Make = Callable[[Place, torch.Tensor], torch.Tensor]
"""A place and a weight (out, in) -> another weight of the same shape and dtype."""


def quantizing(fmt: Format, scales: Mapping[Place, torch.Tensor] | None = None) -> Make:
    """Quantizes a weight; where a place has scales (feature,), the weight is multiplied by them before, and divided after."""

    def make(place: Place, weight: torch.Tensor) -> torch.Tensor:
        scale = None if scales is None else scales[place].to(weight.device)
        scaled = weight if scale is None else (weight.float() * scale).to(weight.dtype)
        made = emulate_weight(scaled, fmt)
        return made if scale is None else (made.float() / scale).to(weight.dtype)

    return make


@contextlib.contextmanager
def changed_weights(
    layers: torch.nn.ModuleList, readers: Mapping[Place, Sequence[Reader]], make: Make
) -> Iterator[None]:
    """In the block the weights behind the places are what `make` gives of them, while their layer runs."""
    originals: dict[int, list[tuple[ReadingWeight, Any]]] = {}
    handles = []
    by_layer: dict[int, list[tuple[Place, ReadingWeight]]] = {}
    for place, own in readers.items():
        by_layer.setdefault(place[1], []).extend((place, weight) for weight in reading_weights(own))

    def restore(layer: int) -> None:
        for weight, original in originals.pop(layer, []):
            weight.module._parameters[weight.name] = original

    def before(layer: int) -> Any:
        def hook(*_args: Any) -> None:
            originals[layer] = []
            for place, weight in by_layer[layer]:
                original = weight.tensor
                made = _made(place, weight, make)
                originals[layer].append((weight, original))
                weight.module._parameters[weight.name] = made  # type: ignore[assignment]  # a tensor for a pass

        return hook

    def after(layer: int) -> Any:
        return lambda *_args: restore(layer)

    try:
        for layer in by_layer:
            handles.append(layers[layer].register_forward_pre_hook(before(layer)))
            handles.append(layers[layer].register_forward_hook(after(layer), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in list(originals):
            restore(layer)


def _made(place: Place, weight: ReadingWeight, make: Make) -> torch.Tensor:
    """The changed weight, in the shape and order of the original."""
    rows = weight.rows().detach()
    made = torch.stack([make(place, one) for one in rows]) if rows.dim() == 3 else make(place, rows)
    return made.transpose(-1, -2).contiguous() if weight.transposed else made


@contextlib.contextmanager
def zeroed_weight(module: torch.nn.Module, row: int, column: int) -> Iterator[None]:
    """In the block one weight of a linear layer, by its (output, input), is 0."""
    original = module._parameters["weight"]
    if original is None:
        raise BadInput(f"{type(module).__name__} has no weight")
    made = original.detach().clone()
    made[(column, row) if is_transposed(module) else (row, column)] = 0
    try:
        module._parameters["weight"] = made  # type: ignore[assignment]  # a tensor for a pass
        yield
    finally:
        module._parameters["weight"] = original


def nearest_weight(module: torch.nn.Module, row: int, column: int) -> tuple[int, int]:
    """(row, column) of another weight of the same matrix, whose magnitude is nearest; of equal ones the first."""
    weight = module._parameters["weight"]
    if weight is None or weight.numel() < 2:
        raise BadInput(f"{type(module).__name__} has no second weight to compare with")
    rows = (weight.t() if is_transposed(module) else weight).detach()
    apart = (rows.abs().float() - rows[row, column].abs().float()).abs()
    apart[row, column] = torch.inf
    found = int(apart.flatten().argmin())
    return found // rows.shape[1], found % rows.shape[1]
