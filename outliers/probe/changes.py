"""What is changed, one `Change` each, from a ProbeSpec and what is known of the study. No torch here.

Features are changed at attn_in and mlp_in in all layers of the study; where a site of another width decides (o_in, down_in), at
that one. Formats are tried at all captured sites but resid, jointly. Every change is measured against the untouched pass, and
none depends on another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from outliers.errors import BadInput
from outliers.probe.asked import asked_of
from outliers.probe.expert_choice import NO_EXPERTS, Expert, ExpertChoice, name_of, routed_layers
from outliers.spec import BLOCK_SITES, OWN_WIDTH_SITES
from outliers.spec.formats import parse_format
from outliers.study.prepare import Prepared
from outliers.study.probes import CHECKED_FEATURES, RANDOM_FEATURES

Kind = Literal[
    "identity", "floor", "zero", "mean", "format", "map", "weights", "prefix", "weight", "silence", "experts"
]
Group = Literal["", "systematic", "matched", "random", "asked", "control random", "control nearest", "super", "load"]

REFERENCE, IDENTITY, SHARED, FLOOR = "untouched", "identity", "identity, layers shared", "floor"
QUANTIZED_SITES = ("attn_in", "mlp_in", "o_in", "down_in")
RANGES = ("int8_tensor", "fp8_tensor")
"""Formats that are tried with the range of all tokens, and with that of all but first tokens."""
MOST_SINGLES = CHECKED_FEATURES
"""Systematic features up to which each is changed alone, too; of more, the largest MOST_SINGLES are."""
MOST_NAME = 80
"""Characters up to which the numbers of several features are a change's name."""
RANDOM = RANDOM_FEATURES
"""Features of `random` without a number."""


@dataclass(frozen=True, order=True)
class WeightAt:
    """One weight: row is its output, column its input. module: relative to the layer."""

    layer: int
    module: str
    row: int
    column: int

    @property
    def name(self) -> str:
        """`11.mlp.down_proj[507,1229]`."""
        return f"{self.layer}.{self.module}[{self.row},{self.column}]"


@dataclass(frozen=True)
class Change:
    """One change of the model. `name` is its key in the journal.

    sites, layers: where. features: those that are zeroed or replaced. held: those that stay as they are while the others are
    quantized. weights: the format of the readers' weights. smooth: SmoothQuant's strength. first_tokens: whether a static
    range is of all tokens. prefix: whether a prefix comes before each sequence. of: the weight or the expert that this is a
    control of. alone: whether it is one feature of a set. experts: those that are silent, or, of a map, the one whose input alone
    is quantized.
    """

    name: str
    kind: Kind
    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    group: Group = ""
    features: tuple[int, ...] = ()
    format: str | None = None
    held: tuple[int, ...] = ()
    weights: str | None = None
    smooth: float | None = None
    first_tokens: bool = True
    prefix: bool = False
    weight: WeightAt | None = None
    of: str | None = None
    alone: bool = False
    experts: tuple[Expert, ...] = ()

    @property
    def first_layer(self) -> int:
        """The first layer that it changes: those before it compute what the untouched pass has computed."""
        return 0 if self.prefix else min(self.layers, default=0)


def quantized_sites(prepared: Prepared) -> tuple[str, ...]:
    """The captured sites that formats are tried at; one that is the same tensor as another is not named twice."""
    return _own(prepared, tuple(site for site in QUANTIZED_SITES if site in prepared.spec.capture.sites))


def feature_sites(prepared: Prepared) -> tuple[str, ...]:
    """Where features are zeroed or replaced. Raises BadInput where the model has no site for them."""
    if prepared.site in OWN_WIDTH_SITES:
        return (prepared.site,)
    sites = prepared.spec.capture.sites
    chosen = tuple(site for site in BLOCK_SITES if site in sites) or BLOCK_SITES
    known = tuple(site for site in chosen if site in prepared.model.anatomy.sites)
    if not known:
        raise BadInput(
            f"neither attn_in nor mlp_in of {prepared.model.architecture} is known, and features are changed there: name its "
            "module with --site-module attn_in=PATTERN"
        )
    return _own(prepared, known)


def _own(prepared: Prepared, sites: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(site for site in sites if prepared.model.anatomy.alias_of(site) not in sites)


def feature_width(prepared: Prepared) -> int:
    """How many features there are to change."""
    return prepared.model.anatomy.widths.get(feature_sites(prepared)[0], prepared.model.hidden_size)


@dataclass(frozen=True)
class Known:
    """What the study and the untouched pass say before anything is changed.

    systematic: the study's list. magnitudes: (feature,), see `matched_features`. weights: single weights with their controls.
    floor_feature: the feature that is moved by its last bit. silenced: experts with their controls.
    mapped: experts that are quantized alone, those that a token of the probe reaches.
    """

    systematic: tuple[int, ...]
    magnitudes: NDArray[np.float64]
    weights: tuple[tuple[WeightAt, Group, str | None], ...] = ()
    floor_feature: int = 0
    silenced: ExpertChoice = NO_EXPERTS
    mapped: tuple[Expert, ...] = ()


def matched_features(systematic: Sequence[int], magnitudes: NDArray[np.float64]) -> tuple[int, ...]:
    """As many features that are not systematic, the largest of these; of equal ones the smaller number.

    magnitudes: (feature,), the largest abs(x) of each over the sites, layers and tokens. Whatever a model loses without its
    systematic features is due to their being systematic only if it keeps as much without others that are as large.
    """
    without = set(systematic)
    left = [feature for feature in range(magnitudes.size) if feature not in without]
    return tuple(sorted(left, key=lambda number: (-float(magnitudes[number]), number))[: len(without)])


def random_features(count: int, width: int, without: Sequence[int], seed: str) -> tuple[int, ...]:
    """`count` of the other features, by a hash of their number with `seed`: the same on every machine and version."""
    left = [feature for feature in range(width) if feature not in set(without)]
    return tuple(sorted(left, key=lambda number: hashlib.sha256(f"{seed} {number}".encode()).digest())[:count])


def all_changes(prepared: Prepared, known: Known, seed: str, *, shared: bool) -> tuple[Change, ...]:
    """Every change of a probe, each once. seed: the probe's id. shared: whether layers may be left out."""
    asked = asked_of(prepared.spec)
    sites, layers = feature_sites(prepared), prepared.layers
    everywhere = tuple(dict.fromkeys((*sites, *quantized_sites(prepared))))
    found = [Change(IDENTITY, "identity", everywhere, layers)]
    if shared:
        found.append(Change(SHARED, "identity", everywhere, layers))
    found.append(Change(FLOOR, "floor", sites[:1], layers[:1], features=(known.floor_feature,)))
    for kind, names in (("zero", asked.zero), ("mean", asked.mean)):
        found += _of_features(prepared, known, seed, "zero" if kind == "zero" else "mean", names)
    found += _of_formats(prepared, known)
    found += _of_expert_inputs(prepared)
    found += _of_map(prepared)
    found += _of_experts(known.silenced)
    found += [
        Change(_weight_name(at, group), "weight", layers=(at.layer,), group=group, weight=at, of=of)
        for at, group, of in known.weights
    ]
    found += _of_expert_map(prepared, known.mapped)
    return tuple({change.name: change for change in found}.values())


def _weight_name(at: WeightAt, group: Group) -> str:
    return f"weight {at.name}" + (f" ({group})" if group.startswith("control") else "")


def feature_sets(names: Sequence[str], known: Known, width: int, seed: str) -> list[tuple[str, Group, tuple[int, ...]]]:
    """(name, group, features) of each set that is changed together, in the order asked for."""
    found: list[tuple[str, Group, tuple[int, ...]]] = []
    numbers = [int(name) for name in names if name.isdigit()]
    matched = matched_features(known.systematic, known.magnitudes)
    for name in names:
        word, _, count = name.partition("=")
        if word == "systematic" and known.systematic:
            found.append(("systematic", "systematic", known.systematic))
            if len(known.systematic) > 1:
                found += [(f"systematic {f}", "systematic", (f,)) for f in known.systematic[:MOST_SINGLES]]
        elif word == "matched" and matched:
            found.append(("matched", "matched", matched))
        elif word == "random":
            chosen = random_features(int(count or RANDOM), width, (*known.systematic, *matched), seed)
            found += [(f"random {feature}", "random", (feature,)) for feature in chosen]
    if len(numbers) > 1:
        all_of = ",".join(map(str, numbers))
        name = all_of if len(all_of) <= MOST_NAME else f"the {len(numbers)} given"
        found.append((name, "asked", tuple(numbers)))
    return found + [(str(number), "asked", (number,)) for number in numbers]


def _of_features(
    prepared: Prepared, known: Known, seed: str, kind: Literal["zero", "mean"], names: Sequence[str]
) -> list[Change]:
    sites, layers = feature_sites(prepared), prepared.layers
    return [
        Change(f"{kind} {name}", kind, sites, layers, group, features, alone=name.startswith("systematic "))
        for name, group, features in feature_sets(names, known, feature_width(prepared), seed)
    ]


def held_features(prepared: Prepared, systematic: tuple[int, ...]) -> tuple[int, ...]:
    """The features of --hold, ascending; empty where it names none, or the study has none."""
    names = asked_of(prepared.spec).hold
    found = {int(name) for name in names if name.isdigit()}
    if "systematic" in names:
        found |= set(systematic)
    return tuple(sorted(found))


def held_sites(prepared: Prepared) -> tuple[str, ...]:
    """The sites whose features the held ones are."""
    return tuple(site for site in feature_sites(prepared) if site in quantized_sites(prepared))


def _of_formats(prepared: Prepared, known: Known) -> list[Change]:
    asked, sites, layers = asked_of(prepared.spec), quantized_sites(prepared), prepared.layers
    held = held_features(prepared, known.systematic) if held_sites(prepared) else ()
    found: list[Change] = []

    everywhere = Change("", "format", sites, layers)

    def add(name: str, **options: Any) -> None:
        found.append(replace(everywhere, name=name, **options))

    if asked.weights:
        add(f"weights {asked.weights}", kind="weights", weights=asked.weights)
    if asked.prefix:
        add("prefix", kind="prefix", prefix=True)
    for own in asked.quantize:
        add(own, format=own)
        if parse_format(own).base in RANGES:
            add(f"{own}, range without first tokens", format=own, first_tokens=False)
        if held:
            add(f"{own}, held", format=own, held=held)
        if asked.weights:
            add(f"{own}, weights {asked.weights}", format=own, weights=asked.weights)
        for strength in asked.smooth:
            add(f"{own}, smooth {strength:g}", format=own, smooth=strength)
            if asked.weights:
                add(
                    f"{own}, smooth {strength:g}, weights {asked.weights}",
                    format=own,
                    smooth=strength,
                    weights=asked.weights,
                )
        if asked.prefix:
            add(f"{own}, prefix", format=own, prefix=True)
    return found


def _of_expert_inputs(prepared: Prepared) -> list[Change]:
    """Each format at the experts' inputs alone, in all layers that have experts."""
    layers = routed_layers(prepared)
    if not layers or "mlp_in" not in quantized_sites(prepared) or prepared.spec.capture.experts == "off":
        return []
    return [
        Change(f"{own}, experts alone", "experts", ("mlp_in",), layers, format=own)
        for own in asked_of(prepared.spec).quantize
    ]


def _of_experts(chosen: ExpertChoice) -> list[Change]:
    """Each silenced expert alone, followed by its controls, then all super experts together with theirs."""
    found = [
        Change(
            f"expert {name_of(one.at)}" + (f" ({one.role}, beside {one.of})" if one.of else ""),
            "silence",
            layers=(one.at[0],),
            group=one.role,
            of=one.of,
            experts=(one.at,),
        )
        for one in chosen.singles
    ]
    sets: list[tuple[str, Group, tuple[Expert, ...]]] = [
        ("super experts", "super", chosen.together),
        ("as many random experts", "random", chosen.random),
        ("as many experts of equal load", "load", chosen.load),
    ]
    for name, group, own in sets:
        if own:
            layers = tuple(sorted({layer for layer, _ in own}))
            of = None if group == "super" else "super experts"
            found.append(Change(name, "silence", layers=layers, group=group, of=of, experts=own))
    return found


def map_name(form: str, site: str, layer: int) -> str:
    """The name of one cell of a sensitivity map."""
    return f"map {form} {site} {layer}"


def _of_map(prepared: Prepared) -> list[Change]:
    form = asked_of(prepared.spec).map
    if form is None:
        return []
    return [
        Change(map_name(form, site, layer), "map", (site,), (layer,), format=form)
        for layer in prepared.layers
        for site in quantized_sites(prepared)
    ]


def _of_expert_map(prepared: Prepared, experts: Sequence[Expert]) -> list[Change]:
    """The map's format at the input of each expert alone."""
    form = asked_of(prepared.spec).map
    return [
        Change(f"map {form} expert {name_of(at)}", "map", ("mlp_in",), (at[0],), format=form, experts=(at,))
        for at in experts
        if form is not None
    ]


def error_formats(prepared: Prepared) -> tuple[str, ...]:
    """The formats whose squared error is measured at each place, for a sensitivity map; the map's own is first."""
    asked = asked_of(prepared.spec)
    if asked.map is None:
        return ()
    return tuple(dict.fromkeys((asked.map, *asked.quantize, *prepared.spec.formats.formats)))


def parse_weight(name: str) -> WeightAt:
    """`11.mlp.down_proj[507,1229]`, as ProbeSpec lets it through."""
    path, _, place = name.removesuffix("]").partition("[")
    layer, _, module = path.partition(".")
    row, _, column = place.partition(",")
    return WeightAt(int(layer), module, int(row), int(column))
