"""The report: a results folder's numbers as `plots/*.png` and one self-contained `report.html`.

It shows what summary.json, features.parquet and tokens.json hold, and counts nothing again; only where no feature is
systematic it looks for those that came closest. It knows nothing of captures, machines or publishing, and has no
clock: equal inputs give equal bytes. Every text of a model or corpus is escaped, and the page loads nothing.
Before it: `criteria` wrote the three files. After it: `publish` checks and sends the results.
"""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from outliers.errors import BadInput, WorkspaceError
from outliers.files import write_atomic
from outliers.plots import MAX_POSITION_ROWS, Cells, Plot, captured_layers, captured_sites, draw, number, percent
from outliers.spec import BLOCK, READINGS

Json = Mapping[str, Any]

SCHEMA_VERSION = 1
PLOT_TEXTS = {
    "heatmap.png": (
        "Layers and features",
        "Signed value of the largest magnitude at the deciding site: the systematic features (◆, above the line), then "
        "those that reach furthest. A grey cell has no hit.",
    ),
    "layer_curves.png": (
        "Layer by layer",
        "Above: the largest magnitude of each layer. Below: the Pearson kurtosis of all its values.",
    ),
    "magnitudes.png": (
        "All magnitudes",
        "Every finite value, by magnitude, on two log axes; from the dashed line on they are hits. The leftmost bin "
        "holds whatever is smaller, too.",
    ),
    "sweep.png": (
        "Threshold sweep",
        "How many features pass at the deciding site when another magnitude is asked for, by each reading.",
    ),
    "positions.png": (
        "Positions",
        f"The systematic features, the first {MAX_POSITION_ROWS} at most: tokens with a hit in any layer, by position "
        "in the sequence. Counts stand on the right; each row has its own scale.",
    ),
}
"""Heading and caption of every plot there may be, by file name, in the order of the page."""

# The page without its plots stays below 300 KB, whatever was found; each cut is said on the page.
MAX_FEATURE_ROWS = 100
MAX_CONTEXT_FEATURES = 12
MAX_CONTEXTS = 8
MAX_MASSIVE_ROWS = 24
MAX_PROVENANCE_ROWS = 200
MAX_TEXT_CHARACTERS = 400
MAX_CONTEXT_CHARACTERS = 90

READING_MEANINGS = {
    "pooled": "layers with a hit anywhere; hits over all (layer, token) pairs",
    "union": "layers with a hit anywhere; tokens with a hit in any layer",
    "per_layer": "layers in which enough of the tokens are hits",
    "affected": "layers with a hit anywhere; mean share of tokens over those layers",
}


def write_report(results: Path, provenance: Mapping[str, object]) -> tuple[Path, ...]:
    """Writes `plots/*.png` and `report.html` into the folder `results`; gives their paths, the page last.

    Reads summary.json, features.parquet and tokens.json there. `provenance` (nested mappings and lists are flattened)
    is printed at the end of the page. Plots of an earlier report that have no data now are removed.
    Raises BadInput where a file is missing or unreadable, WorkspaceError where it is of a newer format.
    """
    summary, tokens = _read_json(results / "summary.json"), _read_json(results / "tokens.json")
    cells = _read_cells(results / "features.parquet", summary["criteria"]["site"])
    plots = draw(summary, tokens, cells)
    page = render(summary, tokens, cells, plots, provenance)
    folder = results / "plots"
    folder.mkdir(exist_ok=True)
    for stale in PLOT_TEXTS.keys() - {plot.name for plot in plots}:
        (folder / stale).unlink(missing_ok=True)
    contents = {folder / plot.name: plot.png for plot in plots}
    contents[results / "report.html"] = page.encode("utf-8", "replace")
    for path, content in contents.items():
        write_atomic(path, content)
    return tuple(contents)


def render(summary: Json, tokens: Json, cells: Cells, plots: Sequence[Plot], provenance: Mapping[str, object]) -> str:
    """The page as text; the plots are in it as base64."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent / "templates")
    house = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    house.filters |= {"percent": percent, "number": number, "value": aligned, "visible": visible, "clip": clip}
    return house.get_template("report.html").render(
        summary=summary,
        text_published=tokens["text"],
        rule=summary["criteria"],
        layers=captured_layers(summary),
        meanings=READING_MEANINGS,
        facts=_facts(summary),
        features=_feature_rows(summary),
        near=[] if summary["systematic"] else nearest(summary, cells),
        peak=_peak(summary),
        readings=_reading_rows(summary),
        has_legacy=any(found.get("legacy") for found in summary["readings"].values()),
        nonfinite=[row for row in summary["layers"] if row["nonfinite"]][:MAX_FEATURE_ROWS],
        nonfinite_total=sum(row["nonfinite"] for row in summary["layers"]),
        plots=[(*PLOT_TEXTS[plot.name], plot.alt, base64.b64encode(plot.png).decode()) for plot in plots],
        contexts=_contexts(tokens),
        max_tokens=MAX_CONTEXTS,
        num_features=len(summary["systematic"]),
        max_contexts=MAX_CONTEXT_FEATURES,
        massive=_massive_rows(summary, tokens),
        notes=[clip(str(note), MAX_TEXT_CHARACTERS) for note in summary["notes"]],
        provenance=_provenance_rows(provenance),
    )


def aligned(value: float) -> str:
    """A value for a column of a table: two decimals, none from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def visible(text: object) -> str:
    """`text` with newlines as ⏎, tabs as ⇥ and other control or direction-changing characters as U+FFFD."""
    shown = str(text).replace("\r\n", "⏎").replace("\n", "⏎").replace("\r", "⏎").replace("\t", "⇥")
    return "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char for char in shown)


def clip(text: object, max_characters: int, *, keep_end: bool = False) -> str:
    """`text` cut to `max_characters`, with … where it was cut."""
    whole = str(text)
    if len(whole) <= max_characters:
        return whole
    return "…" + whole[1 - max_characters :] if keep_end else whole[: max_characters - 1] + "…"


def ranges(layers: Iterable[int]) -> str:
    """Sorted layers as compact ranges: 0-3, 7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def nearest(summary: Json, cells: Cells, most: int = 3) -> list[dict[str, Any]]:
    """The features with a hit that came closest to the deciding reading, best first.

    `layers` and `tokens` are the two sides of its rule as shares; for `union` the cells hold no more than a lower bound
    of the second (`at_least`), for `per_layer` there is none (None). Closest: the side that is further from its
    threshold is the nearest to it.
    """
    rule, n_tokens = summary["criteria"], summary["corpus"]["num_tokens"]
    n_layers, reading = len(captured_layers(summary)), rule["reading"]
    needed = ceil(Fraction(repr(rule["position_fraction"])) * n_tokens) if reading == "per_layer" else 1
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
        sides = [layers / rule["layer_fraction"]]
        sides += [] if share is None else [float(share) / rule["position_fraction"]]
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist; analyze the capture first (python -m outliers analyze)") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is not readable JSON: {error}; analyze the capture again") from error
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise WorkspaceError(f"{path} has schema_version {version}, this program reads {SCHEMA_VERSION}; update it")
    return dict(value)


def _read_cells(path: Path, site: str) -> Cells:
    """The rows of features.parquet at `site` that have a hit."""
    import pyarrow

    from outliers.parquet import read_parquet

    columns = ["site", "layer", "feature", "hits", "min", "max"]
    try:
        table = read_parquet(path.read_bytes(), columns)
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist; analyze the capture first (python -m outliers analyze)") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise BadInput(f"{path} is not a readable table: {error}; analyze the capture again") from error
    held = np.asarray(table["site"].to_pylist(), dtype=object) == site
    held &= table["hits"].to_numpy() > 0
    low, high = (table[name].to_numpy().astype(np.float64)[held] for name in ("min", "max"))
    layer, feature, hits = (table[name].to_numpy().astype(np.int64)[held] for name in ("layer", "feature", "hits"))
    return Cells(layer, feature, hits, extreme=np.where(np.abs(low) > np.abs(high), low, high))


def _facts(summary: Json) -> list[tuple[str, str]]:
    """The model and the corpus in a few pairs of (name, text)."""
    model, corpus = summary["model"], summary["corpus"]
    size = _count(model["total_parameters"])
    if model.get("active_parameters") not in (None, model["total_parameters"]):
        size += f", {_count(model['active_parameters'])} active"
    if model.get("num_experts"):
        size += f", {model['num_experts']} experts"
    layers = captured_layers(summary)
    shape = f"{model['num_layers']} layer{'s'[: model['num_layers'] > 1]} × {model['hidden_size']:,} features"
    if len(layers) != model["num_layers"]:
        shape += f" (read: layers {ranges(layers)})"
    pairs = [
        ("Architecture", model["architecture"]),
        ("Parameters", size),
        ("Shape", shape),
        ("Arithmetic", " ".join(str(part) for part in (model["dtype"], model.get("quantization")) if part)),
        ("Sites", ", ".join(captured_sites(summary))),
        ("Corpus", corpus["source"]),
        ("Tokens", f"{corpus['num_tokens']:,} in {corpus['num_sequences']:,} sequences"),
        ("Perplexity", _perplexity(summary)),
        ("Revision", (model["revision"] or "")[:12]),
    ]
    return [(name, clip(text, MAX_TEXT_CHARACTERS)) for name, text in pairs if text]


def _perplexity(summary: Json) -> str:
    found = summary.get("perplexity")
    if found is None:
        return ""
    return "not a number" if found["value"] is None else f"{found['value']:.4g} over {found['tokens']:,} tokens"


def _count(value: int | None) -> str:
    if value is None:
        return "unknown"
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:,}"


def _extreme(low: float, high: float) -> float:
    return low if abs(low) > abs(high) else high


def _feature_rows(summary: Json) -> list[dict[str, Any]]:
    """The systematic features as rows; `strip` is the path of a bar in which each affected layer is filled."""
    place = {layer: index for index, layer in enumerate(captured_layers(summary))}
    return [
        {
            **feature,
            "extreme": _extreme(feature["min"], feature["max"]),
            "ranges": ranges(feature["layers"]),
            "strip": "".join(f"M{place[layer]} 0h1v1h-1z" for layer in feature["layers"]),
            "first_share": feature["first_token_hits"] / feature["hits"] if feature["hits"] else None,
        }
        for feature in summary["systematic"][:MAX_FEATURE_ROWS]
    ]


def _reading_rows(summary: Json) -> list[dict[str, Any]]:
    """Number of features by site and reading; `legacy` is None but at `block`."""
    order = [BLOCK, *captured_sites(summary)]
    return [
        {
            "site": site,
            "counts": [(reading, len(found.get(reading, ()))) for reading in READINGS],
            "legacy": found.get("legacy"),
        }
        for site in order
        if (found := summary["readings"].get(site)) is not None
    ]


def _peak(summary: Json) -> Json | None:
    """The row of `layers` with the largest magnitude among the deciding site's own sites."""
    site = summary["criteria"]["site"]
    sites = ("attn_in", "mlp_in") if site == BLOCK else (site,)
    rows = [row for row in summary["layers"] if row["site"] in sites and row["max_magnitude"] is not None]
    return max(rows, key=lambda row: (row["max_magnitude"], -row["layer"]), default=None)


def _shown(row: Json) -> dict[str, Any]:
    """A token with the text around it, cut to what a line of the page holds; None stays None."""
    cut = {
        "token": row["token"] and clip(row["token"], MAX_CONTEXT_CHARACTERS),
        "before": row["before"] and clip(row["before"], MAX_CONTEXT_CHARACTERS, keep_end=True),
        "after": row["after"] and clip(row["after"], MAX_CONTEXT_CHARACTERS),
    }
    return {**row, **cut}


def _contexts(tokens: Json) -> list[dict[str, Any]]:
    return [
        {**feature, "top": [_shown(row) for row in feature["top"][:MAX_CONTEXTS]]}
        for feature in tokens["features"][:MAX_CONTEXT_FEATURES]
    ]


def _massive_rows(summary: Json, tokens: Json) -> list[dict[str, Any]] | None:
    """Massive activations with the text around them; None where `resid` was not captured."""
    if summary["massive"] is None:
        return None
    keys = ("layer", "sequence", "position", "feature")
    around = {tuple(row[key] for key in keys): row for row in tokens["massive"]}
    empty = {"token": None, "before": None, "after": None, "ratio": None, "token_ratio": None}
    return [
        _shown({**empty, **around.get(tuple(row[key] for key in keys), {}), **row})
        for row in summary["massive"][:MAX_MASSIVE_ROWS]
    ]


def _flat(value: object, name: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings and lists as (dotted name, text) pairs, in their own order."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping | list | tuple) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{index}")
    elif isinstance(value, list | tuple):
        yield name, ", ".join(str(inner) for inner in value)
    else:
        yield name, "" if value is None else str(value)


def _provenance_rows(provenance: Mapping[str, object]) -> list[tuple[str, str]]:
    rows = [(clip(name, 120), clip(text, MAX_TEXT_CHARACTERS)) for name, text in _flat(provenance)]
    left = len(rows) - MAX_PROVENANCE_ROWS
    return rows if left <= 0 else [*rows[:MAX_PROVENANCE_ROWS], ("…", f"{left} more in manifest.json")]
