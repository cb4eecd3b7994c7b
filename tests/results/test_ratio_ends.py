"""The ends of a ratio of sums: what they are of, their bounds, and what they cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from outliers.results.intervals import FEWEST_SEQUENCES, ratio_ends


def test_below_16_sequences_they_are_the_least_and_the_largest_ratio():
    parts, wholes = np.array([1.0, 3.0, 0.0]), np.array([10.0, 10.0, 0.0])
    assert ratio_ends(parts, wholes) == (0.1, 0.3)
    assert ratio_ends(np.zeros(2), np.zeros(2)) is None
    assert ratio_ends(np.zeros(20), np.ones(20)) == (0.0, 0.0)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_from_16_on_they_are_those_of_a_ratio_on_the_scale_of_the_logarithm(scale):
    random = np.random.default_rng(3)
    wholes = (1 + random.random(40)) * scale
    parts = wholes * 0.01 * random.lognormal(0, 0.5, 40)
    low, high = ratio_ends(parts, wholes)
    ratio = parts.sum() / wholes.sum()
    spread = math.sqrt(40 / 39 * sum(((p - ratio * w) / scale) ** 2 for p, w in zip(parts, wholes, strict=True)))
    error = spread / (wholes.sum() / scale) / ratio
    half = (
        2.7079131835  # Student, 39 degrees of freedom, 99%: Abramowitz and Stegun, table 26.10, interpolated by scipy
    )
    assert low == pytest.approx(ratio * math.exp(-half * error), rel=1e-7)
    assert high == pytest.approx(ratio * math.exp(half * error), rel=1e-7)


def test_they_cover_the_truth_and_hold_the_ratio():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        wholes = random.lognormal(0, 0.4, FEWEST_SEQUENCES)
        parts = wholes * 0.02 * random.lognormal(0, 0.8, FEWEST_SEQUENCES)
        low, high = ratio_ends(parts, wholes)
        assert low <= parts.sum() / wholes.sum() <= high
        held += low <= 0.02 * math.exp(0.8**2 / 2) <= high
    assert held >= 0.93 * 400
