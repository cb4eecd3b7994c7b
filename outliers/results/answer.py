"""The sentences that go with a study's answer: the other readings where they disagree, perplexity, and what its ranges are.

The terminal, the report and Prefect's pages share this wording. It takes the model of a summary.json of any version:
what an older one lacks has its default.
"""

from __future__ import annotations

from collections.abc import Mapping

from outliers.results.intervals import BEFORE
from outliers.results.schema import Perplexity, StudySummary
from outliers.spec import OWN_WIDTH_SITES, READINGS

MAX_NAMED = 6
"""Features of massive activations that a line names."""


def reading_counts(summary: StudySummary) -> dict[str, int]:
    """How many features pass each of the four readings at the deciding site."""
    site = summary.criteria.site
    counts, own = summary.reading_counts.get(site, {}), summary.readings.get(site)
    lists = {} if own is None else own.lists
    return {name: counts.get(name, len(lists.get(name, ()))) for name in READINGS}


def disagreement(counts: Mapping[str, int]) -> str:
    """All four readings with their numbers where these differ; empty where they are equal."""
    if len(set(counts.values())) < 2:
        return ""
    return "the readings disagree: " + ", ".join(f"{name} {number:,}" for name, number in counts.items())


def crowded(summary: StudySummary) -> str | None:
    """A warning where most features of the deciding site pass: the magnitude is below what is usual there. Else None."""
    rule, count, width = summary.criteria, len(summary.systematic), summary.model.hidden_size
    if rule.site in OWN_WIDTH_SITES or 2 * count < width:  # their width is not in a summary
        return None
    return (
        f"{count:,} of the {width:,} features of {rule.site} pass: abs(x) >= {rule.magnitude:g} is no exception there; "
        "the ladder in standard deviations tells more"
    )


def perplexity_words(found: Perplexity) -> str:
    """Perplexity with the digits that its sums hold, or the reason why it is not a number."""
    loss, tokens = found.loss, f"{found.tokens:,} tokens"
    if loss is None:
        # earlier studies kept no loss above 700 nats either
        return f"perplexity not a number: the loss over {tokens} is not finite, or beyond float64"
    if found.value is None:
        return f"perplexity beyond float64: exp of a mean loss of {loss:.6f} nats a token, over {tokens}"
    return f"perplexity {found.value:.6g} (mean loss {loss:.6f} nats a token), over {tokens}"


def massive_words(summary: StudySummary) -> str | None:
    """The massive activations at resid in one line; None where `resid` was not read."""
    rows = summary.massive
    if rows is None:
        return None
    total = len(rows) if summary.massive_count is None else summary.massive_count
    if not total or not rows:
        return "no massive activation at resid"
    largest = max(rows, key=lambda row: abs(row.value))
    features = list(dict.fromkeys(row.feature for row in sorted(rows, key=lambda row: -abs(row.value))))
    named = ", ".join(str(feature) for feature in features[:MAX_NAMED])
    more = f" and {len(features) - MAX_NAMED:,} more" if len(features) > MAX_NAMED else ""
    listed = "" if total == len(rows) else f" of the largest {len(rows):,}"
    return (
        f"{total:,} massive activation{'' if total == 1 else 's'} at resid, the largest {_signed(largest.value)} in feature "
        f"{largest.feature} at layer {largest.layer}; feature{'' if len(features) == 1 else 's'}{listed}: {named}{more}"
    )


def _signed(value: float) -> str:
    """A value with four digits, thousands separated: -11.51, 25,824."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def resampled(summary: StudySummary) -> tuple[int, int] | None:
    """The range of the number of systematic features over resamples of the sequences; None without resamples."""
    rule, drawn = summary.criteria, summary.intervals
    ends = None if drawn is None else drawn.counts.get(rule.site, {}).get(rule.reading)
    return None if ends is None else (ends[0], ends[1])


def range_words(low: int, high: int) -> str:
    """That range in words. It is not a confidence interval: docs/results.md says what it covers."""
    return f"range over resamples of the sequences: {f'{low:,}' if low == high else f'{low:,} to {high:,}'}"


def share_words(summary: StudySummary) -> str:
    """What the two ends of a share of tokens are: `95% interval` or another range."""
    drawn = summary.intervals
    return BEFORE if drawn is None or drawn.shares is None else drawn.shares
