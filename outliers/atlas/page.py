"""The atlas as one self-contained page: a section for each set of identical criteria, with its charts and its table.

It counts nothing and has no clock: equal stores give equal bytes. Every name is escaped, and the page
loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliers.atlas.choose import Choice, choices, classes, keys
from outliers.atlas.links import report_link
from outliers.atlas.maxima import MAXIMA, PLACES, SAMPLES, SOURCE, TOKENS, maxima_rows, missing, nearness
from outliers.atlas.plots import MAX_NUMBERED, Charts, charts, comparable_with_paper, short, usual_conditions
from outliers.atlas.reference import (
    EARLIER,
    EARLIER_CORPUS,
    EARLIER_LENGTH,
    EARLIER_SEQUENCES,
    PAPER,
    PAPER_RULE,
    earlier,
)
from outliers.atlas.row import AtlasRow, Conditions
from outliers.atlas.table import Atlas, groups
from outliers.files.atomic import write_atomic
from outliers.report.figures import number, percent
from outliers.report.page import render_template
from outliers.spec import BLOCK_SITES
from outliers.units import clip

MAX_SKIPPED = 50
MAX_FEATURES = 24
"""Features of one study that are listed one by one; atlas.parquet has all."""
MAX_LISTED_STUDIES = 60
"""Studies of a group whose features are listed one by one."""
EARLIER_DTYPE = "bfloat16"
"""What the earlier pipeline cast everything to before it counted; what its models computed in is not known."""
ARITHMETIC = "arithmetic"
CRITERIA = ("reading", "site", "magnitude", "share of layers", "share of tokens")


@dataclass(frozen=True)
class Group:
    """One section: studies of identical criteria. `kinds`: the keys of the boxes of which one must be ticked to show a row."""

    anchor: str
    classes: str
    kinds: tuple[str, ...]
    title: str
    cells: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    num_models: int
    charts: Charts
    paper: bool
    mixed: tuple[str, ...]
    details: bool


def write_atlas_page(path: Path, atlas: Atlas, links: str | None = None) -> None:
    """Write the page whole; `links` as in `render`. Raises OSError."""
    write_atomic(path, render(atlas, path.absolute(), links).encode("utf-8", "replace"))


def render(atlas: Atlas, page: Path | None = None, links: str | None = None) -> str:
    """The page as text.

    page: where it will lie, for links relative to it. links: the address at which the store is served, for a store that no
    browser opens.
    """
    made = _choices(atlas.rows)
    opened = {row.url: report_link(row.report, atlas.url, page, links) for row in atlas.rows}
    sections = _sections(atlas.rows, made, opened)
    maxima = maxima_rows(atlas.rows)
    sizes = [row.total_parameters for row in atlas.rows if row.total_parameters is not None]
    values = {
        "atlas": atlas,
        "num_studies": len(atlas.rows),
        "num_models": len({row.model for row in atlas.rows}),
        "sizes": (min(sizes), max(sizes)) if sizes else None,
        "groups": sections,
        "choices": made,
        "criteria": CRITERIA,
        "differing": _differing(sections),
        "earlier": earlier_rows(atlas.rows),
        "earlier_run": f"{EARLIER_SEQUENCES} × {EARLIER_LENGTH:,} tokens of {EARLIER_CORPUS}",
        "paper": PAPER,
        "paper_shown": any(section.paper for section in sections),
        "maxima": maxima,
        "maxima_missing": missing(maxima),
        "maxima_source": {
            "paper": SOURCE,
            "samples": SAMPLES,
            "tokens": TOKENS,
            "places": PLACES,
            "count": len(MAXIMA),
        },
        "unlinked": any(row.report and opened[row.url] is None for row in atlas.rows),
        "linked_rows": sum(link is not None for link in opened.values()),
        "opened": opened,
        "skipped": atlas.skipped[:MAX_SKIPPED],
        "num_skipped": len(atlas.skipped),
        "filter": atlas.filter.words(),
        "max_features": MAX_FEATURES,
        "max_numbered": MAX_NUMBERED,
    }
    return render_template("atlas.html", values, {"short": short, "nearness": nearness})


def _choices(rows: Sequence[AtlasRow]) -> tuple[Choice, ...]:
    """Filters of the page: the criteria in which the groups differ, and the arithmetic."""
    ordered = [row for own in groups(rows) for row in own]
    cells = [_cells(row) for row in ordered]
    facts = {name: [own[place] for own in cells] for place, name in enumerate(CRITERIA)}
    return choices(facts | {ARITHMETIC: [arithmetic(row.conditions) for row in ordered]})


def _cells(row: AtlasRow) -> tuple[str, ...]:
    """The criteria of a row in words, in the order of CRITERIA."""
    shares = (percent(row.min_layer_fraction), percent(row.min_position_fraction))
    return row.reading, row.site, number(row.magnitude), *shares


def _sections(rows: Sequence[AtlasRow], made: Sequence[Choice], opened: Mapping[str, str | None]) -> list[Group]:
    found: list[Group] = []
    first = 1
    for own in groups(rows):
        found.append(_section(own, first, len(found) + 1, made, opened))
        first += len(own)
    return found


def _section(
    rows: tuple[AtlasRow, ...], first: int, index: int, made: Sequence[Choice], opened: Mapping[str, str | None]
) -> Group:
    paper, usual, cells = comparable_with_paper(rows[0]), usual_conditions(rows), _cells(rows[0])
    kinds = [keys(made, {ARITHMETIC: arithmetic(row.conditions)}) for row in rows]
    marks = {row.url: classes(own) for row, own in zip(rows, kinds, strict=True)}
    worded = (table_row(row, place, other=row.conditions != usual) for place, row in enumerate(rows, first))
    return Group(
        anchor=f"criteria-{index}",
        classes=classes(keys(made, dict(zip(CRITERIA, cells, strict=True)))),
        kinds=tuple(sorted({key for own in kinds for key in own})),
        title=f"{cells[0]} at {cells[1]}: abs(x) ≥ {cells[2]} in {cells[3]} of layers and {cells[4]} of tokens",
        cells=cells,
        rows=tuple(
            own | {"mark": marks[row.url], "link": opened[row.url]} for row, own in zip(rows, worded, strict=True)
        ),
        num_models=len({row.model for row in rows}),
        charts=charts(rows, first, lambda row: marks[row.url]),
        paper=paper,
        mixed=tuple(_mixed(rows)),
        details=len(rows) <= MAX_LISTED_STUDIES and any(row.features for row in rows),
    )


def _mixed(rows: Sequence[AtlasRow]) -> list[str]:
    """In what studies of the same criteria still are not alike; nothing where they are."""
    usual = usual_conditions(rows)
    counted = [
        (len({row.conditions.read for row in rows}), "corpora"),
        (len({row.conditions.arithmetic for row in rows}), "kinds of arithmetic"),
        (len({row.conditions.places for row in rows}), "choices of layers or modules"),
    ]
    what = [f"{number:,} {name}" for number, name in counted if number > 1]
    said = []
    if what:
        most = sum(row.conditions == usual for row in rows)
        said.append(
            f"Not all alike: the studies have {_joined(what)}, on which a number depends too. Most, {most:,} of "
            f"{len(rows):,}, read {corpus_text(usual)} in {arithmetic(usual)}{_places_text(usual)}; every other is hollow in "
            "the charts and the table."
        )
    partial = sum(row.layers_read < row.num_layers for row in rows)
    if partial:
        said.append(
            f"In {partial:,} stud{'y' if partial == 1 else 'ies'} not every layer was read: its shares are of those that were."
        )
    return said


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1])] * (len(parts) > 1) + [parts[-1]])


def _places_text(conditions: Conditions) -> str:
    """Which layers and modules were read, where that is not the family's own in every layer; begins with a comma."""
    layers = f", layers {clip(conditions.layers, 60)}" if conditions.layers else ""
    return layers + (f", {clip(conditions.site_modules, 120)}" if conditions.site_modules else "")


def corpus_text(conditions: Conditions) -> str:
    """A corpus in few words: source, sequences × tokens, and what of its options is not the default."""
    options = f" ({clip(conditions.corpus_options, 120)})" if conditions.corpus_options else ""
    size = f"{conditions.num_sequences:,} × {conditions.sequence_length:,} tokens"
    return f"{clip(conditions.corpus, 120)}, {size}{options}"


def arithmetic(conditions: Conditions) -> str:
    """dtype and quantization in few words."""
    return clip(" ".join(part for part in (conditions.dtype, conditions.quantization) if part), 60)


def table_row(row: AtlasRow, place: int, *, other: bool) -> dict[str, Any]:
    """A study worded for the table; `other`: its conditions are not those of most studies of its group."""
    active = row.active_parameters
    layers = f"{row.num_layers:,}" if row.layers is None else f"{row.layers_read:,} of {row.num_layers:,}"
    return {
        "place": place,
        "other": other,
        "kind": "moe" if row.num_experts else "dense",
        "model": clip(row.model_called, 120),
        "shape": f"{layers} layers × {row.hidden_size:,}",
        "architecture": clip(row.architecture, 80),
        "total": None if row.total_parameters is None else short(row.total_parameters),
        "active": None if active is None or active == row.total_parameters else short(active),
        "experts": row.num_experts,
        "num_features": row.num_features,
        "features_span": count_span(row.num_features_low, row.num_features_high, row.num_features),
        "layers": row.layer_fraction,
        "layers_span": "",
        "tokens": row.position_fraction,
        "tokens_span": share_span(row.position_fraction_low, row.position_fraction_high, row.position_fraction),
        "largest": row.max_magnitude,
        "massive": row.massive_count,
        "perplexity": row.perplexity,
        "corpus": clip(row.corpus, 120),
        "tokens_read": f"{row.num_sequences:,} × {row.sequence_length:,} tokens",
        "options": clip(row.corpus_options or "", 120),
        "arithmetic": arithmetic(row.conditions),
        "places": _places_text(row.conditions).removeprefix(", "),
        "study_id": row.study_id,
        "label": row.label,
        "features": [_feature(item) for item in row.features[:MAX_FEATURES]],
        "more_features": max(len(row.features) - MAX_FEATURES, 0),
    }


def _feature(item: Mapping[str, Any]) -> dict[str, Any]:
    sides = {}
    for side in ("layer_fraction", "position_fraction"):
        sides[side] = item[side]
        sides[f"{side}_span"] = share_span(item[f"{side}_low"], item[f"{side}_high"], item[side])
    return {"feature": item["feature"], "largest": item["max_magnitude"], "passes": item["passes"]} | sides


def count_span(low: int | None, high: int | None, value: int) -> str:
    """A range of counts, 5–7; empty without one, or where it is the number itself."""
    return "" if low is None or high is None or low == high == value else f"{low:,}–{high:,}"


def share_span(low: float | None, high: float | None, value: float | None) -> str:
    """Two ends of shares, 24.8–26.6%; nothing where there are none or both read as the value does."""
    if low is None or high is None or value is None:
        return ""
    ends = percent(low), percent(high)
    return "" if ends[0] == ends[1] == percent(value) else f"{ends[0].removesuffix('%')}–{ends[1]}"


def _differing(sections: Sequence[Group]) -> list[str]:
    """The names of the criteria in which the groups differ."""
    columns = zip(*(section.cells for section in sections), strict=True)
    return [name for name, column in zip(CRITERIA, columns, strict=True) if len(set(column)) > 1]


def earlier_rows(rows: Sequence[AtlasRow]) -> list[dict[str, Any]]:
    """The earlier pipeline's models, each with the studies here that counted it by the reading `legacy`.

    Only studies under its criteria, with both sites of the block; one a capture, for the deciding reading changes nothing in
    it. `unlike`: in what it is not as that pipeline was; `unsure`: what it has of its own that is not known of that one.
    """
    own: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in rows:
        known = earlier(row.model)
        both = set(BLOCK_SITES) <= set(row.sites)
        if known is None or row.legacy_pairs is None or row.criteria[2:] != PAPER_RULE or not both:
            continue
        own.setdefault(known.model, {})[row.model, row.capture_id, row.legacy_pairs] = {
            "study_id": row.study_id,
            # by another name than the published one
            "model": None if row.model.rpartition("/")[2].lower() == known.model.lower() else row.model_called,
            "pairs": row.legacy_pairs,
            "features": row.legacy_features,
            "layers": row.legacy_layer_fraction,
            "tokens": row.legacy_position_fraction,
            "corpus": f"{corpus_text(row.conditions)}, {arithmetic(row.conditions)}{_places_text(row.conditions)}",
            "unlike": ", ".join(_unlike_earlier(row)),
            "unsure": ", ".join(_unsure_of_earlier(row)),
        }
    return [{"known": known, "studies": list(own.get(known.model, {}).values())} for known in EARLIER]


def _unlike_earlier(row: AtlasRow) -> list[str]:
    """In what a study is not as the earlier pipeline is known to have been."""
    size = (row.num_sequences, row.sequence_length) == (EARLIER_SEQUENCES, EARLIER_LENGTH)
    corpus = row.corpus.lower().rpartition("/")[2] == EARLIER_CORPUS.lower()
    said = ["another corpus"] * (not corpus) + ["another size"] * (not size)
    said += [f"layers {row.layers}"] if row.layers else []
    return said + ["modules named by hand"] * (row.site_modules is not None)


def _unsure_of_earlier(row: AtlasRow) -> list[str]:
    """What a study records that is unknown of the earlier pipeline: which part of the corpus, which arithmetic."""
    said = [row.corpus_options, row.dtype if row.dtype != EARLIER_DTYPE else None, row.quantization]
    return [clip(part, 120) for part in said if part]
