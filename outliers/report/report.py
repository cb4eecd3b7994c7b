"""The report: a study's numbers as pictures and one self-contained page.

`plots` draws the pictures, `rows` fills the tables, and `page` renders the template. It knows nothing of captures, machines
or publishing, and has no clock: equal inputs give equal bytes. Every text of a model or corpus is escaped, and the page loads
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from outliers.errors import BadInput, WorkspaceError
from outliers.files.atomic import write_atomic
from outliers.report.captions import ALL_TEXTS, EXPERT_TEXTS, FORMAT_TEXTS, MASSIVE_PLOTS
from outliers.report.content import Cells, Content, captured_layers
from outliers.report.expert_plots import draw_experts
from outliers.report.experts import expert_values
from outliers.report.figures import DRAWING, Plot, page_image
from outliers.report.formats import format_maps, format_rows, measured_sites
from outliers.report.kinds import KIND_WORDS, OTHER_WORD, kind_table
from outliers.report.page import render_template
from outliers.report.plots import draw
from outliers.report.probe_page import FILTERS, VERDICTS, ProbeSection
from outliers.report.reproduce import UNITS, days, reproduce_command
from outliers.report.rows import (
    MAX_CONTEXTS,
    MAX_FEATURE_ROWS,
    MAX_TEXT_CHARACTERS,
    answer_sentences,
    contexts,
    deviation_rows,
    facts,
    feature_rows,
    massive_rows,
    nearest,
    peak,
    provenance_rows,
    reading_rows,
)
from outliers.report.shown import Shown, shown_summary, shown_tokens
from outliers.report.token_plots import MASSIVE_RULE
from outliers.results.answer import crowded, share_words
from outliers.results.citations import citations
from outliers.results.schema import Pictures, StudySummary, Tokens, first_error, other_version
from outliers.units import clip

SUMMARY, TOKENS, FEATURES = "summary.json", "tokens.json", "features.parquet"
QUANTIZATION = "quantization.parquet"
EXPERTS, ROUTER = "experts.parquet", "router.parquet"
PICTURES = "pictures.json"
Parsed = TypeVar("Parsed", StudySummary, Tokens, Pictures)

READING_MEANINGS = {
    "pooled": "layers with a hit anywhere; hits over all (layer, token) pairs",
    "union": "layers with a hit anywhere; tokens with a hit in any layer",
    "per_layer": "layers in which enough of the tokens are hits",
    "affected": "layers with a hit anywhere; mean share of tokens over those layers",
}


def write_report(results: Path, provenance: Mapping[str, object]) -> tuple[Path, ...]:
    """Write `plots/*.png` and `report.html` into the folder `results`; returns their paths, the page last.

    Reads summary.json, features.parquet and tokens.json there. `provenance` (nested mappings and lists are flattened)
    is printed at the end of the page. Plots of an earlier report that have no data now are removed.
    Raises BadInput where a file is missing or unreadable, WorkspaceError where it is of a newer format.
    """
    files = {name: _read(results / name) for name in (SUMMARY, TOKENS, FEATURES)}
    if (results / QUANTIZATION).exists():
        files[QUANTIZATION] = _read(results / QUANTIZATION)
    files |= {name: _read(results / name) for name in (EXPERTS, ROUTER, PICTURES) if (results / name).exists()}
    plots = make_plots(files)
    page = make_page(files, plots, provenance)
    folder = results / "plots"
    folder.mkdir(exist_ok=True)
    for stale in ALL_TEXTS.keys() - {plot.name for plot in plots}:
        (folder / stale).unlink(missing_ok=True)
    contents = {folder / plot.name: plot.png for plot in plots} | {results / "report.html": page}
    for path, content in contents.items():
        write_atomic(path, content)
    return tuple(contents)


def make_plots(files: Mapping[str, bytes], shown: Shown | None = None) -> tuple[Plot, ...]:
    """The pictures of a study in the look of now (`figures.look`), from the bytes of its files by name. Raises as
    `write_report`.

    shown: what the study is called here (default: as it is published). A picture has no text of a corpus but what the numbers
    hold.
    """
    content = read_content(files, None if shown is None else replace(shown, texts={}))
    summary, name = content.summary, content.summary.model.id
    with DRAWING:
        plots = draw(content)
        maps = format_maps(name, captured_layers(summary), _table(files, QUANTIZATION))
        plots = plots if maps is None else (*plots, maps)
        return (*plots, *draw_experts(name, summary.experts, _table(files, EXPERTS), _table(files, ROUTER)))


def read_content(files: Mapping[str, bytes], shown: Shown | None = None) -> Content:
    """What pictures and page are made from. shown: as in `make_page`. Raises as `write_report`."""
    summary = shown_summary(_parsed(files, SUMMARY, StudySummary), shown)
    tokens = shown_tokens(_parsed(files, TOKENS, Tokens), shown)
    pictures = _parsed(files, PICTURES, Pictures) if PICTURES in files else None
    return Content(summary, tokens, _cells(files[FEATURES], summary.criteria.site), pictures)


def make_page(
    files: Mapping[str, bytes],
    plots: Sequence[Plot],
    provenance: Mapping[str, object],
    probe: ProbeSection | None = None,
    shown: Shown | None = None,
    spec: Mapping[str, Any] | None = None,
) -> bytes:
    """report.html of a study, from the bytes of its files by name, its pictures, what a probe of it says, and the spec in its
    manifest.

    shown: what the study is called here, and its text (default: as it is published). Raises as `write_report`.
    """
    numbers, content = _parsed(files, SUMMARY, StudySummary), read_content(files, shown)
    ids = [
        (name, number)
        for name, number, called in (
            ("model", numbers.model.id, content.summary.model.id),
            ("corpus", numbers.corpus.source, content.summary.corpus.source),
        )
        if number != called
    ]
    said = {"published": "" if shown is None else shown.published, "ids": ids, "command": reproduce_command(spec)}
    page = render(content, plots, provenance, _table(files, QUANTIZATION), probe, said)
    return page.encode("utf-8", "replace")


def render(
    content: Content,
    plots: Sequence[Plot],
    provenance: Mapping[str, object],
    errors: Sequence[dict[str, Any]] = (),
    probe: ProbeSection | None = None,
    said: Mapping[str, Any] | None = None,
) -> str:
    """The page as text; the plots are in it as base64. errors: the rows of quantization.parquet.

    said: `published`, what is published in the place of names and text, `ids`, those that names stand for, and `command`, which
    makes the study again.
    """
    summary, tokens, cells = content.summary, content.tokens, content.cells
    kinds = None if content.pictures is None else content.pictures.kinds
    shown = [(plot.name, *ALL_TEXTS[plot.name], plot.alt, page_image(plot.png)) for plot in plots]
    values = {
        "summary": summary,
        "published": "",
        "ids": (),
        "text_published": tokens.text,
        "rule": summary.criteria,
        "layers": captured_layers(summary),
        "meanings": READING_MEANINGS,
        "facts": facts(summary),
        "beside": answer_sentences(summary),
        "crowded": crowded(summary),
        "share_ends": share_words(summary),
        "deviations": deviation_rows(summary),
        "intervals": summary.intervals,
        "without": bool(summary.without_first_tokens),
        "features": feature_rows(summary),
        "near": [] if summary.systematic else nearest(summary, cells),
        "peak": peak(summary),
        "readings": reading_rows(summary),
        "has_legacy": any(found.legacy for found in summary.readings.values()),
        "nonfinite": [row for row in summary.layers if row.nonfinite][:MAX_FEATURE_ROWS],
        "nonfinite_total": sum(row.nonfinite for row in summary.layers),
        "plots": [plot for plot in shown if plot[0] not in (*MASSIVE_PLOTS, *FORMAT_TEXTS, *EXPERT_TEXTS)],
        "format_plots": [plot[1:] for plot in shown if plot[0] in FORMAT_TEXTS],
        "experts": expert_values(summary.experts),
        "expert_plots": [plot[1:] for plot in shown if plot[0] in EXPERT_TEXTS],
        "formats": format_rows(errors),
        "format_sites": measured_sites(errors),
        "format_sample": summary.quantization,
        "probe": probe,
        "verdicts": VERDICTS,
        "massive_plots": [plot[1:] for plot in shown if plot[0] in MASSIVE_PLOTS],
        "contexts": contexts(tokens),
        "max_tokens": MAX_CONTEXTS,
        "num_features": len(summary.systematic),
        "massive": massive_rows(summary, tokens),
        "massive_rule": MASSIVE_RULE,
        "notes": [clip(note, MAX_TEXT_CHARACTERS) for note in summary.notes],
        "kind_words": (*KIND_WORDS.values(), OTHER_WORD),
        "kind_rows": [] if kinds is None else kind_table(kinds),
        "command": None,
        "days": days(provenance),
        "units": UNITS,
        "bibtex": "\n\n".join(citations(summary, None if probe is None else probe.advice)),
        "provenance": provenance_rows(provenance),
    } | dict(said or {})
    return render_template("report.html", values, FILTERS)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist; analyze the capture first (python -m outliers analyze)") from error
    except OSError as error:
        raise BadInput(f"{path} is not readable: {error}; analyze the capture again") from error


def _parsed(files: Mapping[str, bytes], name: str, model: type[Parsed]) -> Parsed:
    """A file of JSON by its model. Keys that a newer program added are passed over; an older file's have their defaults."""
    try:
        return model.model_validate_json(files[name], extra="ignore")
    except ValidationError as error:
        version = other_version(error)
        if version is not None:
            raise WorkspaceError(f"{name} has schema_version {version}, this program reads 1; update it") from error
        raise BadInput(f"{name} is not readable: {first_error(error)}; analyze the capture again") from error


def _table(files: Mapping[str, bytes], name: str) -> list[dict[str, Any]]:
    """The rows of a table that some studies have; none where there is no such file."""
    import pyarrow

    from outliers.files.parquet import read_parquet

    if name not in files:
        return []
    try:
        return list(read_parquet(files[name]).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise BadInput(f"{name} is not a readable table: {error}; analyze the capture again") from error


def _cells(data: bytes, site: str) -> Cells:
    """The rows of features.parquet at `site` that have a hit."""
    import pyarrow

    from outliers.files.parquet import read_parquet

    columns = ["site", "layer", "feature", "hits", "min", "max"]
    try:
        table = read_parquet(data, columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise BadInput(f"{FEATURES} is not a readable table: {error}; analyze the capture again") from error
    held = np.asarray(table["site"].to_pylist(), dtype=object) == site
    held &= table["hits"].to_numpy() > 0
    low, high = (table[name].to_numpy().astype(np.float64)[held] for name in ("min", "max"))
    layer, feature, hits = (table[name].to_numpy().astype(np.int64)[held] for name in ("layer", "feature", "hits"))
    return Cells(layer, feature, hits, extreme=np.where(np.abs(low) > np.abs(high), low, high))
