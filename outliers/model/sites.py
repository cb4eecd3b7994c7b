"""Finds in a model's module tree which module gives each site of each layer, and where its experts are.

It works on a model without weights (on the meta device), so that everything is known, or refused, before any weight is
read. Paths are as in `anatomy`; the table of families is in `families`.
"""

from __future__ import annotations

from typing import Any

import torch

from outliers.errors import BadInput, UnknownArchitecture
from outliers.model.anatomy import Anatomy
from outliers.model.families import INPUT, Family, family, site_roles
from outliers.spec import OWN_WIDTH_SITES, SITES


def find_backbone(model: torch.nn.Module) -> str:
    """Path of the part that runs all layers without the head: of a multimodal wrapper, its language model."""
    base = getattr(model, "base_model_prefix", "")
    path = base if base and isinstance(getattr(model, base, None), torch.nn.Module) else "model"
    inner = model.get_submodule(path)
    return f"{path}.language_model" if isinstance(getattr(inner, "language_model", None), torch.nn.Module) else path


def study_anatomy(model: torch.nn.Module, config: Any, named: tuple[str, ...] = ()) -> Anatomy:
    """The Anatomy of `model` (weights not needed), whose text config is `config`; `named`: SITE=PATTERN, which win.

    Raises UnknownArchitecture with the candidates where the family is unknown and nothing was named, or where the table
    does not fit; BadInput for a pattern that names no module.
    """
    patterns = _parse(named)
    backbone = find_backbone(model)
    base = model.get_submodule(backbone)
    row = family(type(model).__name__, config)
    count = int(config.num_hidden_layers)
    layers = row.layers if row else _layer_list(base, count, model)
    if row is None and not patterns:
        raise UnknownArchitecture(_candidates(model, base, layers))
    roles = dict(site_roles(row)) if row else {"resid": ("",)}
    sites: dict[str, tuple[str, ...]] = {}
    for site in SITES:
        if site in patterns:
            sites[site] = _named(base, site, patterns[site], count)
        elif site == "down_in" and row is not None:
            paths = tuple(_mlp_output(base, f"{layers}.{n}", row, model) for n in range(count))
            if any(paths):
                sites[site] = paths
        elif site in roles:
            sites[site] = tuple(_resolve(base, f"{layers}.{n}", roles[site], site, model) for n in range(count))
    experts = row.experts if row else _experts_of_unknown(base.get_submodule(layers))
    moe = _moe_layers(base, layers, experts, count)
    return Anatomy(
        backbone=backbone,
        layers=layers,
        sites=sites,
        widths=_widths(base, sites, int(config.hidden_size)),
        moe_layers=moe,
        router=f"{layers}.*.{row.router}" if row and moe else None,
        experts=f"{layers}.*.{experts}" if moe else None,
    )


def _parse(named: tuple[str, ...]) -> dict[str, str]:
    patterns: dict[str, str] = {}
    for item in named:
        site, _, pattern = item.partition("=")
        if site not in SITES or "*" not in pattern:
            raise BadInput(
                f"--site-module {item} is not SITE=PATTERN with SITE one of {', '.join(SITES)} and * for the layer's number, "
                "such as attn_in=layers.*.input_layernorm, or mlp_in=layers.*.mlp:input for what a module receives"
            )
        patterns[site] = pattern
    return patterns


def _named(base: torch.nn.Module, site: str, pattern: str, count: int) -> tuple[str, ...]:
    paths = tuple(pattern.replace("*", str(layer)) for layer in range(count))
    missing = [path for path in paths if _module(base, path.removesuffix(INPUT)) is None]
    if missing:
        there = ", ".join(name for name, _ in base.named_children())
        raise BadInput(
            f"--site-module {site}={pattern}: {len(missing)} of {count} modules are not there, first {missing[0]}; "
            f"paths begin at the model without its head, which holds {there}"
        )
    return paths


def _resolve(base: torch.nn.Module, layer: str, names: tuple[str, ...], site: str, model: torch.nn.Module) -> str:
    for name in names:
        path = f"{layer}.{name}" if name else layer
        if _module(base, path.removesuffix(INPUT)) is not None:
            return path
    raise UnknownArchitecture(
        f"the site {site} of {type(model).__name__} should be {' or '.join(names)} of {layer}, which has "
        f"{_children(base.get_submodule(layer))}: name it with --site-module {site}=PATTERN"
    )


def _mlp_output(base: torch.nn.Module, layer: str, row: Family, model: torch.nn.Module) -> str:
    """Path of the MLP's second projection in one layer; empty text for a layer of experts, which has none.

    A layer of experts may have a child of the same name for its shared expert: that one is not a dense MLP.
    """
    if row.experts and _module(base, f"{layer}.{row.experts}") is not None:
        return ""
    return _resolve(base, layer, site_roles(row)["down_in"], "down_in", model)


def _module(base: torch.nn.Module, path: str) -> torch.nn.Module | None:
    try:
        return base.get_submodule(path)
    except AttributeError:
        return None


def _layer_list(base: torch.nn.Module, count: int, model: torch.nn.Module) -> str:
    """The first list of modules with one entry for each layer."""
    lists = [
        name for name, part in base.named_modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count
    ]
    if not lists:
        raise UnknownArchitecture(f"{type(model).__name__} has no list of {count} decoder layers: it can't be read")
    return str(lists[0])


def _children(layer: torch.nn.Module) -> str:
    return ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())


def _candidates(model: torch.nn.Module, base: torch.nn.Module, layers: str) -> str:
    first = base.get_submodule(f"{layers}.0")
    return (
        f"the sites of {type(model).__name__} are not known. Name them: "
        f"--site-module attn_in={layers}.*.NAME --site-module mlp_in={layers}.*.NAME, where NAME is the norm that feeds "
        "attention and the one that feeds the MLP, or NAME:input is attention and MLP themselves, whose input is then read. "
        f"A layer has {_children(first)}"
    )


def _widths(base: torch.nn.Module, sites: dict[str, tuple[str, ...]], hidden: int) -> dict[str, int]:
    """Features of each site: the hidden size; for `o_in` and `down_in` the input width of the projection that reads them."""
    widths = dict.fromkeys(sites, hidden)
    for site in OWN_WIDTH_SITES:
        if site in sites:
            found = {_inputs(base.get_submodule(path.removesuffix(INPUT)), hidden) for path in sites[site] if path}
            if len(found) == 1:
                widths[site] = found.pop()
            else:
                del widths[site]
    return widths


def _inputs(projection: torch.nn.Module, hidden: int) -> int:
    for name in ("in_features", "nx"):  # nx: GPT-2's transposed linear layer
        value = getattr(projection, name, None)
        if value is not None:
            return int(value)
    return hidden


def _experts_of_unknown(layers: torch.nn.Module) -> str | None:
    """Path of the experts, relative to a layer, in a family that is not in the table: the child named `experts`."""
    paths = (path for layer in layers.children() for path, _ in layer.named_modules())
    return next((path for path in paths if path.rpartition(".")[2] == "experts"), None)


def _moe_layers(base: torch.nn.Module, layers: str, experts: str | None, count: int) -> tuple[int, ...]:
    if experts is None:
        return ()
    return tuple(n for n in range(count) if _module(base, f"{layers}.{n}.{experts}") is not None)
