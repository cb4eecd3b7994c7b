"""Single weights that are set to zero: those named, super weights that the untouched pass points at, and their controls.

A super weight (Yu et al. 2024, arXiv 2411.07191) is sought in each layer where the second projection of its MLP gives its
largest value: the row is that output, and the column the input whose product with the row's weight is largest at that token.
Candidates are the layers with the largest such values. Each weight has two controls: a random one of its matrix, and the
one of the nearest magnitude. Only a weight that does more than both is a super weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from outliers.errors import BadInput
from outliers.model.describe import build_empty
from outliers.model.families import INPUT
from outliers.model.pretrained import load_config
from outliers.probe.asked import AUTO, asked_of
from outliers.probe.changes import Group, WeightAt, parse_weight
from outliers.probe.engine import Engine
from outliers.probe.statistics import SPIKE, Statistics
from outliers.probe.weights import is_transposed, nearest_weight
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

CANDIDATES = 3
"""Layers whose largest outputs are followed to a weight. Chosen: the paper's models have one to six."""


@dataclass(frozen=True)
class Single:
    """A weight that is set to zero. of: the name of the weight that this is a control of. value: the weight.

    output, input, sequence, position: of a candidate, the value that pointed at it, what was multiplied, and where it sits.
    """

    at: WeightAt
    group: Group = "asked"
    of: str | None = None
    value: float | None = None
    output: float | None = None
    input: float | None = None
    sequence: int | None = None
    position: int | None = None


def resolve_weights(prepared: Prepared, workspace: Workspace) -> tuple[Single, ...]:
    """The named weights with the whole path of their module. Raises BadInput for one that is not there; no weight is read."""
    asked = asked_of(prepared.spec).weight
    named = [parse_weight(name) for name in asked if name != AUTO]
    if AUTO in asked:
        _check_mlp(prepared)
    if not named:
        return ()
    name = prepared.model.source.name
    model = build_empty(load_config(prepared.model.source, workspace), prepared.model.dtype, name)
    layers = model.get_submodule(prepared.model.anatomy.backbone).get_submodule(prepared.model.anatomy.layers)
    return tuple(Single(_resolved(layers[at.layer], at, name)) for at in named)


def _check_mlp(prepared: Prepared) -> None:
    if "down_in" not in prepared.model.anatomy.sites:
        raise BadInput(
            f"--weight auto: {prepared.model.source.name} has no layer with a dense MLP that is known; name a weight "
            "by its module"
        )


def _resolved(layer: torch.nn.Module, at: WeightAt, name: str) -> WeightAt:
    """The weight with its module's whole path: the end of a path will do, where it fits one module alone."""
    linear = {
        path: module
        for path, module in layer.named_modules()
        if getattr(getattr(module, "weight", None), "dim", lambda: 0)() == 2
    }
    fits = [at.module] if at.module in linear else [path for path in linear if path.endswith(f".{at.module}")]
    if len(fits) != 1:
        raise BadInput(
            f"--weight {at.name}: layer {at.layer} of {name} has {'no' if not fits else 'several'} such module with a matrix: "
            f"give one of {', '.join(linear)}"
        )
    shape = tuple(linear[fits[0]].weight.shape)
    rows, columns = shape[::-1] if is_transposed(linear[fits[0]]) else shape
    if at.row >= rows or at.column >= columns:
        raise BadInput(f"--weight {at.name}: {fits[0]} has {rows} outputs and {columns} inputs, counted from 0")
    return WeightAt(at.layer, fits[0], at.row, at.column)


def spike_modules(base: torch.nn.Module, prepared: Prepared) -> Iterator[tuple[int, torch.nn.Module]]:
    """(layer, second projection of its MLP) of each captured layer that has one."""
    paths = prepared.model.anatomy.sites.get("down_in", ())
    for layer in prepared.layers:
        if layer < len(paths) and paths[layer]:
            yield layer, base.get_submodule(paths[layer].removesuffix(INPUT))


def choose_weights(
    engine: Engine, named: Sequence[Single], statistics: Statistics, asked: Sequence[str], seed: str
) -> tuple[Single, ...]:
    """The candidates where `auto` is asked, largest output first, then the named ones, each with its two controls."""
    found: list[Single] = []
    if AUTO in asked:
        found += _candidates(engine, statistics)
    there = {single.at for single in found}
    found += [single for single in named if single.at not in there]
    return tuple(one for single in found for one in (_valued(engine, single), *_controls(engine, single.at, seed)))


def _candidates(engine: Engine, statistics: Statistics) -> list[Single]:
    spikes = statistics.spikes
    sizes = np.nan_to_num(np.abs(spikes[:, 0]), nan=-1.0)
    found = []
    for number in np.argsort(-sizes, kind="stable")[:CANDIDATES]:
        if sizes[number] < 0:
            break
        own = dict(zip(SPIKE, spikes[number].tolist(), strict=True))
        layer = statistics.layers[int(number)]
        path = engine.anatomy.sites["down_in"][layer].removesuffix(INPUT)
        module = path.removeprefix(f"{engine.anatomy.layers}.{layer}.")
        found.append(
            Single(
                WeightAt(layer, module, int(own["row"]), int(own["column"])),
                output=own["value"],
                input=own["input"],
                sequence=int(own["sequence"]),
                position=int(own["position"]),
            )
        )
    return found


def _weight(engine: Engine, at: WeightAt) -> torch.Tensor:
    """The matrix (output, input) that a weight is in."""
    module = engine.module_of(at)
    weight = module.get_parameter("weight").detach()
    return weight.t() if is_transposed(module) else weight


def _valued(engine: Engine, single: Single) -> Single:
    value = float(_weight(engine, single.at)[single.at.row, single.at.column])
    return replace(single, value=value)


def _controls(engine: Engine, at: WeightAt, seed: str) -> Iterator[Single]:
    weight = _weight(engine, at)
    rows, columns = weight.shape
    number, flat = 0, at.row * columns + at.column
    while flat == at.row * columns + at.column and weight.numel() > 1:
        drawn = hashlib.sha256(f"{seed} {at.name} {number}".encode()).digest()
        flat, number = int.from_bytes(drawn[:8], "big") % (rows * columns), number + 1
    random = WeightAt(at.layer, at.module, flat // columns, flat % columns)
    nearest = WeightAt(at.layer, at.module, *nearest_weight(engine.module_of(at), at.row, at.column))
    yield _valued(engine, Single(random, "control random", at.name))
    yield _valued(engine, Single(nearest, "control nearest", at.name))
