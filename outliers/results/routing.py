"""Which tokens reach which experts: load, entropy, coverage, margins of the router, and how many tokens would reach all.

Made from ExpertTotals alone. Shared experts, which every token reaches, are in none of these numbers. Ends are those of the
middle LEVEL of resamples of whole sequences, with the seed and the rule of `bootstrap`: the tokens of one sequence are not
independent. They are not confidence intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outliers.counting.bits import bits_to_float
from outliers.errors import CorruptCapture
from outliers.experts.totals import WEIGHT_UNITS, ExpertTotals
from outliers.results.bootstrap import FEWEST_RESAMPLES, LEVEL, RESAMPLES, WORK, draws

DIGITS = 9
"""Decimals of an entropy: more would depend on a processor's logarithm."""
CERTAIN = 0.95
"""Probability with which `tokens_to_reach` holds."""
MOST_TOKENS = 1e18
_SIGN = 0x8000
_NAN_ABOVE = 0x7F80


@dataclass(frozen=True)
class Spans:
    """Ends over resamples, (low, high) each. L layers, E routed experts.

    load: two arrays (L, E); entropy: two arrays (L,), NaN for one expert; entropy_mean: over the layers; never: the share of
    routed experts that no token reached.
    """

    resamples: int
    load: tuple[NDArray[np.float64], NDArray[np.float64]]
    entropy: tuple[NDArray[np.float64], NDArray[np.float64]]
    entropy_mean: tuple[float, float]
    never: tuple[float, float]


def routed_tokens(totals: ExpertTotals) -> NDArray[np.int64]:
    """(L, E) int64, tokens of each routed expert. Raises CorruptCapture where they are not `slots` of every token."""
    tokens: NDArray[np.int64] = totals.tokens[:, : totals.shapes.experts]
    wanted = totals.shapes.slots * int(totals.lengths.sum())
    for layer, found in zip(totals.shapes.layers, tokens.sum(axis=1).tolist(), strict=True):
        if found != wanted:
            raise CorruptCapture(
                f"the routing of layer {layer} in study {totals.study_id} has {found:,} slots, {wanted:,} are due: analyze again"
            )
    return tokens


def loads(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tokens over their mean over the layer. tokens: (..., E) of one layer or of many."""
    whole = tokens.sum(axis=-1, keepdims=True)
    return np.asarray(tokens * float(tokens.shape[-1]) / whole)


def entropies(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Entropy of the shares of tokens over ln E, along the last axis; rounded to DIGITS. NaN for one expert."""
    experts = tokens.shape[-1]
    if experts < 2:
        return np.full(tokens.shape[:-1], np.nan)
    shares = tokens / tokens.sum(axis=-1, keepdims=True)
    terms = shares * np.log(np.where(tokens > 0, shares, 1.0))
    # `+ 0.0` for a -0.0 of one expert that has all tokens
    return np.asarray(np.round(np.clip(-terms.sum(axis=-1) / math.log(experts), 0, 1), DIGITS) + 0.0)


def spans(totals: ExpertTotals) -> Spans | None:
    """Ends over resamples of the sequences; None for fewer than two sequences. One layer at a time: R x E numbers."""
    sequences = totals.sequences.size
    if sequences < 2:
        return None
    experts, layers = totals.shapes.experts, len(totals.shapes.layers)
    affordable = int(WORK / (experts * layers * sequences))
    resamples = min(RESAMPLES, max(FEWEST_RESAMPLES, affordable))
    weights = draws(sequences, resamples).astype(np.float64)
    low, high = np.zeros((layers, experts)), np.zeros((layers, experts))
    entropy, never = np.zeros((layers, resamples)), np.zeros(resamples, np.int64)
    for layer in range(layers):
        own = totals.per_sequence[:, layer, :experts].astype(np.float64)
        drawn = (weights @ own).astype(np.int64)  # sums of integers far below 2^53: exact in any order
        low[layer], high[layer] = between(loads(drawn))
        entropy[layer] = entropies(drawn)
        never += (drawn == 0).sum(axis=1)
    mean = np.array([math.fsum(column) / layers for column in entropy.T.tolist()])
    ends = between(entropy.T)
    middle, lost = between(mean[:, None]), between((never / (layers * experts))[:, None])
    return Spans(
        resamples=resamples,
        load=(low, high),
        entropy=ends,
        entropy_mean=(round(float(middle[0][0]), DIGITS), round(float(middle[1][0]), DIGITS)),
        never=(float(lost[0][0]), float(lost[1][0])),
    )


def between(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The order statistics between which LEVEL of the values lie, along the first axis."""
    ordered = np.sort(values, axis=0)
    cut = math.floor((1 - LEVEL) / 2 * len(ordered))
    return ordered[cut], ordered[len(ordered) - 1 - cut]


def weight_sums(totals: ExpertTotals) -> NDArray[np.float64]:
    """(L, A) float64, sum of each expert's weights; NaN where no token came, and where a weight is not finite."""
    known = (totals.tokens > 0) & (totals.weight_lost == 0)
    return np.where(known, totals.weight_whole + totals.weight_units / WEIGHT_UNITS, np.nan)


def mean_weight_sums(totals: ExpertTotals) -> NDArray[np.float64]:
    """(L,) float64, mean over the tokens of the sum of the weights of their routed experts; NaN where one is not finite."""
    whole, units, lost = (
        own[:, : totals.shapes.experts].sum(axis=1)
        for own in (totals.weight_whole, totals.weight_units, totals.weight_lost)
    )
    return np.where(lost == 0, (whole + units / WEIGHT_UNITS) / int(totals.lengths.sum()), np.nan)


def margin_quantiles(margins: NDArray[np.int64], levels: tuple[float, ...]) -> tuple[int, list[float | None]]:
    """How many margins of one layer are numbers, and their quantiles: nearest rank, of values cut to their upper 16 bits.

    margins: (65536,) int64, counts by the upper 16 bits of the float32. The true value is up to 2^-7 of itself farther from 0.
    """
    patterns = np.arange(margins.size)
    counts = np.where((patterns & ~_SIGN) > _NAN_ABOVE, 0, margins)
    known = int(counts.sum())
    if not known:
        return 0, [None] * len(levels)
    with np.errstate(invalid="ignore"):
        values = bits_to_float(patterns.astype(np.uint16), "bfloat16")
    used = np.flatnonzero(counts)
    used = used[np.argsort(values[used], kind="stable")]
    upto = np.cumsum(counts[used])
    ranks = [max(1, math.ceil(level * known)) for level in levels]
    return known, [_number(values[used[np.searchsorted(upto, rank)]]) for rank in ranks]


def _number(value: float) -> float | None:
    """The value, 0 for -0; None for an infinity, which no file holds."""
    return float(value) + 0.0 if math.isfinite(value) else None


def tokens_to_reach(tokens: NDArray[np.int64], whole: int, times: int) -> int | None:
    """Tokens after which every expert has at least `times` with probability CERTAIN; None where one was never reached.

    tokens: (L, E); whole: tokens of the corpus. Each expert's rate is the one that was seen, its tokens come independently
    (Poisson), and the probabilities to miss are added up over all experts (union bound), which needs no independence between
    experts. Rounded up to three digits. Tokens of one sequence are not independent, and the rate of an expert that c tokens
    reached is known to about 1 / sqrt(c) of itself: this is a lower bound in practice.
    """
    counts, experts = np.unique(tokens, return_counts=True)
    if counts[0] == 0:
        return None
    rates = counts / whole

    def missing(length: float) -> float:
        return float(experts @ below(rates * length, times))

    low, high = 0.0, float(times / rates[0])
    while missing(high) > 1 - CERTAIN:
        low, high = high, 2 * high
        if high > MOST_TOKENS:
            return None
    while high - low > 1e-4 * high and high > 1:
        middle = (low + high) / 2
        low, high = (middle, high) if missing(middle) > 1 - CERTAIN else (low, middle)
    return _up(max(high, times))


def below(means: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """P(X < times) of Poisson variables with these means: exp(-m) times the sum of m^i / i! for i < times."""
    found = np.zeros(means.shape)
    near = means < times + 12 * math.sqrt(times) + 60  # farther out it is below 1e-20
    steps = np.arange(times)
    logs = np.array([math.lgamma(step + 1) for step in steps.tolist()])
    own = means[near]
    terms = np.exp(steps[None] * np.log(own)[:, None] - own[:, None] - logs[None])
    found[near] = terms.sum(axis=1)
    return found


def _up(value: float) -> int:
    """The next number of three digits that is not below, but for 1e-9 of it."""
    size: int = 10 ** max(0, math.floor(math.log10(value)) - 2)
    return math.ceil(value / size * (1 - 1e-9)) * size
