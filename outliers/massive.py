"""Massive activations (Sun et al. 2024, arXiv 2402.17762): at `resid`, abs(x) > 100 and >= 1000 times the layer's median.

The median is of abs(x) over the layer's tokens of the whole corpus; the token's own median stands beside it. Knows a
Summary, nothing of texts. Before it: `summary`. After it: `results`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.bits import pattern_values
from outliers.criteria import median_magnitude
from outliers.summary import MASSIVE_KEPT, MASSIVE_MAGNITUDE, Summary

MASSIVE_RATIO = 1000.0
"""Times the median of the hidden state's magnitudes (section 2 of the paper)."""


@dataclass(frozen=True)
class Massive:
    """The largest MASSIVE_KEPT cells (layer, sequence, position, feature, value, ratio, ...), and how many there are."""

    cells: tuple[dict[str, Any], ...]
    count: int


def massive_activations(summary: Summary) -> Massive | None:
    """The massive activations of a Summary, largest first; None where resid was not captured."""
    totals = summary.sites.get("resid")
    if totals is None:
        return None
    values, _ = pattern_values(summary.frame.dtype)
    cells: list[dict[str, Any]] = []
    count = 0
    for layer in range(summary.frame.num_layers):
        median = median_magnitude(totals.histogram[layer], values)
        kept = summary.massive[summary.massive["layer"] == layer]
        passing = kept[kept["magnitude"] >= MASSIVE_RATIO * (median or 0.0)]
        cells.extend(_cell(cell, median or 0.0) for cell in passing)
        if int(summary.massive_cells[layer]) <= kept.size:
            count += passing.size
        else:
            # more than the list holds: counted in the histogram, which for float32 is of values rounded to bfloat16
            count += _beyond(totals.histogram[layer], values, median or 0.0)
    cells.sort(key=lambda c: (-abs(c["value"]), c["layer"], c["sequence"], c["position"], c["feature"]))
    return Massive(cells=tuple(cells[:MASSIVE_KEPT]), count=count)


def _cell(cell: Any, median: float) -> dict[str, Any]:
    value, own = float(cell["value"]), float(cell["token_median"])
    return {
        "layer": int(cell["layer"]),
        "sequence": int(cell["sequence"]),
        "position": int(cell["position"]),
        "feature": int(cell["feature"]),
        "value": value,
        "ratio": abs(value) / median if median else None,
        "token_median": own,
        "token_ratio": abs(value) / own if own else None,
    }


def _beyond(histogram: NDArray[np.int64], values: NDArray[np.float64], median: float) -> int:
    magnitude = np.abs(values)
    return int(histogram[(magnitude > MASSIVE_MAGNITUDE) & (magnitude >= MASSIVE_RATIO * median)].sum())
