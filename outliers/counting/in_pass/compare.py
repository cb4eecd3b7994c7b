"""Where two Summaries of the same sequences differ: what counts in the pass is held against the loops that count a capture.

Knows arrays.
"""

from __future__ import annotations

import numpy as np

from outliers.counting.sequence_counts import SequenceCounts
from outliers.counting.summary import RESULTS, Summary


def first_difference(one: Summary, other: Summary) -> str | None:
    """The first array that differs in a bit, where and with both numbers; None where all are equal. `fine` is passed over."""
    if one.tokens != other.tokens:
        return f"tokens: {one.tokens} and {other.tokens}"
    for site, totals in one.sites.items():
        for name, mine in totals.__dict__.items():
            theirs = getattr(other.sites[site], name)
            different = np.argwhere(~((mine == theirs) | ((mine != mine) & (theirs != theirs))))
            if different.size:
                where = tuple(different[0].tolist())
                return f"{name} at {site}, {_axes(name, where)}: {mine[where]} and {theirs[where]}"
    for name in RESULTS:
        mine, theirs = getattr(one, name), getattr(other, name)
        if not np.array_equal(mine, theirs):
            return f"{name} ({np.size(mine)} and {np.size(theirs)} entries)"
    return None


def first_difference_of_sequences(mine: list[SequenceCounts], theirs: list[SequenceCounts]) -> str | None:
    """The same of the counts of single sequences; their losses are passed over."""
    if len(mine) != len(theirs):
        return f"{len(mine)} and {len(theirs)} sequences"
    for one, other in zip(mine, theirs, strict=True):
        if (one.sequence, one.tokens) != (other.sequence, other.tokens):
            return f"sequence {one.sequence} of {one.tokens} tokens and {other.sequence} of {other.tokens}"
        for name in ("hooks", "legacy_union"):
            if not np.array_equal(getattr(one, name), getattr(other, name)):
                return f"{name} of sequence {one.sequence}"
        for name in ("hits", "union", "reach"):
            for site, counts in getattr(one, name).items():
                if not np.array_equal(counts, getattr(other, name)[site]):
                    return f"{name} at {site} of sequence {one.sequence}"
    return None


def _axes(name: str, where: tuple[int, ...]) -> str:
    """A place in an array of `SiteTotals` in words; layers are counted from 0 among the captured."""
    axes = {
        "hits": ("magnitude", "layer", "feature"),
        "first_hits": ("magnitude", "layer", "feature"),
        "union": ("magnitude", "feature"),
        "first_union": ("magnitude", "feature"),
        "moments": ("power", "layer", "feature"),
        "histogram": ("layer", "pattern"),
        "nonfinite": ("layer",),
    }.get(name, ("layer", "feature"))
    return ", ".join(f"{axis} {number}" for axis, number in zip(axes, where, strict=True))
