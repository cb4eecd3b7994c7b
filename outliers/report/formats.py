"""Number formats on the page: a row a format, and heat maps of the error by site and layer.

It knows the rows of quantization.parquet, no files and no HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outliers.report.figures import DRAWING, INK, MUTED, Plot, entitle, finish, new_figure, pt
from outliers.results.format_lines import format_lines
from outliers.spec import SITES

MAX_PANELS = 12
MAX_FORMAT_ROWS = 60
FORMATS_PLOT = "formats.png"
_RANGES = {None: "", "all": "whole corpus", "without_first_tokens": "without first tokens"}


@dataclass(frozen=True)
class FormatRow:
    """One line of the page. decibels: one text a site. worst: the site and layer of the largest error, with its SQNR."""

    name: str
    range: str
    held_out: str
    decibels: tuple[str, ...]
    worst: str


def measured_sites(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The sites of the table, in the order of the model."""
    there = {row["site"] for row in rows}
    return tuple(site for site in SITES if site in there)


def format_rows(rows: Sequence[dict[str, Any]]) -> list[FormatRow]:
    """A line for each format, range, and whether systematic features are held out, in the order of the table."""
    sites = measured_sites(rows)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in format_lines(list(rows)):
        groups.setdefault((line.format, line.range, line.held_out > 0), {})[line.site] = line
    found = []
    for (name, ranged, held), lines in groups.items():
        known = [line for line in lines.values() if line.worst_db is not None]
        worst = min(known, key=lambda line: line.worst_db, default=None)
        found.append(
            FormatRow(
                name=name,
                range=_RANGES.get(ranged, str(ranged)),
                held_out=_counts([line.held_out for line in lines.values()]) if held else "",
                decibels=tuple(_shown(lines[site].sqnr_db) if site in lines else "–" for site in sites),
                worst="–" if worst is None else f"{worst.site} {worst.worst_layer}: {worst.worst_db:.1f}",
            )
        )
    return found[:MAX_FORMAT_ROWS]


def _counts(held: list[int]) -> str:
    low, high = min(held), max(held)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _shown(decibels: float | None) -> str:
    return "exact" if decibels is None else f"{decibels:.1f}"


def format_maps(model: str, layers: Sequence[int], rows: Sequence[dict[str, Any]]) -> Plot | None:
    """SQNR by site and layer, a panel a format, every feature quantized; None for an empty table.

    model: its name. layers: those that were read, ascending.
    """
    plain = [row for row in rows if row["held_out"] == 0 and row["range"] in (None, "all")]
    names = list(dict.fromkeys(row["format"] for row in plain))[:MAX_PANELS]
    if not names:
        return None
    sites = measured_sites(rows)
    values = np.full((len(names), len(sites), len(layers)), np.nan)
    for row in plain:
        if row["format"] in names and row["sqnr_db"] is not None:
            place = sites.index(row["site"]), layers.index(row["layer"])
            values[names.index(row["format"]), *place] = row["sqnr_db"]
    with DRAWING:
        figure = new_figure(0.9 + (0.42 + 0.17 * len(sites)) * len(names))
        panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        known = values[np.isfinite(values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        for axes, name, cells in zip(panels, names, values, strict=True):
            image = axes.imshow(cells, aspect="auto", cmap="YlGnBu", vmin=low, vmax=max(high, low + 1e-3))
            axes.set_title(name, loc="left", fontsize=pt(8.5), color=INK, pad=3)
            axes.set_yticks(range(len(sites)), sites)
            axes.tick_params(labelsize=pt(7.5), colors=INK, length=2)
            axes.spines[:].set_visible(False)
        step = -(-len(layers) // 24)
        panels[-1].set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        panels[-1].set_xlabel("layer (0-based)", fontsize=pt(9.5), color=INK)
        bar = figure.colorbar(image, ax=list(panels), pad=0.02, aspect=30)
        bar.set_label("SQNR (dB); more is less error", fontsize=pt(9), color=INK)
        bar.ax.tick_params(labelsize=pt(8), colors=MUTED, length=2)
        bar.outline.set_visible(False)
        first = panels[0].get_title(loc="left")
        entitle(figure, panels[0], model, "error of number formats", below=first)
        shown = f"{low:.1f} to {high:.1f} dB" if known.size else "no number"
        alt = f"Heat maps of {len(names)} number formats over {len(layers)} layers: SQNR from {shown}."
        return finish(FORMATS_PLOT, alt, figure)
