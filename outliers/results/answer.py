"""What stands beside a study's answer wherever it is said: the other readings where they disagree, and what its ranges are.

The one wording of the terminal, the report and Prefect's pages. It reads the content of a summary.json of any version.
Before it: `results`. After it: `outcome`, `report_rows`, `run_show`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outliers.results.intervals import BEFORE
from outliers.spec import READINGS

Json = Mapping[str, Any]


def reading_counts(summary: Json) -> dict[str, int]:
    """How many features pass each of the four readings at the deciding site."""
    site = summary["criteria"]["site"]
    counts, lists = summary.get("reading_counts", {}).get(site, {}), summary["readings"].get(site, {})
    return {name: int(counts.get(name, len(lists.get(name, ())))) for name in READINGS}


def disagreement(counts: Mapping[str, int]) -> str:
    """All four readings with their numbers where these differ; empty where one number is all there is to say."""
    if len(set(counts.values())) < 2:
        return ""
    return "the readings disagree: " + ", ".join(f"{name} {number:,}" for name, number in counts.items())


def crowded(summary: Json) -> str | None:
    """What it says where most features of the deciding site pass: the magnitude is below what is usual there."""
    rule, count = summary["criteria"], len(summary["systematic"])
    width = summary["model"]["hidden_size"]
    if rule["site"] == "o_in" or 2 * count < width:  # the width of o_in is not in a summary
        return None
    return (
        f"{count:,} of the {width:,} features of {rule['site']} pass: abs(x) >= {rule['magnitude']:g} is no exception there; "
        "the ladder in standard deviations tells more"
    )


def perplexity_words(found: Json) -> str:
    """Perplexity with the digits that its sums hold, or why there is none."""
    loss, tokens = found["loss"], f"{found['tokens']:,} tokens"
    if loss is None:
        # studies of before kept no loss above 700 nats either
        return f"perplexity not a number: the loss over {tokens} is not finite, or beyond float64"
    if found["value"] is None:
        return f"perplexity beyond float64: exp of a mean loss of {loss:.6f} nats a token, over {tokens}"
    return f"perplexity {found['value']:.6g} (mean loss {loss:.6f} nats a token), over {tokens}"


def resampled(summary: Json) -> tuple[int, int] | None:
    """Between which numbers of systematic features most resamples of the sequences lie; None where none was drawn."""
    rule, drawn = summary["criteria"], summary.get("intervals")
    ends = None if drawn is None else drawn["counts"].get(rule["site"], {}).get(rule["reading"])
    return None if ends is None else (int(ends[0]), int(ends[1]))


def range_words(low: int, high: int) -> str:
    """That range in words; it is no confidence interval (docs/results.md has what it covers)."""
    return f"range over resamples of the sequences: {f'{low:,}' if low == high else f'{low:,} to {high:,}'}"


def share_words(summary: Json) -> str:
    """What the two ends beside a share of tokens are: `95% interval` or another range."""
    drawn = summary.get("intervals")
    return BEFORE if drawn is None else str(drawn.get("shares", BEFORE))
