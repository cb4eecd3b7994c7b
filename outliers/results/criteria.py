"""The readings of LLM.int8()'s rule: integer counts in, lists of features out.

"the magnitude of the feature is at least 6.0, affects at least 25% of layers, and affects at least 6% of the sequence
dimensions" (Dettmers et al. 2022, arXiv 2208.07339, section 4.1) leaves open what is counted; each reading is one
exact answer. All comparisons are of integers with exact fractions: a float mean misses an exact 6% now and then.
It works on counts and does not know where they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rules:
    """The two shares that a reading compares with, as exact fractions."""

    layers: Fraction
    positions: Fraction


@dataclass(frozen=True)
class Verdict:
    """One reading of every feature of a site.

    passes: (feature,) bool. layer_hits: (layer, feature) bool, the layers that the layer rule counts. position_fraction:
    (feature,) float64, the left side of the token rule, or None where the reading has it inside the layer rule.
    """

    passes: NDArray[np.bool_]
    layer_hits: NDArray[np.bool_]
    position_fraction: NDArray[np.float64] | None


def at_least(share: Fraction, whole: int) -> int:
    """The smallest integer n with n / whole >= share."""
    return math.ceil(share * whole)


def judge(hits: NDArray[np.int64], union: NDArray[np.int64], tokens: int, rules: Rules) -> dict[str, Verdict]:
    """Every reading, from hits (layer, feature) and union (feature,), the tokens with a hit in any layer."""
    num_layers = hits.shape[0]
    touched = hits > 0
    affected = touched.sum(axis=0)
    total = hits.sum(axis=0)
    wide = affected >= at_least(rules.layers, num_layers)
    # sum(hits) >= fraction * affected layers * tokens, for every possible number of affected layers
    needed = np.array([at_least(rules.positions, count * tokens) for count in range(num_layers + 1)], dtype=np.int64)
    strong = hits >= max(1, at_least(rules.positions, tokens))
    return {
        "pooled": Verdict(
            passes=wide & (total >= at_least(rules.positions, num_layers * tokens)),
            layer_hits=touched,
            position_fraction=total / max(1, num_layers * tokens),
        ),
        "union": Verdict(
            passes=wide & (union >= at_least(rules.positions, tokens)),
            layer_hits=touched,
            position_fraction=union / max(1, tokens),
        ),
        "per_layer": Verdict(
            passes=strong.sum(axis=0) >= at_least(rules.layers, num_layers),
            layer_hits=strong,
            position_fraction=None,
        ),
        "affected": Verdict(
            passes=wide & (total >= needed[affected]),
            layer_hits=touched,
            position_fraction=total / np.maximum(1, affected * tokens),
        ),
    }


def legacy_passes(
    hooks: NDArray[np.int64], union: NDArray[np.int64], num_layers: int, tokens: int, rules: Rules
) -> NDArray[np.bool_]:
    """The earlier pipeline's decision on one sequence: (feature,) bool.

    hooks: (feature,), how many of the 2 x num_layers hooks saw a hit; union: (feature,), tokens with a hit in any hook.
    """
    return (hooks >= at_least(rules.layers, 2 * num_layers)) & (union >= at_least(rules.positions, tokens))


def kurtosis(histogram: NDArray[np.int64], values: NDArray[np.float64]) -> float | None:
    """Pearson kurtosis E[(x-mean)^4] / var^2 of a histogram (Bondarenko et al. 2023); None for constant or no values.

    histogram: (pattern,) counts; values: (pattern,) value of each, finite where counted.
    """
    used = np.flatnonzero(histogram)
    counts, x = histogram[used].astype(np.float64), values[used]
    total = math.fsum(counts)
    if not total:
        return None
    centred = x - math.fsum(counts * x) / total
    variance = math.fsum(counts * centred**2) / total
    if variance == 0:
        return None
    return math.fsum(counts * centred**4) / total / variance**2


def quantile_magnitudes(
    histogram: NDArray[np.int64], values: NDArray[np.float64], levels: tuple[Fraction, ...]
) -> list[float] | None:
    """For each level the smallest magnitude that at least this share of all does not exceed (nearest rank); None for none."""
    ordered = _ordered(histogram, values)
    if ordered is None:
        return None
    magnitude, ends = ordered
    total = int(ends[-1])
    ranks = [max(0, math.ceil(level * total) - 1) for level in levels]
    return [float(magnitude[int(np.searchsorted(ends, rank, side="right"))]) for rank in ranks]


def median_magnitude(histogram: NDArray[np.int64], values: NDArray[np.float64]) -> float | None:
    """Median of abs(x) of a histogram: the mean of the two middle values where their number is even; None for none."""
    ordered = _ordered(histogram, values)
    if ordered is None:
        return None
    magnitude, ends = ordered
    total = int(ends[-1])
    low, high = (int(np.searchsorted(ends, rank, side="right")) for rank in ((total - 1) // 2, total // 2))
    return float(magnitude[low] + magnitude[high]) / 2


def _ordered(
    histogram: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """Magnitudes that occur, ascending, and how many values there are up to each; None where there are none."""
    used = np.flatnonzero(histogram)
    if not used.size:
        return None
    magnitude = np.abs(values[used])
    order = np.argsort(magnitude, kind="stable")
    return magnitude[order], np.cumsum(histogram[used][order])
