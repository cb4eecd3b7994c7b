"""How far a feature's share of tokens may be off: an interval for the mean of what its sequences have, or their range.

The share of a corpus is a ratio of two sums over its sequences, which are the independent draws. Its standard error is that of
a ratio (Cochran 1977, Sampling Techniques, section 6.4), the interval is Student's on the logit scale, on which shares are
less skewed, and it lies inside of 0 to 1. Shares of tokens have long tails: a 95% quantile of Student's covers 88 to 96% of the
truths that tests/support/coverage.py draws, so the quantile is that of 99%, and what it covers is in docs/results.md. Below
FEWEST_SEQUENCES no interval covers: the ends are the least and the largest share of a sequence, under their own name.
It works on counts and knows nothing of features or files.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

ShareSpan = Literal["95% interval", "range over sequences"]
"""What the two ends of a share of tokens are; earlier studies have percentiles of resamples."""
SHARE_SPANS: tuple[ShareSpan, ...] = get_args(ShareSpan)
BEFORE = "range over resamples"
"""What the ends are in summaries without `shares`: percentiles, which cover less (docs/results.md)."""
FEWEST_SEQUENCES = 16
"""With at least this many the interval covers 93% or more of the truths that tests/support/coverage.py draws."""
QUANTILE_LEVEL = 0.99
"""Two-sided, of Student's distribution: wider than the 95% that are claimed, see above."""
DIGITS = 9
"""Decimals of an end: more would depend on a processor's logarithm."""
MANY = 200
"""Degrees of freedom from which the expansion in 1 / freedom is exact to 1e-9."""


def share_span(sequences: int) -> ShareSpan:
    """What `ends` returns for this number of sequences."""
    return "95% interval" if sequences >= FEWEST_SEQUENCES else "range over sequences"


def ends(counts: NDArray[np.int64], wholes: NDArray[np.int64]) -> tuple[float, float]:
    """The two ends of sum(counts) / sum(wholes); `share_span` says what they are.

    counts, wholes: (sequence,) int64, hits and tokens of each sequence. There are at least two, and every whole is above 0.
    """
    count, whole = int(counts.sum()), int(wholes.sum())
    size, share = counts.size, count / whole
    if size < FEWEST_SEQUENCES:
        shares = counts / wholes
        return _around(share, float(shares.min()), float(shares.max()))
    if count in (0, whole):
        return share, share
    residuals = counts - share * wholes
    error = math.sqrt(size / (size - 1) * math.fsum((residuals**2).tolist())) / whole
    half = student_quantile(size - 1) * error / (share * (1 - share))
    middle = math.log(share / (1 - share))
    return _around(share, _share(middle - half), _share(middle + half))


def ratio_ends(parts: NDArray[np.float64], wholes: NDArray[np.float64]) -> tuple[float, float] | None:
    """The two ends of sum(parts) / sum(wholes), a ratio that no bound holds from above; `share_span` says what they are.

    parts, wholes: (sequence,) float64, not negative, of at least two sequences; where a whole is 0, its part is too. It is
    `ends` on the scale of the logarithm. None where the wholes are 0.
    """
    part, whole = math.fsum(parts.tolist()), math.fsum(wholes.tolist())
    if not whole:
        return None
    size, ratio = parts.size, part / whole
    if size < FEWEST_SEQUENCES:
        ratios = parts[wholes > 0] / wholes[wholes > 0]
        return _about(ratio, float(ratios.min()), float(ratios.max()))
    if not part:
        return 0.0, 0.0
    # in units of the whole, so that neither the squares of large sums nor those of small ones leave float64
    residuals = (parts - ratio * wholes) / whole
    error = math.sqrt(size / (size - 1) * math.fsum((residuals**2).tolist())) / ratio
    half = min(700.0, student_quantile(size - 1) * error)
    return _about(ratio, ratio * math.exp(-half), ratio * math.exp(half))


def _about(ratio: float, low: float, high: float) -> tuple[float, float]:
    """Ends rounded to DIGITS significant digits, with the ratio between them."""
    return min(ratio, float(f"{low:.{DIGITS - 1}e}")), max(ratio, float(f"{high:.{DIGITS - 1}e}"))


def _around(share: float, low: float, high: float) -> tuple[float, float]:
    """Rounded ends with the share between them."""
    return min(share, round(low, DIGITS)), max(share, round(high, DIGITS))


def _share(logit: float) -> float:
    return 1 / (1 + math.exp(-min(700.0, max(-700.0, logit))))


@cache
def student_quantile(freedom: int, level: float = QUANTILE_LEVEL) -> float:
    """The t beyond which, on both sides together, 1 - level of Student's distribution lies; to 1e-9 of itself."""
    if freedom > MANY:
        return _expanded(freedom, level)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        if inside(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return high


def inside(t: float, freedom: int) -> float:
    """The share of Student's distribution between -t and t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, cosine if freedom > 1 else 0.0) if odd else (1.0, 1.0)
    for step in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _expanded(freedom: int, level: float) -> float:
    """For many degrees of freedom (Abramowitz and Stegun 26.7.5)."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, start=1))
