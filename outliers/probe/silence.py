"""Silences experts: their routing weight is 0 for every token, and the other experts of the token keep theirs.

The experts of a layer are one module, which receives the hidden state, the chosen experts of each token and their weights: a hook
before it sets weights to 0, whatever computes the products. Llama 4's experts receive the hidden state times the score, a
copy an expert: there the copy is set to 0, and a hook behind the module checks that the expert gives 0 for it. Nothing is
renormalised. `count_load` sees in the same place which experts the tokens reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.errors import SiteError
from outliers.probe.edits import Pass


@contextlib.contextmanager
def silenced(
    modules: Mapping[int, torch.nn.Module], experts: Mapping[int, Collection[int]], now: Pass
) -> Iterator[None]:
    """In the block the experts of each layer in `experts` are silent; of an empty collection weights are copied alone.

    modules: layer -> its module of experts. Raises SiteError, in the pass, for a module that receives something else.
    """
    handles = []
    try:
        for layer, own in experts.items():
            module, chosen = modules[layer], tuple(sorted(own))
            handles.append(module.register_forward_pre_hook(_before(layer, chosen, now), with_kwargs=True))
            handles.append(module.register_forward_hook(_behind(layer, chosen, now), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(layer: int, chosen: tuple[int, ...], now: Pass) -> Any:
    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index, at = routing_of(module, args, kwargs, layer, now)
        value = args[at] if isinstance(at, int) else kwargs[at]
        changed = value.clone()
        if index is None:
            _copies(changed, module, now)[list(chosen)] = 0
        else:
            for expert in chosen:
                changed.masked_fill_(index == expert, 0)
        if isinstance(at, int):
            return (*args[:at], changed, *args[at + 1 :]), kwargs
        return args, kwargs | {at: changed}

    return before


def _behind(layer: int, chosen: tuple[int, ...], now: Pass) -> Any:
    def behind(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        index, _ = routing_of(module, args, kwargs, layer, now)
        if index is None and bool(_copies(output, module, now)[list(chosen)].any()):
            raise SiteError(
                f"an expert of layer {layer} ({type(module).__name__}) gives more than 0 for an input of 0: it can't be silenced "
                "by its input"
            )

    return behind


def routing_of(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], layer: int, now: Pass
) -> tuple[torch.Tensor | None, int | str]:
    """(chosen experts (token, slot), the place of their weights); (None, place of the input) where it is a copy an expert.

    Raises SiteError for a module that receives neither.
    """
    tokens = now.sequences * now.positions
    given: list[tuple[int | str, torch.Tensor]] = [(at, x) for at, x in enumerate(args) if isinstance(x, torch.Tensor)]
    given += [(at, x) for at, x in kwargs.items() if isinstance(x, torch.Tensor)]
    chosen = [x for _, x in given if not x.is_floating_point() and x.dtype != torch.bool and x.dim() == 2]
    # the first tensor is the hidden state, which may have the shape of the weights in a very small model
    weights = [at for at, x in given[1:] if x.is_floating_point() and chosen and x.shape == chosen[0].shape]
    if len(chosen) == 1 and len(weights) == 1 and chosen[0].shape[0] == tokens:
        return chosen[0], weights[0]
    if (
        len(given) == 1
        and given[0][1].is_floating_point()
        and given[0][1].shape[:-1].numel() == _count(module) * tokens
    ):
        return None, given[0][0]
    shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for _, x in given)
    raise SiteError(
        f"the experts of layer {layer} ({type(module).__name__}) receive {shapes}, neither the chosen experts with their weights "
        f"nor a copy an expert: no probe can silence one. Leave --probe-experts out, and give --zero and --quantize in "
        "the place of --check"
    )


def _count(module: torch.nn.Module) -> int:
    """Experts of a module, by the first of its fused weights; 0 where it has none."""
    return next((weight.shape[0] for weight in module.parameters(recurse=False) if weight.dim() == 3), 0)


def _copies(x: torch.Tensor, module: torch.nn.Module, now: Pass) -> torch.Tensor:
    """(expert, token, feature): a view of Llama 4's input or output."""
    return x.view(_count(module), now.sequences * now.positions, x.shape[-1])


@contextlib.contextmanager
def count_load(
    modules: Mapping[int, torch.nn.Module],
    load: Mapping[int, NDArray[np.float64]],
    lengths: Sequence[int],
    now: Pass,
) -> Iterator[None]:
    """In the block the tokens that reach each expert are added up, padding left out.

    load: layer -> (expert,), what is added to. lengths: counted tokens of each sequence of the pass. A token reaches an
    expert that it is routed to; of a copy an expert, one that gets any value of it.
    """

    def hook(layer: int) -> Any:
        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index, at = routing_of(module, args, kwargs, layer, now)
            real = torch.zeros(now.sequences, now.positions, dtype=torch.bool)
            for row, length in enumerate(lengths):
                real[row, :length] = True
            kept = real.reshape(-1).numpy()
            if index is None:
                value = args[at] if isinstance(at, int) else kwargs[at]
                load[layer][:] += (_copies(value, module, now) != 0).any(-1).cpu().numpy()[:, kept].sum(1)
            else:
                chosen = index.cpu().numpy()[kept]
                load[layer][:] += np.bincount(chosen[chosen < load[layer].size], minlength=load[layer].size)

        return before

    handles = []
    try:
        for layer, module in modules.items():
            handles.append(module.register_forward_pre_hook(hook(layer), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
