"""Which experts give a systematic feature, a massive activation, and which get the first tokens, delimiters, special tokens.

share_e = sum over tokens of (w o_e)^2 over the sum over all experts of the same, at the feature's channel: of squares, so that
cross terms between experts are ignored, and the block's own sum of squares is given with it. Made from ExpertTotals alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.experts.table import number_of
from outliers.experts.totals import KINDS, OUTPUTS_KEPT, ExpertTotals
from outliers.results.schema import MassiveRow
from outliers.results.schema.experts import (
    MAX_BY_KIND,
    MAX_FOUND,
    MAX_GIVERS,
    MAX_SHARES,
    FeatureExperts,
    FeatureLayer,
    Giver,
    KindBlock,
    KindExpert,
    MassiveExperts,
)

ROUNDED = 6
"""Digits of a share and of a sum of squares: sums agree to 1e-12 between orders of adding."""


def feature_experts(totals: ExpertTotals, features: Sequence[int]) -> list[FeatureExperts] | None:
    """Who gives each of the first MAX_FOUND features; None where outputs are unknown."""
    if totals.sums is None:
        return None
    energy, block = totals.sums.energy, totals.sums.block
    return [
        FeatureExperts(
            feature=feature,
            layers=[
                _feature_layer(totals, number, energy[index, :, feature], float(block[index, feature]))
                for index, number in enumerate(totals.shapes.layers)
            ],
        )
        for feature in features[:MAX_FOUND]
    ]


def _feature_layer(totals: ExpertTotals, layer: int, energy: NDArray[np.float64], block: float) -> FeatureLayer:
    """energy: (A,) sums of squares of the weighted outputs at one channel."""
    whole = math.fsum(energy.tolist()) if np.isfinite(energy).all() else math.nan
    order = np.lexsort((np.arange(energy.size), -energy))[:MAX_SHARES]
    first = [int(index) for index in order if energy[index] > 0] if whole > 0 else []
    return FeatureLayer(
        layer=layer,
        experts=[number_of(index, totals.shapes.experts) for index in first],
        shares=[min(1.0, rounded(float(energy[index]) / whole)) for index in first],
        experts_squares=rounded(whole) if math.isfinite(whole) else None,
        block_squares=rounded(block) if math.isfinite(block) else None,
    )


def rounded(value: float) -> float:
    """ROUNDED significant digits."""
    return float(f"{value:.{ROUNDED - 1}e}")


def massive_experts(totals: ExpertTotals, massive: Sequence[MassiveRow] | None) -> list[MassiveExperts] | None:
    """Who gives the massive activations, by token and feature, the largest first; None where either is unknown."""
    if totals.sums is None or massive is None:
        return None
    places: dict[tuple[int, int, int], list[MassiveRow]] = {}
    for row in massive:
        places.setdefault((row.sequence, row.position, row.feature), []).append(row)
    found = [_massive(totals, place, rows) for place, rows in list(places.items())]
    found.sort(key=lambda one: (-abs(one.value), one.sequence, one.position, one.feature))
    return found[:MAX_FOUND]


def _massive(totals: ExpertTotals, place: tuple[int, int, int], rows: list[MassiveRow]) -> MassiveExperts:
    sequence, position, feature = place
    largest = min(rows, key=lambda row: (-abs(row.value), row.layer))
    last = max(row.layer for row in rows)
    outputs, layers = totals.outputs, np.array(totals.shapes.layers)
    here = (outputs["sequence"] == sequence) & (outputs["position"] == position) & (outputs["channel"] == feature)
    own = outputs[here & (layers[outputs["layer"]] <= last)] if outputs.size else outputs
    own = own[np.lexsort((own["expert"], own["layer"], -own["magnitude"]))][:MAX_GIVERS]
    return MassiveExperts(
        sequence=sequence,
        position=position,
        feature=feature,
        first_layer=min(row.layer for row in rows),
        last_layer=last,
        value=largest.value,
        experts=[_giver(totals, record) for record in own],
    )


def _giver(totals: ExpertTotals, record: Any) -> Giver:
    return Giver(
        layer=totals.shapes.layers[int(record["layer"])],
        expert=number_of(int(record["expert"]), totals.shapes.experts),
        output=float(record["magnitude"]),
        weight=float(record["weight"]) if np.isfinite(record["weight"]) else None,
    )


def outputs_floor(totals: ExpertTotals, layer: int) -> float | None:
    """The least of the outputs that are kept of a layer (an index); None where all are."""
    own = totals.outputs["magnitude"][totals.outputs["layer"] == layer]
    return float(own.min()) if own.size >= OUTPUTS_KEPT else None


def kinds_of(totals: ExpertTotals) -> list[KindBlock]:
    """Where first tokens, delimiters and special tokens go, against all tokens; kinds without tokens are left out."""
    experts, whole = totals.shapes.experts, int(totals.lengths.sum())
    tokens = totals.tokens[:, :experts]
    found = []
    for number, kind in enumerate(KINDS):
        own, of_kind = totals.by_kind[number, :, :experts], int(totals.kinds[number])
        if not of_kind:
            continue
        # in integers, so that equal excesses are equal: own / of_kind - tokens / whole
        excess = own.astype(object) * whole - tokens.astype(object) * of_kind
        places = sorted(np.argwhere(excess > 0).tolist(), key=lambda at: (-excess[at[0], at[1]], at))
        rows = [
            KindExpert(
                layer=totals.shapes.layers[layer],
                expert=expert,
                tokens=int(own[layer, expert]),
                share=int(own[layer, expert]) / of_kind,
                share_of_all=int(tokens[layer, expert]) / whole,
            )
            for layer, expert in places[:MAX_BY_KIND]
        ]
        # the keys of the counts are the kinds; mypy knows them as strings
        found.append(KindBlock(kind=kind, tokens=of_kind, experts=rows))  # type: ignore[arg-type]
    return found
