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
from outliers.summary import MASSIVE_KEPT, MASSIVE_MAGNITUDE, MASSIVE_RATIO, Summary


@dataclass(frozen=True)
class Massive:
    """The largest MASSIVE_KEPT cells (layer, sequence, position, feature, value, ratio, ...), and how many there are.

    The same by the token's own median in the place of the layer's: a variant, BY_TOKEN_KEPT cells.
    """

    cells: tuple[dict[str, Any], ...]
    count: int
    by_token: tuple[dict[str, Any], ...]
    by_token_count: int


BY_TOKEN_KEPT = 200


def massive_activations(summary: Summary) -> Massive | None:
    """The massive activations of a Summary, largest first; None where resid was not captured."""
    totals = summary.sites.get("resid")
    if totals is None:
        return None
    values, _ = pattern_values(summary.frame.dtype)
    cells: list[dict[str, Any]] = []
    by_token: list[dict[str, Any]] = []
    count = 0
    for layer in range(summary.frame.num_layers):
        median = median_magnitude(totals.histogram[layer], values)
        kept = summary.massive[summary.massive["layer"] == layer]
        passing = kept[kept["magnitude"] >= MASSIVE_RATIO * (median or 0.0)]
        cells.extend(_cell(cell, median or 0.0) for cell in passing)
        own = kept[kept["magnitude"].astype(np.float64) >= MASSIVE_RATIO * kept["token_median"]]
        by_token.extend(_cell(cell, median or 0.0) for cell in own)
        if int(summary.massive_cells[layer]) <= kept.size:
            count += passing.size
        else:
            # more than the list holds: counted in the histogram, which for float32 is of values rounded to bfloat16
            count += _beyond(totals.histogram[layer], values, median or 0.0)
    return Massive(
        cells=tuple(sorted(cells, key=_place)[:MASSIVE_KEPT]),
        count=count,
        by_token=tuple(sorted(by_token, key=_place)[:BY_TOKEN_KEPT]),
        by_token_count=int(summary.massive_by_token.sum()),
    )


def _place(cell: dict[str, Any]) -> tuple[float, int, int, int, int]:
    return -abs(cell["value"]), cell["layer"], cell["sequence"], cell["position"], cell["feature"]


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
