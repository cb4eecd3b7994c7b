"""Which experts a probe silences: those named, the super experts of the study, and two controls of each. No torch here.

A control is another expert of the same layer that some token of the probe reaches: one of equal load, which as many tokens miss,
and a random one. An expert is more than one of its layer only if the model loses more without it than without these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from outliers.errors import BadInput
from outliers.probe.asked import asked_of
from outliers.spec.probe import ALL, SUPER
from outliers.study.prepare import Prepared
from outliers.study.probes import CHECKED_EXPERTS, MOST_MAPPED
from outliers.units import format_ranges

Expert = tuple[int, int]
"""(layer of the model, number of the expert)."""
Role = Literal["super", "asked", "random", "load"]


@dataclass(frozen=True)
class Silenced:
    """An expert that is silenced alone. of: the name of the expert that this is a control of. tokens: tokens of the probe
    that reach it."""

    at: Expert
    role: Role
    tokens: int
    of: str | None = None


@dataclass(frozen=True)
class ExpertChoice:
    """What a probe silences. singles: each with its controls behind it. together: the super experts that are silenced at once,
    empty for fewer than two; random, load: as many controls of one kind, all different, empty where a layer has too few experts.
    unreached: experts that no token of the probe reaches, of which it can say nothing. tokens: that reach each expert."""

    singles: tuple[Silenced, ...] = ()
    together: tuple[Expert, ...] = ()
    random: tuple[Expert, ...] = ()
    load: tuple[Expert, ...] = ()
    unreached: tuple[Expert, ...] = ()
    tokens: Mapping[Expert, int] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers in which an expert is silenced, ascending."""
        return tuple(sorted({single.at[0] for single in self.singles} | {layer for layer, _ in self.together}))


NO_EXPERTS = ExpertChoice()


def name_of(at: Expert) -> str:
    """`1.68`."""
    return f"{at[0]}.{at[1]}"


def parse_expert(name: str) -> Expert:
    """`1.68`, as ProbeSpec lets it through."""
    layer, _, expert = name.partition(".")
    return int(layer), int(expert)


def routed_layers(prepared: Prepared) -> tuple[int, ...]:
    """The study's layers whose experts a probe can change; none where the family's experts are not known."""
    anatomy = prepared.model.anatomy
    return tuple(layer for layer in prepared.layers if layer in anatomy.moe_layers) if anatomy.experts else ()


def mapped_experts(prepared: Prepared) -> tuple[Expert, ...]:
    """The experts whose input alone is quantized, one at a time, each once, in the order of layers and experts."""
    asked, layers, count = asked_of(prepared.spec).map_experts, routed_layers(prepared), prepared.model.num_experts or 0
    found: set[Expert] = set()
    for name in asked:
        if "." in name:
            found.add(parse_expert(name))
        else:
            found |= {(layer, n) for layer in (layers if name == ALL else (int(name),)) for n in range(count)}
    return tuple(sorted(found))


def check_mapped(prepared: Prepared, sites: Sequence[str]) -> None:
    """Raise BadInput for a map of experts that can't be made, before a model is loaded. sites: at which formats are tried."""
    asked = prepared.spec.probe.map_experts
    if not asked:
        return
    if prepared.spec.probe.map is None:
        raise BadInput(f"--map-experts {asked[0]}: the format is that of the map: give --map, such as --map int8_token")
    _check_named(prepared, "--map-experts", asked, [name for name in asked if name != ALL])
    if "mlp_in" not in sites:
        raise BadInput(
            f"--map-experts {asked[0]}: the study did not capture mlp_in, which is what experts get: study it with --sites"
        )
    found = mapped_experts(prepared)
    if len(found) > MOST_MAPPED:
        layers = len({layer for layer, _ in found})
        raise BadInput(
            f"--map-experts {','.join(asked)[:80]}: {len(found):,} experts of {layers} layers are as many passes over the "
            f"probe's sequences; at most {MOST_MAPPED:,} are made: name layers, such as --map-experts {found[0][0]}, or experts"
        )


def check_experts(prepared: Prepared) -> None:
    """Raise BadInput for experts that are named and can't be silenced, before a model is loaded."""
    asked = prepared.spec.probe.experts
    if asked:
        _check_named(prepared, "--probe-experts", asked, [name for name in asked if name != SUPER])


def _check_named(prepared: Prepared, option: str, asked: Sequence[str], numbers: Sequence[str]) -> None:
    """Raise BadInput where the model's experts can't be changed, or one is not there. numbers: LAYER.EXPERT, or LAYER."""
    model = prepared.model
    name, layers = model.source.name, routed_layers(prepared)
    if not model.anatomy.moe_layers:
        raise BadInput(f"{option} {asked[0]}: {name} is a dense model and has no experts: leave the option out")
    if model.anatomy.experts is None:
        raise BadInput(
            f"{option} {asked[0]}: where the experts of {model.architecture} are is not known, for this family is not in "
            "the table: leave the option out"
        )
    if model.experts is not None and model.experts.watch == "routing":
        raise BadInput(
            f"{option} {asked[0]}: the experts of {name} can't be changed, because {model.experts.reason}: give "
            "--quantization none, which is another study"
        )
    for one in numbers:
        layer, expert = parse_expert(one) if "." in one else (int(one), 0)
        if layer not in layers:
            raise BadInput(
                f"{option} {one}: layer {layer} is not one of the study's layers with experts, which are "
                f"{format_ranges(layers) or 'none'}"
            )
        if expert >= (model.num_experts or 0):
            raise BadInput(f"{option} {one}: each layer of {name} has the experts 0 to {(model.num_experts or 0) - 1}")


def wanted_experts(prepared: Prepared, super_experts: Sequence[Expert] | None) -> list[tuple[Expert, Role]]:
    """The experts that are to be silenced, the largest super experts first, then those named.

    super_experts: of the study, the largest first; None where they are not known here. Raises BadInput where they are asked
    for by name and not known.
    """
    asked, layers = asked_of(prepared.spec).experts, routed_layers(prepared)
    if super_experts is None and SUPER in prepared.spec.probe.experts:
        raise BadInput(
            f"--probe-experts super: the study {prepared.study_id} says nothing of super experts here: run it with "
            "--experts all, or name experts by their numbers, such as 1.68"
        )
    known = [at for at in super_experts or () if at[0] in layers] if SUPER in asked else []
    named = [at for at in map(parse_expert, (one for one in asked if one != SUPER)) if at not in known]
    return [(at, "super") for at in known] + [(at, "asked") for at in named]


def choose_experts(
    wanted: Sequence[tuple[Expert, Role]], load: Mapping[int, NDArray[np.int64]], seed: str
) -> ExpertChoice:
    """Every expert that is silenced, with its controls. Of the super experts the first CHECKED_EXPERTS are silenced alone.

    wanted: see `wanted_experts`. load: layer -> (expert,) tokens of the probe. seed: the probe's id.
    """
    known = [at for at, role in wanted if role == "super"]
    without = {at for at, _ in wanted}
    singles: list[Silenced] = []
    for at, role in wanted:
        if role == "super" and at not in known[:CHECKED_EXPERTS]:
            continue
        layer, expert = at
        if not load[layer][expert]:
            continue
        singles.append(Silenced(at, role, int(load[layer][expert])))
        own = {number for other, number in without if other == layer}
        controls = choose_controls(load[layer], expert, own, f"{seed} {name_of(at)}")
        singles += [
            Silenced((layer, number), kind, int(load[layer][number]), name_of(at)) for kind, number in controls.items()
        ]
    reached = [at for at in known if load[at[0]][at[1]]]
    tokens = {(layer, number): int(count) for layer, own in load.items() for number, count in enumerate(own)}
    unreached = tuple(at for at, _ in wanted if not load[at[0]][at[1]])
    together = tuple(reached) if len(reached) > 1 else ()
    random = _beside(together, without, load, seed, "random")
    equal = _beside(together, without, load, seed, "load")
    return ExpertChoice(tuple(singles), together, random, equal, unreached, tokens)


def _beside(
    together: Sequence[Expert],
    without: Collection[Expert],
    load: Mapping[int, NDArray[np.int64]],
    seed: str,
    role: Role,
) -> tuple[Expert, ...]:
    """A control of each expert, all different; empty where any expert has no control."""
    found: list[Expert] = []
    for layer, expert in together:
        taken = {number for other, number in (*without, *found) if other == layer}
        number = choose_controls(load[layer], expert, taken, f"{seed} {name_of((layer, expert))}").get(role)
        if number is None:
            return ()
        found.append((layer, number))
    return tuple(found)


def choose_controls(load: NDArray[np.int64], expert: int, without: Collection[int], seed: str) -> dict[Role, int]:
    """An expert of the nearest load, of equal ones the smaller number, and a random one of the rest, by a hash of its number.

    load: (expert,) tokens. without: experts that can't be controls. Experts that no token reaches are left out: silencing one
    changes nothing. A layer with too few others has one control, or none.
    """
    left = [number for number in np.flatnonzero(load).tolist() if number != expert and number not in without]
    if not left:
        return {}
    equal = min(left, key=lambda number: (abs(int(load[number]) - int(load[expert])), number))
    rest = [number for number in left if number != equal]
    if not rest:
        return {"load": equal}
    return {"random": min(rest, key=lambda number: hashlib.sha256(f"{seed} {number}".encode()).digest()), "load": equal}
