"""Super experts (Su et al. 2025, arXiv 2507.23279), by two readings.

Ours: an expert is one where the largest magnitude of its output, over all tokens that were routed to it, is above P99.5 of all
experts and above a tenth of the largest. Routed experts of all layers that were read; those whose output is unknown are left
out. `as_published` repeats the authors' program (ZunhaiSu/Super-Experts-Profilling, revision 573aead): layers below
round(0.75 L) alone, L the layers of the model; of each sequence the first token that reached the expert; an expert that
nothing reached counts as 0; shared experts are in the population; the tenth is rounded down to a whole number. In both, P99.5
is numpy's linear percentile, and both comparisons are `>`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from outliers.experts.totals import ExpertTotals

PERCENTILE = 99.5
LAYER_SHARE = 0.75
"""Of the model's layers, the lower ones in which the published program looks."""


@dataclass(frozen=True)
class SuperExperts:
    """What one reading finds. L layers with experts, A = routed and shared experts.

    layers_below: None for all. marks: (L, A) bool. values: (L, A) float64, what was compared, NaN where it was not.
    unknown: experts of the layers without a known output. percentile, largest, bound: None of an empty population. at_most:
    how many of the population can be above the percentile. none_because: None where there are some.
    """

    layers_below: int | None
    marks: NDArray[np.bool_]
    values: NDArray[np.float64]
    population: int
    unknown: int
    percentile: float | None
    largest: float | None
    bound: float | None
    at_most: int
    none_because: Literal["tie", "zero", "nothing known"] | None


def over_all_tokens(totals: ExpertTotals) -> SuperExperts:
    """Our reading."""
    values = totals.output_max.astype(np.float64)
    values[:, totals.shapes.experts :] = np.nan
    unknown = int(np.isnan(values[:, : totals.shapes.experts]).sum())
    return _judged(values, unknown, None, whole=False)


def as_published(totals: ExpertTotals, num_layers: int) -> SuperExperts:
    """The published program's reading. num_layers: decoder layers of the model, with experts or not."""
    below = round(LAYER_SHARE * num_layers)
    inside = np.array(totals.shapes.layers) < below
    first = totals.first_row.astype(np.float64)
    unknown = int(np.isnan(first[inside]).sum())
    values = np.where(np.isnan(first), 0.0, first)
    values[~inside] = np.nan
    return _judged(values, unknown, below, whole=True)


def _judged(values: NDArray[np.float64], unknown: int, below: int | None, *, whole: bool) -> SuperExperts:
    """whole: whether a tenth of the largest is rounded down to a whole number."""
    known = values[~np.isnan(values)]
    size = int(known.size)
    if not size:
        marks = np.zeros(values.shape, np.bool_)
        return SuperExperts(below, marks, values, 0, unknown, None, None, None, 0, "nothing known")
    percentile, largest = float(np.percentile(known, PERCENTILE)), float(known.max())
    bound = largest // 10 if whole else largest / 10
    with np.errstate(invalid="ignore"):
        marks = (values > percentile) & (values > bound)
    none: Literal["tie", "zero"] | None = None if marks.any() else "tie" if largest > 0 else "zero"
    at_most = size - 1 - math.floor(PERCENTILE / 100 * (size - 1))
    return SuperExperts(below, marks, values, size, unknown, percentile, largest, bound, at_most, none)
