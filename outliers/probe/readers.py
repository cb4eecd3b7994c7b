"""Finds the modules that read a site: those with weights whose input is the site's tensor.

A change is made in what these receive, not at the norm, because a norm's output may be the residual stream too (OPT in its
post-norm form). A module reads a site if an argument of it shares storage (address and number of values) with the site's
tensor, found in one short pass. Equal values would not do: two norms with equal weights give equal tensors.
Llama 4 gives its experts the site's tensor times the router's scores, in a tensor of its own: such experts are readers whose
input is scaled, if that very product is what they receive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from outliers.capture.forward import pass_options
from outliers.errors import SiteError
from outliers.model.anatomy import Anatomy, SiteModule

TOKENS = 16
"""Tokens of the pass that looks for readers."""
_GATES = 1
"""Outputs of a gate of a shared expert, which weighs it as a router weighs experts."""


@dataclass(frozen=True)
class Reader:
    """A module that receives the tensor of a site of a layer as its argument `argument` (place or name).

    is_router: it decides over experts, or weighs a shared one. scores: the router whose scores its input is multiplied with.
    """

    site: str
    layer: int
    path: str
    module: torch.nn.Module
    argument: int | str
    is_router: bool = False
    is_experts: bool = False
    scores: torch.nn.Module | None = None


@dataclass
class _Seen:
    """What a pass showed of one layer: the sites' tensors and what each module with weights received."""

    sites: dict[str, torch.Tensor] = field(default_factory=dict)
    received: list[tuple[str, torch.nn.Module, int | str, torch.Tensor]] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    experts: int = 0


def find_readers(
    base: torch.nn.Module, anatomy: Anatomy, sites: tuple[str, ...], layers: tuple[int, ...], ids: torch.Tensor
) -> dict[tuple[str, int], list[Reader]]:
    """(site, layer) -> its readers, in the order of the pass. A site that is the same tensor as an earlier one has no entry.

    base: the model without its head. ids: (1, position) int64. Raises SiteError where a site has no readers that can be named.
    """
    own = tuple(site for site in sites if anatomy.alias_of(site) not in sites)
    seen = _look(base, anatomy, own, layers, ids)
    found: dict[tuple[str, int], list[Reader]] = {}
    for layer in layers:
        for site in own:
            found[site, layer] = _readers_of(seen[layer], site, layer, anatomy)
            _check(found[site, layer], site, layer, base, anatomy)
    return found


def _look(
    base: torch.nn.Module, anatomy: Anatomy, sites: tuple[str, ...], layers: tuple[int, ...], ids: torch.Tensor
) -> dict[int, _Seen]:
    """One pass. All tensors are held until its end, so that no storage is used twice."""
    seen = {layer: _Seen() for layer in layers}
    handles = [_watch_site(base, at, seen[at.layer]) for at in anatomy.modules(sites, layers)]
    try:
        for layer in layers:
            path = f"{anatomy.layers}.{layer}"
            for name, module in base.get_submodule(path).named_modules():
                if _has_weights(module):
                    handles.append(_watch_module(module, f"{path}.{name}", seen[layer]))
            if (experts := _own_path(anatomy.experts, layer, anatomy)) is not None:
                weights = base.get_submodule(experts).parameters(recurse=False)
                seen[layer].experts = next((w.shape[0] for w in weights if w.dim() == 3), 0)
            if anatomy.router and layer in anatomy.moe_layers:
                router = anatomy.router.replace("*", str(layer))
                handles.append(_watch_scores(base.get_submodule(router), seen[layer]))
        with torch.inference_mode():
            short = ids[:1, :TOKENS]
            base(input_ids=short, **pass_options(short, (short.shape[1],)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _has_weights(module: torch.nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _watch_site(base: torch.nn.Module, at: SiteModule, seen: _Seen) -> Any:
    module = base.get_submodule(at.path)
    if at.side == "output":

        def after(_module: Any, _args: Any, output: Any) -> None:
            seen.sites[at.site] = output[0] if isinstance(output, tuple) else output

        return module.register_forward_hook(after)

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        seen.sites[at.site] = args[0] if args else kwargs["hidden_states"]

    # before the hook of the same module as a reader of the site
    return module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)


def _watch_module(module: torch.nn.Module, path: str, seen: _Seen) -> Any:
    def before(_module: Any, args: Any, kwargs: Any) -> None:
        for place, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                seen.received.append((path, module, place, value))

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _watch_scores(router: torch.nn.Module, seen: _Seen) -> Any:
    def after(module: Any, _args: Any, output: Any) -> None:
        seen.scores = {"module": module, "output": output}

    return router.register_forward_hook(after)


def _readers_of(seen: _Seen, site: str, layer: int, anatomy: Anatomy) -> list[Reader]:
    tensor = seen.sites.get(site)
    if tensor is None:
        raise SiteError(f"the site {site} of layer {layer} gave nothing in a pass: no probe can change it")
    experts = _own_path(anatomy.experts, layer, anatomy)
    found = []
    for path, module, place, value in seen.received:
        shared = (value.data_ptr(), value.numel()) == (tensor.data_ptr(), tensor.numel())
        is_experts = path == experts
        scaled = not shared and is_experts and site == "mlp_in" and place == 0 and _is_scaled(value, tensor, seen)
        if shared or scaled:
            found.append(
                Reader(
                    site=site,
                    layer=layer,
                    path=path,
                    module=module,
                    argument=place,
                    is_router=not is_experts and _is_router(path, module, layer, anatomy, seen.experts),
                    is_experts=is_experts,
                    scores=seen.scores["module"] if scaled else None,
                )
            )
    return found


def _own_path(pattern: str | None, layer: int, anatomy: Anatomy) -> str | None:
    return pattern.replace("*", str(layer)) if pattern and layer in anatomy.moe_layers else None


def _is_router(path: str, module: torch.nn.Module, layer: int, anatomy: Anatomy, experts: int) -> bool:
    """Whether a module of a layer with experts decides over them.

    The router is known by its path, or has an output for each of the `experts` where the family is not in the table; a gate
    of a shared expert has one output.
    """
    if layer not in anatomy.moe_layers:
        return False
    if anatomy.router is not None and path == _own_path(anatomy.router, layer, anatomy):
        return True
    outputs = {_GATES} if anatomy.router is not None else {_GATES, experts}
    return any(weight.dim() == 2 and weight.shape[0] in outputs for weight in module.parameters(recurse=False))


def scale_of(output: Any) -> torch.Tensor | None:
    """What Llama 4 multiplies the tokens with before its experts, (expert x token, 1), from its router's output."""
    scores = output[0] if isinstance(output, tuple) else output
    if not isinstance(scores, torch.Tensor) or scores.dim() != 2:
        return None
    return scores.transpose(0, 1).reshape(-1, 1)


def _is_scaled(value: torch.Tensor, tensor: torch.Tensor, seen: _Seen) -> bool:
    """Whether a value is the site's tensor, once for each expert, times the router's scores: to the last bit."""
    scale = scale_of(seen.scores.get("output"))
    if scale is None or not tensor.numel() or value.numel() != tensor.numel() * scale.shape[0] // _tokens(tensor):
        return False
    flat = tensor.reshape(-1, tensor.shape[-1])
    return bool(torch.equal(value, flat.repeat(scale.shape[0] // flat.shape[0], 1) * scale))


def _tokens(tensor: torch.Tensor) -> int:
    return max(1, tensor.numel() // tensor.shape[-1])


def _check(readers: list[Reader], site: str, layer: int, base: torch.nn.Module, anatomy: Anatomy) -> None:
    """Raise SiteError for a site whose readers are not all found."""
    name = type(base).__name__
    remedy = "a probe can't change it; leave the site out of --sites"
    inside = _own_path(anatomy.experts, layer, anatomy)
    if site == "mlp_in" and inside is not None and not any(reader.is_experts for reader in readers):
        raise SiteError(
            f"the experts of {name} in layer {layer} ({inside}) receive another tensor than mlp_in, and it is not mlp_in times "
            f"the router's scores: {remedy}"
        )
    if all(reader.is_router for reader in readers):
        raise SiteError(f"no module of {name} with weights receives the tensor of {site} in layer {layer}: {remedy}")
