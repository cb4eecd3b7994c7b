"""The lists of summary.json: the features that pass each reading at each site, and the earlier pipeline's.

Knows counts and models of the schema, no files.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.counting.summary import SiteTotals, Summary
from outliers.results.bootstrap import Interval, Intervals
from outliers.results.criteria import Rules, Verdict, judge
from outliers.results.per_sequence import PerSequence
from outliers.results.scale import largest, magnitudes
from outliers.results.schema import FeatureRow, IntervalBlock, Legacy, Readings
from outliers.spec import BLOCK
from outliers.study.prepare import Prepared

LISTED = 256
"""Features in each list but the deciding one, by magnitude."""
HEAD = 16
"""The same where most features of the site pass, as at `resid`: a list of all of them would say no more than their number."""


def rules_of(prepared: Prepared) -> Rules:
    """The shares that the study's criteria name."""
    return Rules(prepared.spec.criteria.layer_rule, prepared.spec.criteria.position_rule)


def readings_at(
    prepared: Prepared, summary: Summary, per_sequence: PerSequence, drawn: Intervals | None, site: str
) -> Readings:
    """The features that pass each reading at one site, uncut, by max_magnitude, then number."""
    totals, step = summary.sites[site], summary.frame.deciding_step
    verdicts = judge(*totals.counts(step), summary.tokens, rules_of(prepared))
    intervals = None if drawn is None else drawn.features[site]
    units = magnitudes(summary, site)
    lists: dict[str, Any] = {
        reading: _features(
            prepared,
            summary,
            totals,
            units,
            verdict,
            per_sequence.passes[site][reading],
            None if intervals is None else intervals[reading],
        )
        for reading, verdict in verdicts.items()
    }
    if site == BLOCK:
        lists["legacy"] = _legacy(prepared, summary, per_sequence)
    return Readings(**lists)


def sizes(readings: Readings) -> dict[str, int]:
    """How many features each list of a site has."""
    found: dict[str, int] = {reading: len(rows) for reading, rows in readings.lists.items()}
    return found if readings.legacy is None else found | {"legacy": len(readings.legacy.features)}


def shortened(readings: Readings, width: int, whole: str | None) -> Readings:
    """The lists as they are written: cut to the largest features. whole: the reading whose list is kept, where it decides.

    width: features of the site.
    """
    lists: dict[str, Any] = {
        reading: rows if reading == whole else rows[: _listed(len(rows), width)]
        for reading, rows in readings.lists.items()
    }
    if (legacy := readings.legacy) is not None:
        pairs = legacy.feature_sequence_pairs
        lists["legacy"] = Legacy(feature_sequence_pairs=pairs, features=legacy.features[:LISTED])
    return Readings(**lists)


def _listed(count: int, width: int) -> int:
    """How many of a list's features are written."""
    return min(HEAD, LISTED) if 2 * count >= width else LISTED


def _features(
    prepared: Prepared,
    summary: Summary,
    totals: SiteTotals,
    units: NDArray[np.float64],
    verdict: Verdict,
    sequences: NDArray[np.int64],
    drawn: dict[int, Interval] | None,
) -> list[FeatureRow]:
    """The rows of one list. units: (layer, feature), see `scale.magnitudes`; sequences: (feature,), passed in alone."""
    found = []
    hits = totals.hits[summary.frame.deciding_step]
    for feature in np.flatnonzero(verdict.passes).tolist():
        layers = np.flatnonzero(verdict.layer_hits[:, feature])
        share = verdict.position_fraction
        found.append(
            FeatureRow(
                **_numbers(summary, totals, units, feature),
                layer_fraction=layers.size / summary.frame.num_layers,
                position_fraction=None if share is None else float(share[feature]),
                layers=[prepared.layers[layer] for layer in layers],
                hits=int(hits[:, feature].sum()),
                sequences=int(sequences[feature]),
                interval=None if drawn is None else _interval(drawn[feature]),
            )
        )
    return _ordered(found)


def _ordered(rows: list[FeatureRow]) -> list[FeatureRow]:
    return sorted(rows, key=lambda row: (-row.max_magnitude, row.feature))


def _interval(interval: Interval) -> IntervalBlock:
    share = interval.position_fraction
    return IntervalBlock(position_fraction=None if share is None else list(share), passes=interval.passes)


def _numbers(summary: Summary, totals: SiteTotals, units: NDArray[np.float64], feature: int) -> dict[str, Any]:
    """What a feature has at a site, by any reading."""
    high, low = float(totals.max[:, feature].max()), float(totals.min[:, feature].min())
    return {
        "feature": feature,
        "max_magnitude": max(abs(high), abs(low)),
        "min": low,
        "max": high,
        "max_sd": largest(units, feature),
        "of_sequences": int(summary.sequences.size),
        "first_token_hits": int(totals.first_hits[summary.frame.deciding_step, :, feature].sum()),
    }


def _legacy(prepared: Prepared, summary: Summary, per_sequence: PerSequence) -> Legacy:
    """The earlier pipeline's numbers: fractions are means over the sequences in which the feature passes."""
    totals, step = summary.sites[BLOCK], summary.frame.deciding_step
    units, found = magnitudes(summary, BLOCK), []
    for feature in np.flatnonzero(per_sequence.legacy).tolist():
        times = int(per_sequence.legacy[feature])
        hooks = int(per_sequence.legacy_hooks[feature])
        found.append(
            FeatureRow(
                **_numbers(summary, totals, units, feature),
                layer_fraction=hooks / (2 * summary.frame.num_layers * times),
                position_fraction=math.fsum(per_sequence.legacy_shares[feature]) / times,
                layers=[prepared.layers[n] for n in np.flatnonzero(totals.hits[step, :, feature])],
                hits=int(totals.hits[step, :, feature].sum()),
                sequences=times,
            )
        )
    return Legacy(feature_sequence_pairs=int(per_sequence.legacy.sum()), features=_ordered(found))
