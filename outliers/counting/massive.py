"""Massive activations (Sun et al. 2024, arXiv 2402.17762): at `resid`, abs(x) > 100 and >= 1000 times the layer's median.

The median is of abs(x) over the finite values of the layer in the whole corpus, the mean of the two middle ones where their
number is even; the median of the token is reported too. For float32 values the median comes from `second_look`. It is exact,
or, if merged summaries have not counted the same bins, a bound; values that the bound leaves undecided are reported and not
counted. Knows a Summary, nothing of texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.counting.bits import bits_to_float
from outliers.counting.second_look import bin_ends, bin_of, magnitude_bins, middle_bins
from outliers.counting.summary import MASSIVE_KEPT, MASSIVE_MAGNITUDE, MASSIVE_RATIO, Summary


@dataclass(frozen=True)
class Massive:
    """The largest MASSIVE_KEPT cells (layer, sequence, position, feature, value, ratio, ...), and how many there are.

    The same by the token's own median in the place of the layer's: a variant, BY_TOKEN_KEPT cells. undecided: values that
    a bound on the median leaves undecided; they are in neither list and not in the count. bounded: layers, counted
    from 0 among the captured, whose median is a bound and whose ratios are of the middle of it.
    """

    cells: tuple[dict[str, Any], ...]
    count: int
    by_token: tuple[dict[str, Any], ...]
    by_token_count: int
    undecided: int = 0
    bounded: tuple[int, ...] = ()


@dataclass(frozen=True)
class Median:
    """Bounds of the median of a layer's magnitudes; equal if the median is known."""

    low: Fraction
    high: Fraction

    @property
    def exact(self) -> bool:
        """Whether the median is known."""
        return self.low == self.high

    @property
    def middle(self) -> float:
        """The median, or the middle of its bound."""
        return float((self.low + self.high) / 2)


BY_TOKEN_KEPT = 200


def massive_activations(summary: Summary) -> Massive | None:
    """The massive activations of a Summary, largest first; None if resid was not captured."""
    if "resid" not in summary.sites:
        return None
    cells: list[dict[str, Any]] = []
    by_token: list[dict[str, Any]] = []
    count, open_count, bounded = 0, 0, []
    for layer in range(summary.frame.num_layers):
        if not summary.massive_cells[layer]:
            continue
        median = median_of(summary, layer)
        kept = summary.massive[summary.massive["layer"] == layer]
        sizes = kept["magnitude"].astype(np.float64)
        cells.extend(_cell(cell, median.middle) for cell in kept[_reach(sizes, median.high)])
        own = kept[sizes >= MASSIVE_RATIO * kept["token_median"]]
        by_token.extend(_cell(cell, median.middle) for cell in own)
        sure = _count(summary, layer, sizes, median.high, possible=False)
        possible = _count(summary, layer, sizes, median.low, possible=True)
        count += sure
        open_count += possible - sure
        bounded += [layer] if possible > sure or not median.exact else []
    return Massive(
        cells=tuple(sorted(cells, key=_place)[:MASSIVE_KEPT]),
        count=count,
        by_token=tuple(sorted(by_token, key=_place)[:BY_TOKEN_KEPT]),
        by_token_count=int(summary.massive_by_token.sum()),
        undecided=open_count,
        bounded=tuple(bounded),
    )


def undecided(summary: Summary) -> bool:
    """Whether a median that matters is only bounded, so that a second read of the whole capture would say more."""
    found = massive_activations(summary)
    return found is not None and bool(found.bounded)


def median_of(summary: Summary, layer: int) -> Median:
    """The median magnitude of a layer's finite values at resid."""
    bins = magnitude_bins(summary.sites["resid"].histogram[layer])
    middle = middle_bins(bins)
    if middle is None:
        return Median(Fraction(0), Fraction(0))
    if summary.frame.dtype != "float32":
        low, high = bits_to_float(np.array(middle, np.uint16), summary.frame.dtype).tolist()
        return Median(_half(low, high), _half(low, high))
    first, last = summary.fine_windows[layer, 0].tolist()
    if not first <= middle[0] <= middle[1] <= last:
        ends = [bin_ends(number, number) for number in middle]
        return Median(_half(ends[0][0], ends[1][0]), _half(ends[0][1], ends[1][1]))
    total, before = int(bins.sum()), int(bins[:first].sum())
    own = _own(summary, layer, 0)
    upto = before + np.cumsum(own["count"])
    places = [int(np.searchsorted(upto, rank, side="right")) for rank in ((total - 1) // 2, total // 2)]
    low, high = bits_to_float(own["bits"][places], "float32").tolist()
    return Median(_half(low, high), _half(low, high))


def _half(low: float, high: float) -> Fraction:
    return (Fraction(low) + Fraction(high)) / 2


def _own(summary: Summary, layer: int, window: int) -> NDArray[Any]:
    """The counts by bits in one window of a layer, ascending."""
    own: NDArray[Any] = summary.fine[summary.fine["layer"] == layer]
    first, last = summary.fine_windows[layer, window].tolist()
    bins = bin_of(own["bits"])
    inside: NDArray[Any] = own[(bins >= first) & (bins <= last)]
    return inside


def _reach(sizes: NDArray[np.float64], median: Fraction) -> NDArray[np.bool_]:
    """Which magnitudes are at least MASSIVE_RATIO times a median: exact, where a float product could be off by its last bit."""
    least = Fraction(MASSIVE_RATIO) * median
    near = float(least)
    passing = sizes >= near
    for index in np.flatnonzero(np.abs(sizes - near) <= 1e-9 * near):
        passing[index] = Fraction(float(sizes[index])) >= least
    return passing


def _count(summary: Summary, layer: int, sizes: NDArray[np.float64], median: Fraction, *, possible: bool) -> int:
    """How many values of a layer are massive if this is its median. sizes: magnitudes of the kept cells of the layer.

    possible: where the values near the border were not counted, include them; otherwise leave them out.
    """
    least, cells = Fraction(MASSIVE_RATIO) * median, int(summary.massive_cells[layer])
    if least <= Fraction(MASSIVE_MAGNITUDE):
        return cells
    if cells <= sizes.size or float(sizes.min()) < least:
        return int(_reach(sizes, median).sum())  # the kept ones are the largest: none beyond them reaches it
    bins = magnitude_bins(summary.sites["resid"].histogram[layer])
    if summary.frame.dtype != "float32":
        used = np.flatnonzero(bins)
        values = bits_to_float(used.astype(np.uint16), summary.frame.dtype).tolist()
        return sum(int(n) for n, value in zip(bins[used], values, strict=True) if Fraction(value) >= least)
    return _count_beyond(summary, layer, bins, least, possible=possible)


def _count_beyond(summary: Summary, layer: int, bins: NDArray[np.int64], least: Fraction, *, possible: bool) -> int:
    """The float32 values from `least` on: all bins above its own bin, and values of its own bin if they were counted."""
    nearest = np.array([min(float(np.finfo(np.float32).max), float(least))]).astype(np.float32)
    border = int(bin_of(nearest.view(np.uint32))[0])
    above = int(bins[border + 1 :].sum())
    first, last = summary.fine_windows[layer, 1].tolist()
    if not first <= border <= last:
        return above + (int(bins[border]) if possible else 0)
    own = _own(summary, layer, 1)
    own = own[bin_of(own["bits"]) == border]
    values = bits_to_float(own["bits"], "float32").tolist()
    return above + sum(int(n) for n, value in zip(own["count"], values, strict=True) if Fraction(value) >= least)


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
