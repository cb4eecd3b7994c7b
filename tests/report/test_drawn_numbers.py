"""The numbers that pictures draw, and the small words of a page."""

from __future__ import annotations

import numpy as np
import pytest

from outliers.report.page import printable
from outliers.report.plots import sweep_lines, tail
from outliers.results.schema import Sweep
from outliers.units import clip, format_ranges


@pytest.mark.parametrize(
    ("without", "thin"),
    [
        ({"pooled": [3, 1], "union": [5, 2]}, {}),
        ({"pooled": [2, 1], "union": [5, 2]}, {"pooled": [2, 1]}),
        # a reading that has no line, and no counts at all
        ({"affected": [0, 0]}, {}),
        ({}, {}),
    ],
)
def test_the_sweep_draws_what_first_tokens_change(without: dict[str, list[int]], thin: dict[str, list[int]]) -> None:
    lines = {"union": [5, 2], "pooled": [3, 1]}
    known = {
        "magnitudes": [6.0, 12.0],
        "counts": {"resid": lines},
        "counts_without_first_tokens": {"resid": without},
    }
    assert sweep_lines(Sweep.model_validate(known), "resid") == (lines, thin)


@pytest.mark.parametrize(
    ("lower", "counts", "x", "shares"),
    [
        # 14 values, of which 5 are zero and 2 are too small to be drawn: they are in no share but in the whole
        ([0.0, 1e-9, 2.0**-10, 1.0], [5, 2, 3, 4], [2.0**-10, 1.0], [7 / 14, 4 / 14]),
        # an empty bin keeps the share of the next; after the last value there is no point
        ([2.0, 3.0, 4.0, 6.0], [1, 0, 9, 0], [2.0, 3.0, 4.0], [1.0, 0.9, 0.9]),
        ([0.0], [8], [], []),
        ([8.0], [0], [], []),
    ],
)
def test_shares_of_values_that_reach_a_magnitude(lower, counts, x, shares) -> None:
    got, found = tail(np.array(counts), np.array(lower))
    assert got.tolist() == x
    assert found.tolist() == pytest.approx(shares)


def test_small_words() -> None:
    assert format_ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9-10"
    assert format_ranges([]) == ""
    assert printable("a\r\nb\tc\x00\u202e") == "a⏎b⇥c\ufffd\ufffd"
    assert (clip("abcdef", 4), clip("abcdef", 4, keep_end=True), clip("abc", 3)) == ("abc…", "…def", "abc")
