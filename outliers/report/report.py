"""The report: a study's numbers as pictures and one self-contained page.

`plots` draws the pictures, `rows` fills the tables, and `page` renders the template. It knows nothing of captures, machines
or publishing, and has no clock: equal inputs give equal bytes. Every text of a model or corpus is escaped, and the page loads
nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from outliers.errors import BadInput, WorkspaceError
from outliers.files.atomic import write_atomic
from outliers.report.expert_plots import ENTROPY_PLOT, GIVERS_PLOT, LOAD_PLOT, OUTPUT_PLOT, draw_experts
from outliers.report.experts import expert_values
from outliers.report.formats import FORMATS_PLOT, format_maps, format_rows, measured_sites
from outliers.report.page import render_template
from outliers.report.plots import MASSIVE_RULE, MAX_POSITION_ROWS, Cells, Plot, captured_layers, draw
from outliers.report.probe_page import FILTERS, VERDICTS, ProbeSection
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
from outliers.results.answer import crowded, share_words
from outliers.results.schema import StudySummary, Tokens, first_error, other_version
from outliers.units import clip

SUMMARY, TOKENS, FEATURES = "summary.json", "tokens.json", "features.parquet"
QUANTIZATION = "quantization.parquet"
EXPERTS, ROUTER = "experts.parquet", "router.parquet"
PLOT_TEXTS = {
    "heatmap.png": (
        "Layers and features",
        "Signed value of the largest magnitude at the deciding site: the systematic features (◆, above the line), then "
        "those that reach furthest. A grey cell has no hit.",
    ),
    "layer_curves.png": (
        "Layer by layer",
        "Above: the largest magnitude of each layer; a thin line is a quantile of all its magnitudes. Below: the Pearson "
        "kurtosis of all its values.",
    ),
    "magnitudes.png": (
        "All magnitudes",
        "Every finite value, by magnitude, on two log axes; from the dashed line on they are hits. The leftmost bin "
        "holds whatever is smaller, too.",
    ),
    "sweep.png": (
        "Threshold sweep",
        "How many features pass at the deciding site when another magnitude is asked for, by each reading. A thin line "
        "leaves out the first token of each sequence; it is drawn where that changes a number.",
    ),
    "positions.png": (
        "Positions",
        f"The systematic features, the first {MAX_POSITION_ROWS} at most: tokens with a hit in any layer, by position "
        "in the sequence. Counts stand on the right; each row has its own scale.",
    ),
    "massive_positions.png": (
        "Positions of massive activations",
        f"The features of the massive activations, the first {MAX_POSITION_ROWS} at most: tokens by position in the "
        "sequence. Counts stand on the right; each row has its own scale.",
    ),
}
"""Heading and caption of every plot there may be, by file name, in the order of the page."""
FORMAT_TEXTS = {
    FORMATS_PLOT: (
        "Error by site and layer",
        "Every feature is quantized; static formats have the range of the whole corpus.",
    ),
}
"""The same of plots that stand below the heading of the number formats, of studies that have these."""
EXPERT_TEXTS = {
    LOAD_PLOT: (
        "Load",
        "Tokens of each routed expert over the mean of its layer, on a log scale: red above the mean, blue below. A hatched "
        "expert was reached by no token.",
    ),
    OUTPUT_PLOT: (
        "Largest output",
        "Largest magnitude of each routed expert's output over its tokens, on a log scale. A ring is a super expert by the "
        "reading over all tokens. A hatched expert is unknown.",
    ),
    ENTROPY_PLOT: (
        "Entropy and coverage by layer",
        "Above: entropy of the experts' shares of tokens over ln E. Below: the share of the layer's experts with few tokens.",
    ),
    GIVERS_PLOT: (
        "Who gives a feature",
        "Share of each layer's sum of squares of weighted outputs at the feature's channel, by expert; cross terms between "
        "experts are ignored. Grey: all other experts.",
    ),
}
"""The same of plots that stand below the heading of the experts, of mixtures."""
MASSIVE_PLOTS = ("massive_positions.png",)
"""Plots that stand below the heading of the massive activations."""

Parsed = TypeVar("Parsed", StudySummary, Tokens)

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
    files |= {name: _read(results / name) for name in (EXPERTS, ROUTER) if (results / name).exists()}
    plots = make_plots(files)
    page = make_page(files, plots, provenance)
    folder = results / "plots"
    folder.mkdir(exist_ok=True)
    for stale in (PLOT_TEXTS | FORMAT_TEXTS | EXPERT_TEXTS).keys() - {plot.name for plot in plots}:
        (folder / stale).unlink(missing_ok=True)
    contents = {folder / plot.name: plot.png for plot in plots} | {results / "report.html": page}
    for path, content in contents.items():
        write_atomic(path, content)
    return tuple(contents)


def make_plots(files: Mapping[str, bytes], shown: Shown | None = None) -> tuple[Plot, ...]:
    """The pictures of a study, from the bytes of its three files by name. Raises as `write_report`.

    shown: what the study is called here (default: as it is published). No picture has text of a corpus.
    """
    tokens = _parsed(files, TOKENS, Tokens)
    summary = shown_summary(_parsed(files, SUMMARY, StudySummary), shown)
    name = summary.model.id
    plots = draw(summary, tokens, _cells(files[FEATURES], summary.criteria.site))
    maps = format_maps(name, captured_layers(summary), _table(files, QUANTIZATION))
    plots = plots if maps is None else (*plots, maps)
    return (*plots, *draw_experts(name, summary.experts, _table(files, EXPERTS), _table(files, ROUTER)))


def make_page(
    files: Mapping[str, bytes],
    plots: Sequence[Plot],
    provenance: Mapping[str, object],
    probe: ProbeSection | None = None,
    shown: Shown | None = None,
) -> bytes:
    """report.html of a study, from the bytes of its files by name, its pictures, and what a probe of it says.

    shown: what the study is called here, and its text (default: as it is published). Raises as `write_report`.
    """
    numbers = _parsed(files, SUMMARY, StudySummary)
    summary, tokens = shown_summary(numbers, shown), shown_tokens(_parsed(files, TOKENS, Tokens), shown)
    cells = _cells(files[FEATURES], summary.criteria.site)
    ids = [
        (name, number)
        for name, number, called in (
            ("model", numbers.model.id, summary.model.id),
            ("corpus", numbers.corpus.source, summary.corpus.source),
        )
        if number != called
    ]
    said = {"published": "" if shown is None else shown.published, "ids": ids}
    page = render(summary, tokens, cells, plots, provenance, _table(files, QUANTIZATION), probe, said)
    return page.encode("utf-8", "replace")


def render(
    summary: StudySummary,
    tokens: Tokens,
    cells: Cells,
    plots: Sequence[Plot],
    provenance: Mapping[str, object],
    errors: Sequence[dict[str, Any]] = (),
    probe: ProbeSection | None = None,
    said: Mapping[str, Any] | None = None,
) -> str:
    """The page as text; the plots are in it as base64. errors: the rows of quantization.parquet.

    said: `published`, what is published in the place of names and text, and `ids`, those that names stand for.
    """
    texts = PLOT_TEXTS | FORMAT_TEXTS | EXPERT_TEXTS
    shown = [(plot.name, *texts[plot.name], plot.alt, base64.b64encode(plot.png).decode()) for plot in plots]
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
        "plots": [plot[1:] for plot in shown if plot[0] not in (*MASSIVE_PLOTS, *FORMAT_TEXTS, *EXPERT_TEXTS)],
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
