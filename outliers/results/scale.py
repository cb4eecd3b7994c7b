"""Magnitudes in units of their site: abs(x) over the standard deviation of all finite values of that site and layer.

The number 6.0 is not a scale of a model: within one model it can be 15 deviations of one layer and 119 of another. The deviation
is about the mean, sqrt(E[x^2] - E[x]^2). The value is not centred, because a hit is defined by abs(x) and zeroing a feature sets
it to zero. For bfloat16 and float16 both come from the exact histogram. For float32 the deviation comes from float64 sums, cut to
float32, and the ladder from the histogram, whose values are rounded to bfloat16.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.counting.bits import pattern_values
from outliers.counting.summary import SiteTotals, Summary
from outliers.results.criteria import at_least
from outliers.spec import BLOCK, BLOCK_SITES

MULTIPLES = (3.0, 6.0, 10.0, 20.0, 50.0)
"""The second ladder, in standard deviations."""
CANCELLED = 1e-9
"""Share of the mean square below which a variance from float32 sums is what rounding left, not a number."""


def deviation(totals: SiteTotals, layer: int, dtype: str) -> float | None:
    """The standard deviation of the finite values of one layer; None without finite values, or where all are equal."""
    if dtype == "float32":
        return _from_sums(totals, layer)
    values, _ = pattern_values(dtype)
    used = np.flatnonzero(totals.histogram[layer])
    counts, x = totals.histogram[layer][used].astype(np.float64), values[used]
    total = math.fsum(counts)
    if not total:
        return None
    centred = x - math.fsum(counts * x) / total
    variance = math.fsum(counts * centred**2) / total
    return math.sqrt(variance) if variance > 0 else None


def _from_sums(totals: SiteTotals, layer: int) -> float | None:
    count = int(totals.finite[layer].sum())
    if not count:
        return None
    mean, square = (math.fsum(totals.moments[power, layer].tolist()) / count for power in (0, 1))
    variance = square - mean**2
    return float(np.float32(math.sqrt(variance))) if variance > CANCELLED * square else None


def deviations(summary: Summary, site: str) -> list[float | None]:
    """The deviation of each layer at a captured site."""
    totals = summary.sites[site]
    return [deviation(totals, layer, summary.frame.dtype) for layer in range(summary.frame.num_layers)]


def magnitudes(summary: Summary, site: str) -> NDArray[np.float64]:
    """(layer, feature): the largest magnitude in deviations of its layer; NaN without finite values, and where all are equal.

    At block each of its two sites is measured by its own deviation, and the larger counts.
    """
    if site == BLOCK:
        one, other = (magnitudes(summary, member) for member in BLOCK_SITES)
        both: NDArray[np.float64] = np.fmax(one, other)
        return both
    totals = summary.sites[site]
    largest = np.maximum(totals.max.astype(np.float64), -totals.min.astype(np.float64))
    units = np.array([np.nan if own is None else own for own in deviations(summary, site)])
    found: NDArray[np.float64] = np.where(np.isfinite(largest), largest, np.nan) / units[:, None]
    return found


def layer_ladder(summary: Summary, site: str, layer: int) -> dict[str, Any]:
    """Of one layer: its deviation, and at each of MULTIPLES the values and the features that reach it."""
    totals = summary.sites[site]
    own = deviation(totals, layer, summary.frame.dtype)
    if own is None:
        return {"standard_deviation": None, "sd_hits": None, "sd_features": None}
    values, _ = pattern_values(summary.frame.dtype)
    used = np.flatnonzero(totals.histogram[layer])
    sizes, counts = np.abs(values[used]), totals.histogram[layer][used]
    reached = magnitudes_of_layer(totals, layer) / own
    return {
        "standard_deviation": own,
        "sd_hits": [int(counts[sizes >= step * own].sum()) for step in MULTIPLES],
        "sd_features": [int((reached >= step).sum()) for step in MULTIPLES],
    }


def magnitudes_of_layer(totals: SiteTotals, layer: int) -> NDArray[np.float64]:
    """(feature,): the largest magnitude of each; -inf where nothing is finite."""
    found: NDArray[np.float64] = np.maximum(totals.max[layer].astype(np.float64), -totals.min[layer].astype(np.float64))
    return found


def ladder(summary: Summary, layer_share: Any) -> dict[str, Any]:
    """How many features reach each of MULTIPLES: in one layer, and in the share of layers that the criteria ask for."""
    least = at_least(layer_share, summary.frame.num_layers)
    found: dict[str, Any] = {"multiples": list(MULTIPLES), "features": {}, "features_in_layers": {}}
    for site in summary.frame.sites:
        own = magnitudes(summary, site)
        layers = [(own >= step).sum(axis=0) for step in MULTIPLES]  # NaN compares as False
        found["features"][site] = [int((count > 0).sum()) for count in layers]
        found["features_in_layers"][site] = [int((count >= least).sum()) for count in layers]
    return found


def largest(units: NDArray[np.float64], feature: int) -> float | None:
    """The largest of a feature over the layers; None where it has none. units: of `magnitudes`."""
    column = units[:, feature]
    return None if np.isnan(column).all() else float(np.nanmax(column))
