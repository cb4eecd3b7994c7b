"""The parts of summary.json that are about layers and magnitudes: layer rows, the threshold ladder, histograms."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from outliers.counting.bits import bits_to_float, pattern_values
from outliers.counting.summary import Summary
from outliers.results.criteria import Verdict, judge, kurtosis, median_magnitude, quantile_magnitudes
from outliers.results.lists import rules_of
from outliers.results.per_sequence import PerSequence
from outliers.results.scale import layer_ladder
from outliers.results.schema import Histogram, LayerRow, Sweep
from outliers.spec import READINGS
from outliers.study.prepare import Prepared

QUANTILES = ("0.9", "0.99", "0.999", "0.9999")
"""Levels at which the magnitudes of each layer are given, in addition to the median."""


def layer_rows(prepared: Prepared, summary: Summary, per_sequence: PerSequence) -> list[LayerRow]:
    """One row for each captured site and layer."""
    levels = tuple(Fraction(level) for level in QUANTILES)
    values, _ = pattern_values(summary.frame.dtype)
    rows = []
    for site in summary.frame.captured:
        totals = summary.sites[site]
        for index, layer in enumerate(prepared.layers):
            high, low = float(totals.max[index].max()), float(totals.min[index].min())
            seen = bool(totals.histogram[index].any())
            row = {
                "site": site,
                "layer": layer,
                "max_magnitude": max(abs(high), abs(low)) if seen else None,
                "hits": int(totals.hits[summary.frame.deciding_step, index].sum()),
                "nonfinite": int(totals.nonfinite[index]),
                "kurtosis": kurtosis(totals.histogram[index], values),
                "median_magnitude": median_magnitude(totals.histogram[index], values),
                "quantiles": quantile_magnitudes(totals.histogram[index], values, levels),
                "mean_inf_norm": per_sequence.inf_norms[site][index] if seen else None,
            }
            rows.append(LayerRow.model_validate(row | layer_ladder(summary, site, index)))
    return rows


def without_first_tokens(prepared: Prepared, summary: Summary) -> dict[str, dict[str, list[int]]]:
    """site -> reading -> numbers of the features that pass where the first token of each sequence is left out."""
    step = summary.frame.deciding_step
    found: dict[str, dict[str, list[int]]] = {}
    for site in summary.frame.sites:
        verdicts = _judge(prepared, summary, site, step, first_tokens=False)
        found[site] = {reading: np.flatnonzero(verdict.passes).tolist() for reading, verdict in verdicts.items()}
    return found


def threshold_ladder(prepared: Prepared, summary: Summary) -> Sweep:
    """How many features each reading finds at each magnitude of the ladder, with first tokens and without them."""

    def counts(*, first_tokens: bool) -> dict[str, dict[str, list[int]]]:
        found: dict[str, dict[str, list[int]]] = {}
        for site in summary.frame.sites:
            steps = [
                _judge(prepared, summary, site, step, first_tokens=first_tokens)
                for step in range(len(summary.frame.ladder))
            ]
            found[site] = {reading: [int(step[reading].passes.sum()) for step in steps] for reading in READINGS}
        return found

    return Sweep.model_validate(
        {
            "magnitudes": list(summary.frame.ladder),
            "counts": counts(first_tokens=True),
            "counts_without_first_tokens": counts(first_tokens=False),
        }
    )


def _judge(prepared: Prepared, summary: Summary, site: str, step: int, *, first_tokens: bool) -> dict[str, Verdict]:
    """Every reading at one magnitude of the ladder, with the first tokens of the sequences or without them."""
    tokens = summary.tokens if first_tokens else summary.tokens - summary.sequences.size
    return judge(*summary.sites[site].counts(step, first_tokens=first_tokens), tokens, rules_of(prepared))


def magnitude_bins(histogram: NDArray[np.int64], dtype: str) -> Histogram:
    """Counts by magnitude, four bins an octave: the patterns without sign, cut to exponent and two bits of mantissa.

    histogram: (layer, pattern) int64.
    """
    kind, shift = ("float16", 8) if dtype == "float16" else ("bfloat16", 5)
    merged = histogram.sum(axis=0)
    unsigned = merged[:0x8000] + merged[0x8000:]
    bins = unsigned.reshape(-1, 1 << shift).sum(axis=1)
    used = np.flatnonzero(bins)
    if not used.size:
        return Histogram(lower_edges=[], counts=[])
    kept = np.arange(used[0], used[-1] + 1)
    edges = bits_to_float((kept << shift).astype(np.uint16), kind)
    return Histogram(lower_edges=[float(edge) for edge in edges], counts=[int(n) for n in bins[kept]])
