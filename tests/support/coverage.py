"""How often the ends of a number contain the truth: studies drawn from known distributions, as the table of docs/results.md.

    python -m tests.support.coverage            4,000 studies a cell, some minutes; prints the table
    python -m tests.support.coverage 500        fewer

A study is n sequences of TOKENS tokens; a sequence's share of hits is drawn from a law of which the mean is known, its hits are
binomial. The laws are made to be hard: bursts, sequences without a hit, one sequence in ten with five times as many hits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from outliers.results.bootstrap import draws
from outliers.results.intervals import ends

TOKENS = 512
SIZES = (4, 8, 16, 32)
FEATURES = 12
"""Of a study whose number of systematic features is asked for."""


class Law(NamedTuple):
    """A distribution of a sequence's share of hits: random, size -> shares; its mean."""

    name: str
    draw: Callable
    mean: float


def _beta(mean, size):
    return lambda random, n: random.beta(mean * size, (1 - mean) * size, n)


def _zeros(zeros, mean):
    return lambda random, n: (random.random(n) > zeros) * random.beta(20 * mean, 20 * (1 - mean), n)


def _lognormal(sigma):
    return lambda random, n: np.minimum(1, np.exp(random.normal(np.log(0.08) - sigma**2 / 2, sigma, n)))


def _mixture(rare, high, low):
    return lambda random, n: np.where(random.random(n) < rare, high, low)


def laws():
    """The laws of the table; the mean of a cut lognormal is that of ten million draws."""
    cut = {sigma: float(_lognormal(sigma)(np.random.default_rng(9), 10_000_000).mean()) for sigma in (0.5, 1.0)}
    return [
        Law("beta, mean 6%, spread 4%", _beta(0.06, 30), 0.06),
        Law("beta, mean 10%, spread 9%", _beta(0.1, 10), 0.1),
        Law("beta, mean 10%, spread 13%", _beta(0.1, 4), 0.1),
        Law("beta, mean 30%, spread 20%", _beta(0.3, 4), 0.3),
        Law("beta, mean 80%, spread 15%", _beta(0.8, 6), 0.8),
        Law("beta, mean 6%, spread 14%", _beta(0.06, 2), 0.06),
        Law("lognormal, mean 8%, sigma 0.5", _lognormal(0.5), cut[0.5]),
        Law("lognormal, mean 8%, sigma 1", _lognormal(1.0), cut[1.0]),
        Law("30% of sequences without a hit", _zeros(0.3, 0.12), 0.7 * 0.12),
        Law("50% of sequences without a hit", _zeros(0.5, 0.12), 0.5 * 0.12),
        Law("70% of sequences without a hit", _zeros(0.7, 0.2), 0.3 * 0.2),
        Law("25% of sequences with 5 times as many", _mixture(0.25, 0.3, 0.06), 0.25 * 0.3 + 0.75 * 0.06),
        Law("10% of sequences with 5 times as many", _mixture(0.1, 0.4, 0.08), 0.1 * 0.4 + 0.9 * 0.08),
    ]


HARDEST = "10% of sequences with 5 times as many"
"""At 16 sequences 19% of the studies have none of the rare ones: no interval that is made of the sequences can know of them."""


def shares_covered(law, size, studies, seed=0, *, lengths=False):
    """Share of studies in which the ends of a share of tokens contain the law's mean. lengths: sequences of 51 to 512 tokens."""
    random = np.random.default_rng([seed, size])
    held = 0
    for _ in range(studies):
        tokens = random.integers(51, TOKENS + 1, size) if lengths else np.full(size, TOKENS)
        hits = random.binomial(tokens, law.draw(random, size))
        low, high = ends(hits.astype(np.int64), tokens.astype(np.int64))
        held += low <= law.mean <= high
    return held / studies


def percentile_covered(law, size, studies, seed=0):
    """The same of percentiles of 1,000 resamples, which stood there before."""
    random, weights = np.random.default_rng([seed, size]), draws(size, 1000)
    held = 0
    for _ in range(studies):
        shares = np.sort(weights @ random.binomial(TOKENS, law.draw(random, size)) / (size * TOKENS))
        held += shares[25] <= law.mean <= shares[974]
    return held / studies


def counts_covered(size, studies, seed=0):
    """The share of studies whose range over resamples holds the number of features that pass in an endless corpus.

    FEATURES features of means from 3 to 9%, half of which pass 6%, each a beta law of spread like the third of `laws`.
    """
    random, weights = np.random.default_rng([seed, size]), draws(size, 1000)
    means = np.linspace(0.03, 0.09, FEATURES)
    truth = int((means >= 0.06).sum())
    held = 0
    for _ in range(studies):
        hits = random.binomial(TOKENS, random.beta(10 * means, 10 * (1 - means), (size, FEATURES)))
        passing = np.sort((weights @ hits / (size * TOKENS) >= 0.06).sum(axis=1))
        held += passing[25] <= truth <= passing[974]
    return held / studies


def main(studies: int) -> None:
    """Print the table of docs/results.md."""
    print("| a sequence's share of hits | " + " | ".join(f"{size} sequences" for size in SIZES) + " |")
    print("|---|" + "--:|" * len(SIZES))
    for law in laws():
        cells = []
        for size in SIZES:
            now, before = shares_covered(law, size, studies), percentile_covered(law, size, min(studies, 1000))
            cells.append(f"{100 * now:.1f} ({100 * before:.0f})")
        print(f"| {law.name} | " + " | ".join(cells) + " |", flush=True)
    law = laws()[2]
    cells = [f"{100 * shares_covered(law, size, studies, lengths=True):.1f}" for size in SIZES]
    print(f"| the third, sequences of 51 to {TOKENS} tokens | " + " | ".join(cells) + " |")
    cells = [f"{100 * counts_covered(size, min(studies, 1000)):.0f}" for size in SIZES]
    print("| number of features, range over resamples | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4_000)
