"""The rows of the report's tables: a results folder's numbers cut, ordered and worded for one page.

It counts nothing again; where no feature is systematic, it looks for those that came closest. It knows nothing of files, HTML
or plots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np

from outliers.report.content import Cells, captured_layers, captured_sites
from outliers.report.figures import number, percent
from outliers.results.answer import disagreement, perplexity_words, range_words, reading_counts, resampled
from outliers.results.schema import LayerRow, Legacy, MassiveRow, MassiveToken, StudySummary, Tokens, TopToken
from outliers.spec import BLOCK, BLOCK_SITES, OWN_WIDTH_SITES, READINGS, AnySiteName, ReadingName
from outliers.units import clip, format_ranges

# The page without its plots stays below 300 KB, whatever was found; the page says what is cut.
MAX_FEATURE_ROWS = 100
MAX_CONTEXT_FEATURES = 12
MAX_CONTEXTS = 8
MAX_MASSIVE_ROWS = 24
MAX_PROVENANCE_ROWS = 200
MAX_TEXT_CHARACTERS = 400
MAX_CONTEXT_CHARACTERS = 90


def nearest(summary: StudySummary, cells: Cells, most: int = 3) -> list[dict[str, Any]]:
    """The features with a hit that came closest to the deciding reading, best first.

    `layers` and `tokens` are the two sides of its rule as shares; for `union` the cells hold no more than a lower bound
    of the second (`at_least`); for `per_layer` it is None. Closest: the side that is further from its
    threshold is the nearest to it.
    """
    rule, n_tokens = summary.criteria, summary.corpus.num_tokens
    n_layers, reading = len(captured_layers(summary)), rule.reading
    needed = ceil(Fraction(repr(rule.position_fraction)) * n_tokens) if reading == "per_layer" else 1
    found: list[dict[str, Any]] = []
    for feature in np.unique(cells.feature):
        own = cells.feature == feature
        hits, extreme = cells.hits[own], cells.extreme[own]
        share = {
            "pooled": hits.sum() / (n_layers * n_tokens),
            "affected": hits.mean() / n_tokens,
            "union": hits.max() / n_tokens,
            "per_layer": None,
        }[reading]
        layers = int((hits >= needed).sum()) / n_layers
        sides = [layers / rule.layer_fraction]
        sides += [] if share is None else [float(share) / rule.position_fraction]
        found.append(
            {
                "feature": int(feature),
                "extreme": float(extreme[np.argmax(np.abs(extreme))]),
                "layers": layers,
                "tokens": None if share is None else float(share),
                "at_least": reading == "union",
                "closeness": min(1.0, *sides),
            }
        )
    found.sort(key=lambda row: (-row["closeness"], -abs(row["extreme"]), row["feature"]))
    return found[:most]


def facts(summary: StudySummary) -> list[tuple[str, str]]:
    """The model and the corpus in a few pairs of (name, text)."""
    model, corpus = summary.model, summary.corpus
    size = _count(model.total_parameters)
    if model.active_parameters not in (None, model.total_parameters):
        size += f", {_count(model.active_parameters)} active"
    if model.num_experts:
        size += f", {model.num_experts} experts"
    layers = captured_layers(summary)
    shape = f"{model.num_layers} layer{'s'[: model.num_layers > 1]} × {model.hidden_size:,} features"
    if len(layers) != model.num_layers:
        shape += f" (read: layers {format_ranges(layers)})"
    pairs = [
        ("Architecture", model.architecture),
        ("Parameters", size),
        ("Shape", shape),
        ("Arithmetic", " ".join(part for part in (model.dtype, model.quantization) if part)),
        ("Sites", ", ".join(captured_sites(summary))),
        ("Corpus", corpus.source),
        (
            "Tokens",
            f"{corpus.num_tokens:,} in {corpus.num_sequences:,} sequence{'s'[: corpus.num_sequences != 1]}",
        ),
        ("Perplexity", _perplexity(summary)),
        ("Revision", (model.revision or "")[:12]),
    ]
    return [(name, clip(text, MAX_TEXT_CHARACTERS)) for name, text in pairs if text]


def answer_sentences(summary: StudySummary) -> list[str]:
    """Sentences about the number of systematic features: the other readings, and the range over resamples."""
    others, ends = disagreement(reading_counts(summary)), resampled(summary)
    texts = [others] if others else []
    texts += [] if ends is None else [range_words(*ends)]
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


def deviation_rows(summary: StudySummary) -> dict[str, Any] | None:
    """The ladder in standard deviations; None for an older study.

    `multiples`; `rows`: (site, a cell for each multiple: features in enough layers, and in any where that is another number);
    `spans`: for each captured site how many deviations the deciding magnitude is in its layers.
    """
    ladder = summary.sd_ladder
    if ladder is None:
        return None
    rows = []
    for site in _sites(summary):
        if site in ladder.features:
            pairs = zip(ladder.features_in_layers[site], ladder.features[site], strict=True)
            cells = [{"count": f"{wide:,}", "any": "" if wide == some else f"{some:,} in any"} for wide, some in pairs]
            rows.append({"site": site, "cells": cells})
    magnitude, spans = summary.criteria.magnitude, []
    for site in captured_sites(summary):
        own = [row.standard_deviation for row in summary.layers if row.site == site]
        units = [magnitude / deviation for deviation in own if deviation]
        if units:
            low, high = number(min(units)), number(max(units))
            spans.append(f"{low if low == high else f'{low} to {high}'} at {site}")
    return {"multiples": [f"{step:g}" for step in ladder.multiples], "rows": rows, "spans": spans}


def _perplexity(summary: StudySummary) -> str:
    found = summary.perplexity
    return "" if found is None else perplexity_words(found).removeprefix("perplexity ")


def _count(value: int | None) -> str:
    if value is None:
        return "unknown"
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:,}"


def _extreme(low: float, high: float) -> float:
    return low if abs(low) > abs(high) else high


def feature_rows(summary: StudySummary) -> list[dict[str, Any]]:
    """The systematic features as rows; `strip` is the path of a bar in which each affected layer is filled.

    `tokens_span` are the ends of the share of tokens as text, empty without ends or where they are the number itself;
    `passes` is the share of draws in which the feature passes, `without` whether it passes without first tokens (both None
    where it isn't known).
    """
    rule, place = summary.criteria, {layer: index for index, layer in enumerate(captured_layers(summary))}
    without = summary.without_first_tokens.get(rule.site, {}).get(rule.reading)
    rows = []
    for feature in summary.systematic[:MAX_FEATURE_ROWS]:
        interval = feature.interval
        rows.append(
            {
                **feature.model_dump(),
                "extreme": _extreme(feature.min, feature.max),
                "ranges": format_ranges(feature.layers),
                "strip": "".join(f"M{place[layer]} 0h1v1h-1z" for layer in feature.layers),
                "first_share": feature.first_token_hits / feature.hits if feature.hits else None,
                "tokens_span": "" if interval is None else _span(interval.position_fraction, feature.position_fraction),
                "passes": None if interval is None else interval.passes,
                "deviations": feature.max_sd,
                "without": None if without is None else feature.feature in without,
            }
        )
    return rows


def _span(interval: Sequence[float] | None, value: float | None) -> str:
    """Two ends of shares, 24.8–26.6%; nothing where both read as the value does."""
    if interval is None or value is None:
        return ""
    low, high = (percent(end) for end in interval)
    return "" if low == high == percent(value) else f"{low.removesuffix('%')}–{high}"


def reading_rows(summary: StudySummary) -> list[dict[str, Any]]:
    """Number of features by site and reading; `legacy` is None but at `block`.

    A count is what summary.json counted; lists may be cut, and only older studies have nothing but them. `span` is its
    range over resamples and `without` the number without first tokens, each empty where it equals the count.
    `all`: the one number of all four readings, where most features of the site pass each; else empty.
    """
    rows = []
    for site in _sites(summary):
        own = summary.readings.get(site)
        if own is None:
            continue
        counts = summary.reading_counts.get(site, {})
        cells = [_count_cell(summary, site, how, counts.get(how, len(own.lists[how]))) for how in READINGS]
        legacy = None if own.legacy is None else _legacy_cell(own.legacy, counts.get("legacy"))
        rows.append({"site": site, "cells": cells, "legacy": legacy, "all": _same_count(summary, site, cells)})
    return rows


def _sites(summary: StudySummary) -> list[AnySiteName]:
    """The sites of the page's tables, `block` first."""
    return [BLOCK, *captured_sites(summary)]


def _legacy_cell(legacy: Legacy, count: int | None) -> dict[str, str]:
    """What the earlier pipeline counts; count: None in older studies, which have the list alone."""
    pairs, features = legacy.feature_sequence_pairs, len(legacy.features) if count is None else count
    return {"count": f"{features:,}", "pairs": f"{pairs:,} feature-sequence pair{'s'[: pairs != 1]}"}


def _same_count(summary: StudySummary, site: AnySiteName, cells: Sequence[Mapping[str, str]]) -> str:
    """`576 of 576`, where that is what every reading says of a site; not of o_in, whose width no summary has."""
    counts, width = {int(cell["count"].replace(",", "")) for cell in cells}, summary.model.hidden_size
    if site in OWN_WIDTH_SITES or len(counts) > 1 or 2 * min(counts) < width:
        return ""
    return f"{min(counts):,} of {width:,}"


def _count_cell(summary: StudySummary, site: AnySiteName, reading: ReadingName, count: int) -> dict[str, str]:
    ranges = {} if summary.intervals is None else summary.intervals.counts
    span = ranges.get(site, {}).get(reading)
    without = summary.without_first_tokens.get(site, {}).get(reading)
    return {
        "reading": reading,
        "count": f"{count:,}",
        "span": "" if span is None or span[0] == span[1] == count else f"{span[0]:,}–{span[1]:,}",
        "without": "" if without is None or len(without) == count else f"{len(without):,}",
    }


def peak(summary: StudySummary) -> LayerRow | None:
    """The row of `layers` with the largest magnitude among the deciding site's own sites."""
    site = summary.criteria.site
    sites = BLOCK_SITES if site == BLOCK else (site,)
    rows = [row for row in summary.layers if row.site in sites and row.max_magnitude is not None]
    return max(rows, key=lambda row: (row.max_magnitude or 0.0, -row.layer), default=None)


def _cut(token: str | None, around: TopToken | MassiveToken | None) -> dict[str, str | None]:
    """A token and the text around it, cut to what a line of the page holds; None stays None."""
    before, after = (None, None) if around is None else (around.before, around.after)
    return {
        "token": token and clip(token, MAX_CONTEXT_CHARACTERS),
        "before": before and clip(before, MAX_CONTEXT_CHARACTERS, keep_end=True),
        "after": after and clip(after, MAX_CONTEXT_CHARACTERS),
    }


def contexts(tokens: Tokens) -> list[dict[str, Any]]:
    """Where the systematic features sit, each with its largest tokens in their text."""
    return [
        {
            **feature.model_dump(exclude={"top"}),
            "top": [{**row.model_dump(), **_cut(row.token, row)} for row in feature.top[:MAX_CONTEXTS]],
        }
        for feature in tokens.features[:MAX_CONTEXT_FEATURES]
    ]


def massive_rows(summary: StudySummary, tokens: Tokens) -> dict[str, Any] | None:
    """Massive activations with the text around them; None where `resid` was not captured.

    `rows`: one for each feature and token, largest first, with the layers in which it is massive and the value of the
    largest; `places`: how many such rows the list has; `bare`: whether one has a token, but no text around it; `features`:
    where they sit, by feature; `by_token`: how many values are massive by the token's own median, None where that was not
    counted.
    """
    listed = summary.massive
    if listed is None:
        return None
    around = {_place(row): row for row in tokens.massive or ()}
    layers: dict[tuple[int, ...], list[int]] = {}
    largest: dict[tuple[int, ...], MassiveRow] = {}
    for row in listed:
        where = (row.feature, row.sequence, row.position)
        layers.setdefault(where, []).append(row.layer)
        largest.setdefault(where, row)
    rows = [
        {
            **row.model_dump(),
            **_cut(row.token, around.get(_place(row))),
            "ranges": format_ranges(sorted(layers[where])),
        }
        for where, row in list(largest.items())[:MAX_MASSIVE_ROWS]
    ]
    features = tokens.massive_features
    return {
        "rows": rows,
        "places": len(largest),
        "bare": any(row["token"] is not None and row["before"] is None for row in rows),
        "listed": len(listed),
        "count": summary.massive_count or len(listed),
        "by_token": summary.massive_by_token_count,
        "features": features[:MAX_MASSIVE_ROWS],
        "num_features": len(features),
    }


def _place(row: MassiveRow | MassiveToken) -> tuple[int, ...]:
    return row.layer, row.sequence, row.position, row.feature


def _flat(value: object, name: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings and lists as (dotted name, text) pairs, by name: a manifest keeps no other order of a mapping."""
    if isinstance(value, Mapping):
        for key, inner in sorted(value.items(), key=lambda item: str(item[0])):
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping | list | tuple) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{index}")
    elif isinstance(value, list | tuple):
        yield name, ", ".join(str(inner) for inner in value)
    else:
        yield name, "" if value is None else str(value)


def provenance_rows(provenance: Mapping[str, object]) -> list[tuple[str, str]]:
    """What is printed at the end of the page, as (name, text)."""
    rows = [(clip(name, 120), clip(text, MAX_TEXT_CHARACTERS)) for name, text in _flat(provenance)]
    left = len(rows) - MAX_PROVENANCE_ROWS
    return rows if left <= 0 else [*rows[:MAX_PROVENANCE_ROWS], ("…", f"{left} more in manifest.json")]
