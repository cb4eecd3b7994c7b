"""The section of a mixture's experts on the page: coverage, super experts by both readings, routing, who gives what.

It words the part `experts` of summary.json; it knows no files and no HTML.
"""

from __future__ import annotations

from typing import Any

from outliers.report.figures import number, percent
from outliers.results.expert_words import coverage_warning, name_of, reach_words
from outliers.results.schema import ExpertsBlock, FeatureExperts, KindBlock, MassiveExperts, SuperReading

MAX_SUPER_ROWS = 24
MAX_GIVER_ROWS = 16
MAX_KIND_ROWS = 6
MAX_FEATURE_GIVERS = 16

_NONE = {
    "tie": "the largest output is that of several experts, so that none is above P99.5",
    "zero": "no output is above 0",
    "nothing known": "no output is known",
}


def expert_values(block: ExpertsBlock | None) -> dict[str, Any] | None:
    """What the template shows; None for a study without experts."""
    if block is None:
        return None
    size = len(block.layers) * block.experts
    return {
        "block": block,
        "size": size,
        "coverage": [(row.at_most, row.experts, percent(row.experts / size)) for row in block.coverage],
        "warning": coverage_warning(block),
        "never": _ends(block.never_reached, block.never_reached_ends),
        "entropy": None if block.entropy is None else _plain(block.entropy, block.entropy_ends),
        "reach": reach_words(block),
        "readings": [
            reading
            for reading in (
                _reading("all tokens", block.super_experts),
                _reading("as published", block.super_experts_as_published),
            )
            if reading is not None
        ],
        "given": [_feature(one) for one in (block.attribution or ())[:MAX_FEATURE_GIVERS]],
        "massive": [_massive(one) for one in (block.massive or ())[:MAX_GIVER_ROWS]],
        "kinds": [_kind(one) for one in block.kinds],
    }


def _ends(share: float, ends: list[float] | None) -> str:
    said = percent(share)
    return said if ends is None else f"{said} ({percent(ends[0])} to {percent(ends[1])} over resamples)"


def _plain(value: float, ends: list[float] | None) -> str:
    said = f"{value:.3f}"
    return said if ends is None else f"{said} ({ends[0]:.3f} to {ends[1]:.3f} over resamples)"


def _reading(name: str, reading: SuperReading | None) -> dict[str, Any] | None:
    """One reading of super experts, with the bounds that decided."""
    if reading is None:
        return None
    where = "all layers that were read" if reading.layers_below is None else f"layers below {reading.layers_below}"
    counted = "0" if name == "as published" else "left out"
    bounds = (
        ""
        if reading.percentile is None or reading.bound is None or reading.largest is None
        else (
            f"above P99.5 = {number(reading.percentile)} and above {number(reading.bound)}, a tenth of the largest "
            f"({number(reading.largest)}){', rounded down' if name == 'as published' else ''}"
        )
    )
    return {
        "name": name,
        "population": f"{reading.population:,} experts of {where}; {reading.unknown:,} unknown ({counted}); at most "
        f"{reading.at_most:,} can be above P99.5",
        "bounds": bounds,
        "count": reading.count,
        "none": None if reading.none_because is None else _NONE[reading.none_because],
        "rows": reading.experts[:MAX_SUPER_ROWS],
        "names": [name_of(row.layer, row.expert) for row in reading.experts[:MAX_SUPER_ROWS]],
    }


def _feature(one: FeatureExperts) -> dict[str, Any]:
    """The layer that gives most of a feature, and its experts."""
    row = max(one.layers, key=lambda row: (row.experts_squares or 0.0, -row.layer))
    givers = [
        f"{name_of(row.layer, expert)} {percent(share)}" for expert, share in zip(row.experts, row.shares, strict=True)
    ]
    return {
        "feature": one.feature,
        "layer": row.layer,
        "experts": ", ".join(givers) or "–",
        "squares": "–" if row.experts_squares is None else number(row.experts_squares),
        "block": "–" if row.block_squares is None else number(row.block_squares),
    }


def _massive(one: MassiveExperts) -> dict[str, Any]:
    """The place of massive activations, its layers in words, and the experts that give them."""
    first, last = one.first_layer, one.last_layer
    return {
        "feature": one.feature,
        "sequence": one.sequence,
        "position": one.position,
        "value": one.value,
        "layers": f"{first}" if first == last else f"{first} to {last}",
        "givers": ", ".join(
            f"{name_of(row.layer, row.expert)} {number(row.output)} × {'–' if row.weight is None else number(row.weight)}"
            for row in one.experts
        )
        or "none among the largest outputs",
    }


def _kind(one: KindBlock) -> dict[str, Any]:
    names = {"first": "first tokens", "delimiter": "delimiters", "special": "special tokens"}
    return {
        "kind": names[one.kind],
        "tokens": one.tokens,
        "experts": ", ".join(
            f"{name_of(row.layer, row.expert)} {percent(row.share)} (all tokens: {percent(row.share_of_all)})"
            for row in one.experts[:MAX_KIND_ROWS]
        )
        or "as all tokens",
    }
