"""What is called a 95% interval covers: the simulation of docs/results.md, short here and whole in make test-faults."""

from __future__ import annotations

import math

import numpy as np
import pytest

from outliers.results.intervals import FEWEST_SEQUENCES, ends, share_span, student_quantile
from tests.support.coverage import HARDEST, counts_covered, laws, percentile_covered, shares_covered

CLAIMED = 0.93
LAWS = laws()


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("law", [law for law in LAWS if law.name != HARDEST], ids=lambda law: law.name)
def test_it_covers_93_percent(law, size):
    assert share_span(size) == "95% interval"
    assert shares_covered(law, size, 1_000) >= CLAIMED


@pytest.mark.parametrize("size", [16, 32])
def test_it_covers_with_sequences_of_unequal_length(size):
    assert shares_covered(LAWS[2], size, 1_000, lengths=True) >= CLAIMED


def test_with_fewer_it_is_not_called_so():
    """At 8 sequences the same formula would cover less; what is given is the range of the sequences."""
    assert {share_span(size) for size in range(2, FEWEST_SEQUENCES)} == {"range over sequences"}
    assert ends(np.array([1, 5, 3]), np.array([10, 10, 20])) == (0.1, 0.5)


def test_what_stood_there_before_does_not_cover():
    """Percentiles of resamples: the simulation is one that can fail."""
    assert percentile_covered(LAWS[1], 4, 300) < 0.85
    assert percentile_covered(LAWS[7], 16, 300) < CLAIMED
    assert counts_covered(4, 300) < CLAIMED


@pytest.mark.long
@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_it_covers_in_many_studies(law, size):
    least = CLAIMED if law.name != HARDEST or size >= 32 else 0.78  # 19% of the studies have no rare sequence
    assert shares_covered(law, size, 20_000, seed=1) >= least


@pytest.mark.parametrize(
    ("freedom", "level", "table"),
    # of printed tables
    [
        (1, 0.95, 12.7062),
        (2, 0.99, 9.9248),
        (3, 0.99, 5.8409),
        (15, 0.99, 2.9467),
        (30, 0.95, 2.0423),
        (120, 0.99, 2.6174),
    ],
)
def test_quantiles_are_those_of_the_tables(freedom, level, table):
    assert student_quantile(freedom, level) == pytest.approx(table, abs=6e-5)


def test_both_ways_to_a_quantile_agree():
    """The sum of A&S 26.7.4 below 200 degrees of freedom, the expansion above: they meet."""
    near, far = student_quantile(200), student_quantile(201)
    assert 0 < near - far < 2e-4
    assert student_quantile(10_000_000) == pytest.approx(2.5758293, abs=1e-6)


@pytest.mark.parametrize("counts", [[0] * 16, [9] * 16, [0] * 15 + [1], [9] * 15 + [8], [4] * 16])
def test_ends_of_odd_counts_are_shares(counts):
    low, high = ends(np.array(counts, np.int64), np.full(16, 9, np.int64))
    assert 0 <= low <= sum(counts) / 144 <= high <= 1
    assert not math.isnan(low + high)
