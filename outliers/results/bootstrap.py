"""How stable a list is: bootstrap over sequences with a fixed seed, and intervals of the features' shares of tokens.

A resample draws whole sequences with replacement, because the tokens of one sequence are not independent. Every reading is
judged on each resample as on the corpus, in integers. That gives the share of resamples in which a feature passes, and the range
of how many pass in the middle LEVEL of the resamples. This range is not a confidence interval: resamples of few sequences differ
less than corpora do (docs/results.md says what it covers). Only features that could pass in some resample are judged: the share
of a resample is a mean of its sequences' shares, so one of them must reach the rule alone, and a resample touches no layer that
the corpus does not. A share of layers has no interval: a hit anywhere affects a layer, so the share only grows with the corpus.
It works on counts and knows nothing of files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from outliers.counting.summary import Frame
from outliers.counting.summary_files import SequenceCounts
from outliers.results.criteria import Rules, at_least
from outliers.results.intervals import ShareSpan, ends, share_span
from outliers.spec import READINGS

RESAMPLES = 1_000
FEWEST_RESAMPLES = 200
SEED = 0
LEVEL = 0.95
"""Share of the resamples between the two ends of a number of features."""
WORK = 2e10
"""Most products of a count and a weight; above it there are fewer resamples, at least FEWEST_RESAMPLES."""
BLOCK_CELLS = 4_000_000
"""(resample, layer, feature) computed at once: 32 MB."""


@dataclass
class Interval:
    """One feature by one reading: the ends of its share of tokens, and the share of resamples in which it passes."""

    position_fraction: tuple[float, float] | None
    passes: float


@dataclass
class Intervals:
    """counts: site -> reading -> (low, high), how many features pass. features: site -> reading -> feature -> Interval.

    shares: what the ends of a share of tokens are.
    """

    resamples: int
    shares: ShareSpan
    counts: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    features: dict[str, dict[str, dict[int, Interval]]] = field(default_factory=dict)


def bootstrap(
    frame: Frame, rules: Rules, candidates: dict[str, NDArray[np.int64]], sequences: Iterable[SequenceCounts]
) -> Intervals | None:
    """Intervals of every reading at every site; None for fewer than two sequences.

    candidates: site -> features that could pass in some draw, see `PerSequence`. sequences: the counts of all.
    """
    gathered = sorted(
        ((one.sequence, one.tokens, _own(one, candidates)) for one in sequences), key=lambda item: item[0]
    )
    if len(gathered) < 2:
        return None
    cells = sum(features.size for features in candidates.values()) * frame.num_layers
    affordable = int(WORK / max(1, cells * len(gathered)))
    resamples = min(RESAMPLES, max(FEWEST_RESAMPLES, affordable))
    weights = draws(len(gathered), resamples)
    found = Intervals(resamples, share_span(len(gathered)))
    lengths = np.array([tokens for _, tokens, _ in gathered], np.int64)
    for site, features in candidates.items():
        own = [counts[site] for _, _, counts in gathered]
        found.counts[site], found.features[site] = _site(frame, rules, features, own, weights, lengths)
    return found


def draws(sequences: int, resamples: int) -> NDArray[np.int64]:
    """(resample, sequence): how often each was drawn. RandomState's stream is frozen: the same on every version of numpy."""
    random = np.random.RandomState(SEED)
    return np.stack(
        [np.bincount(random.randint(0, sequences, sequences), minlength=sequences) for _ in range(resamples)]
    )


def _own(
    one: SequenceCounts, candidates: dict[str, NDArray[np.int64]]
) -> dict[str, tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """The candidates' hits (layer, candidate) and union (candidate,) of one sequence, at each site."""
    return {
        site: (one.hits[site][:, features].astype(np.int32), one.union[site][features].astype(np.int32))
        for site, features in candidates.items()
    }


def _site(
    frame: Frame,
    rules: Rules,
    features: NDArray[np.int64],
    own: list[tuple[NDArray[np.int32], NDArray[np.int32]]],
    weights: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> tuple[dict[str, tuple[int, int]], dict[str, dict[int, Interval]]]:
    passing: dict[str, NDArray[np.int64]] = {reading: np.zeros(len(weights), np.int64) for reading in READINGS}
    intervals: dict[str, dict[int, Interval]] = {reading: {} for reading in READINGS}
    drawn = weights.astype(np.float64)
    step = max(1, BLOCK_CELLS // (len(weights) * frame.num_layers))
    tokens = weights @ lengths
    needs = _Needs.of(rules, frame.num_layers, tokens)
    for at in range(0, features.size, step):
        few = slice(at, at + step)
        hits = np.stack([counts[:, few] for counts, _ in own]).astype(np.float64)  # (sequence, layer, feature)
        union = np.stack([counts[few] for _, counts in own]).astype(np.float64)
        # sums of integers far below 2^53: exact in any order
        sums = (drawn @ hits.reshape(len(own), -1)).reshape(len(weights), frame.num_layers, -1)
        shares = _shares(hits, union, lengths)
        for reading, passes in _judge(sums, drawn @ union, needs).items():
            passing[reading] += passes.sum(axis=1)
            for column, feature in enumerate(features[few]):
                counted = shares.get(reading)
                intervals[reading][int(feature)] = Interval(
                    position_fraction=None if counted is None else ends(counted[0][:, column], counted[1][:, column]),
                    passes=int(passes[:, column].sum()) / len(weights),
                )
    return {reading: _between(number) for reading, number in passing.items()}, intervals


@dataclass
class _Needs:
    """The least counts that each rule asks for in each draw: (resample,), and affected (resample, number of layers + 1)."""

    layers: int
    pooled: NDArray[np.int64]
    union: NDArray[np.int64]
    affected: NDArray[np.int64]

    @classmethod
    def of(cls, rules: Rules, num_layers: int, tokens: NDArray[np.int64]) -> _Needs:
        sizes, back = np.unique(tokens, return_inverse=True)

        def needed(factor: int) -> NDArray[np.int64]:
            return np.array([at_least(rules.positions, factor * int(size)) for size in sizes], np.int64)[back]

        return cls(
            layers=at_least(rules.layers, num_layers),
            pooled=needed(num_layers),
            union=needed(1),
            affected=np.stack([needed(count) for count in range(num_layers + 1)], axis=1),
        )


def _judge(sums: NDArray[np.float64], union: NDArray[np.float64], needs: _Needs) -> dict[str, NDArray[np.bool_]]:
    """Every reading on every draw: which features pass, (resample, feature)."""
    affected, total = (sums > 0).sum(axis=1), sums.sum(axis=1)
    strong = (sums >= np.maximum(1, needs.union)[:, None, None]).sum(axis=1)
    wide = affected >= needs.layers
    enough = total >= np.take_along_axis(needs.affected, affected, axis=1)
    return {
        "pooled": wide & (total >= needs.pooled[:, None]),
        "union": wide & (union >= needs.union[:, None]),
        "per_layer": strong >= needs.layers,
        "affected": wide & enough,
    }


def _shares(
    hits: NDArray[np.float64], union: NDArray[np.float64], lengths: NDArray[np.int64]
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """reading -> (counts, wholes), each (sequence, feature): whose sums are the two sides of its share of tokens.

    hits: (sequence, layer, feature); union: (sequence, feature). The layers of `affected` are those of the whole corpus.
    """
    num_layers = hits.shape[1]
    total, either = hits.sum(axis=1).astype(np.int64), union.astype(np.int64)
    affected = (hits.sum(axis=0) > 0).sum(axis=0)  # (feature,)
    own = np.broadcast_to(lengths[:, None], total.shape)
    return {
        "pooled": (total, own * num_layers),
        "union": (either, own),
        "affected": (total, own * np.maximum(1, affected)),
    }


def _between(values: NDArray[np.int64]) -> tuple[int, int]:
    """The order statistics between which LEVEL of the values lie."""
    ordered = np.sort(values)
    cut = math.floor((1 - LEVEL) / 2 * ordered.size)
    return int(ordered[cut]), int(ordered[ordered.size - 1 - cut])
