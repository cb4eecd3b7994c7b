"""One pass over the counts of each sequence: in how many a feature passes alone, and what the totals of a corpus can't show.

Nothing here depends on the order of the sequences: integers, maxima, and sums by math.fsum, which are rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outliers.counting.summary import Frame, Summary
from outliers.counting.summary_files import read_counts
from outliers.results.criteria import Rules, at_least, judge, legacy_passes
from outliers.spec import BLOCK, READINGS


@dataclass
class PerSequence:
    """In how many sequences each feature passes on that sequence alone: passes[site][reading] is (feature,) int64.

    legacy, legacy_hooks: (feature,) int64, sequences passed in and the sum over those of hooks; legacy_shares: feature -> the
    share of tokens in each of them. inf_norms: site -> (layer,), means over the sequences of the largest magnitude in each
    (Bondarenko et al. 2023, table 1). nll: negative log-likelihood in nats over nll_tokens tokens. candidates: site ->
    features that could pass in some draw of the bootstrap.
    """

    passes: dict[str, dict[str, NDArray[np.int64]]]
    legacy: NDArray[np.int64]
    legacy_hooks: NDArray[np.int64]
    legacy_shares: dict[int, list[float]] = field(default_factory=dict)
    inf_norms: dict[str, list[float]] = field(default_factory=dict)
    nll: float = 0.0
    nll_tokens: int = 0
    candidates: dict[str, NDArray[np.int64]] = field(default_factory=dict)


def count_per_sequence(folder: Path, summary: Summary, rules: Rules) -> PerSequence:
    """Judge every sequence of a summary alone, one after the other from disk. Raises CorruptCapture."""
    frame = summary.frame
    found = PerSequence(
        passes={site: {r: np.zeros(frame.width(site), np.int64) for r in READINGS} for site in frame.sites},
        legacy=np.zeros(frame.block_width, np.int64),
        legacy_hooks=np.zeros(frame.block_width, np.int64),
    )
    reached = _Reached(frame, rules)
    norms: dict[str, list[NDArray[np.float32]]] = {site: [] for site in frame.captured}
    losses = []
    for counts in read_counts(folder, frame):
        for site in frame.sites:
            for reading, verdict in judge(counts.hits[site], counts.union[site], counts.tokens, rules).items():
                found.passes[site][reading] += verdict.passes
            reached.add(site, counts.union[site], counts.tokens)
        if BLOCK in frame.sites:
            passed = legacy_passes(counts.hooks, counts.legacy_union, frame.num_layers, counts.tokens, rules)
            found.legacy += passed
            found.legacy_hooks += np.where(passed, counts.hooks, 0)
            for feature in np.flatnonzero(passed):
                share = int(counts.legacy_union[feature]) / counts.tokens
                found.legacy_shares.setdefault(int(feature), []).append(share)
        for site, reach in counts.reach.items():
            norms[site].append(reach)
        losses.append(counts.nll)
        found.nll_tokens += counts.nll_tokens
    found.nll = math.fsum(losses)
    found.inf_norms = {
        site: [math.fsum(layer) / len(layer) for layer in np.array(rows, np.float64).T.tolist()]
        for site, rows in norms.items()
    }
    step = frame.deciding_step
    found.candidates = {site: reached.features(site, summary.sites[site].hits[step]) for site in frame.sites}
    return found


class _Reached:
    """Features that reach the token rule of some reading in some sequence.

    That is the union's rule: hits over all pairs, over the affected layers, or in a strong layer are never a larger share
    of the tokens than those with a hit in any layer.
    """

    def __init__(self, frame: Frame, rules: Rules) -> None:
        self.rules, self.num_layers = rules, frame.num_layers
        self._tokens = {site: np.zeros(frame.width(site), np.bool_) for site in frame.sites}

    def add(self, site: str, union: NDArray[np.int64], tokens: int) -> None:
        self._tokens[site] |= union >= max(1, at_least(self.rules.positions, tokens))

    def features(self, site: str, hits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of those, the ones that touch enough layers of the whole corpus. hits: (layer, feature) of it."""
        wide = (hits > 0).sum(axis=0) >= at_least(self.rules.layers, self.num_layers)
        return np.flatnonzero(wide & self._tokens[site])
