"""The heat map of layers and features: the largest value of each feature in each layer, hits and what stays below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from outliers.report.content import Cells, Content, Floats, captured_layers
from outliers.report.figures import INK, Plot, criterion, dress, entitle, finish, new_figure, number, pt
from outliers.results.schema import StudySummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

MAX_HEAT_ROWS = 24
MAX_ANNOTATED_LAYERS = 8
"""With more columns the numbers no longer fit into the cells of the heat map."""
LINEAR_SHARE = 1 / 6
"""The scale is linear up to this share of the deciding magnitude: up to 1 for hits of 6."""


def heat_map(content: Content) -> Plot | None:
    """Layer by feature at the deciding site; None where there is nothing to show.

    Of studies without pictures.json the values below the deciding magnitude are unknown.
    """
    summary = content.summary
    features, marked, values = _values(content)
    if not features or not np.isfinite(values).any():
        return None
    site, layers, magnitude = summary.criteria.site, captured_layers(summary), summary.criteria.magnitude
    figure = new_figure(1.75 + 0.215 * max(len(features), 6))
    axes = figure.subplots()
    norm = _draw_cells(figure, axes, values, magnitude)
    hits = np.abs(np.nan_to_num(values)) >= magnitude
    if values.shape[1] <= MAX_ANNOTATED_LAYERS:
        _annotate(axes, values, hits, norm)
    else:
        _dot(axes, values, hits, norm)
    entitle(figure, axes, summary.model.id, "largest value in each layer", criterion(summary.criteria))
    dress(axes, "layer (0-based)" + "; ◆ systematic" * bool(marked), "feature")
    _ticks(axes, layers, features, marked)
    strongest, _ = np.unravel_index(np.nanargmax(np.abs(values)), values.shape)
    peak = values.flat[np.nanargmax(np.abs(values))]
    return finish(
        "heatmap.png",
        f"Heat map of {len(features)} features over {len(layers)} layers at {site}; {marked} of them are systematic. "
        f"{int(hits.sum()):,} of {int(np.isfinite(values).sum()):,} cells are hits. "
        f"The largest value is {number(float(peak))}, in feature {features[int(strongest)]}.",
        figure,
    )


def _values(content: Content) -> tuple[list[int], int, Floats]:
    """Features (systematic ones first, then by magnitude), how many of them are systematic, and (feature, layer) signed values,
    NaN where unknown."""
    summary = content.summary
    if content.pictures is None:
        return _hit_values(summary, content.cells)
    systematic = {row.feature for row in summary.systematic}
    rows = [row for row in content.pictures.features if summary.criteria.site in row.values][:MAX_HEAT_ROWS]
    values = [[np.nan if x is None else x for x in row.values[summary.criteria.site]] for row in rows]
    shape = (len(rows), len(captured_layers(summary)))
    return (
        [row.feature for row in rows],
        sum(row.feature in systematic for row in rows),
        np.array(values, np.float64).reshape(shape),
    )


def _hit_values(summary: StudySummary, cells: Cells) -> tuple[list[int], int, Floats]:
    """The same from the cells with a hit alone."""
    systematic = [feature.feature for feature in summary.systematic]
    by_reach = list(dict.fromkeys(cells.feature[np.lexsort((cells.feature, -np.abs(cells.extreme)))].tolist()))
    chosen = [feature for feature in systematic if feature in by_reach][:MAX_HEAT_ROWS]
    others = [feature for feature in by_reach if feature not in systematic]
    features, layers = chosen + others[: MAX_HEAT_ROWS - len(chosen)], captured_layers(summary)
    values = np.full((len(features), len(layers)), np.nan)
    for index, feature in enumerate(features):
        own = cells.feature == feature
        values[index, np.searchsorted(layers, cells.layer[own])] = cells.extreme[own]
    return features, len(chosen), values


def _draw_cells(figure: Figure, axes: Axes, values: Floats, magnitude: float) -> SymLogNorm:
    """The cells and their bar. One cell can't wash out the others: the scale is that of a logarithm on both sides of zero."""
    from matplotlib import colormaps
    from matplotlib.colors import SymLogNorm

    reach, linear = float(np.nanmax(np.abs(values))), magnitude * LINEAR_SHARE
    reach = max(reach, linear)
    norm = SymLogNorm(linthresh=linear, linscale=0.4, vmin=-reach, vmax=reach, base=10)
    colours = colormaps["RdBu_r"].with_extremes(bad="#eceef1")
    image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=28)
    steps = _bar_steps(reach, magnitude, linear, most=13 if len(values) > 8 else 7)
    bar.set_ticks(steps, labels=[number(step if abs(step) < 10 else round(step)) for step in steps])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=pt(8), colors=INK, length=2)
    bar.set_label("signed value (no unit)", fontsize=pt(9), color=INK)
    bar.outline.set_visible(False)
    if reach > magnitude:
        for side in (-magnitude, magnitude):
            bar.ax.axhline(side, color=INK, linewidth=1.4)
    return norm


def _bar_steps(reach: float, magnitude: float, linear: float, most: int) -> list[float]:
    """Ticks of the bar: its ends, zero, the deciding magnitude and powers of ten that stand apart from these."""
    steps = [reach]
    if magnitude < reach * 0.75:
        steps.append(magnitude)
    powers = [10.0**power for power in range(-6, 7)]
    for power in reversed(powers):
        apart = all(step / power > 2.2 or power / step > 2.2 for step in steps)
        if linear <= power < reach * 0.6 and apart and 2 * len(steps) + 1 < most:
            steps.append(power)
    return sorted({0.0, *steps, *(-step for step in steps)})


def _annotate(axes: Axes, values: Floats, hits: np.ndarray, norm: SymLogNorm) -> None:
    """The value of each cell, of hits in bold."""
    for row, column in np.argwhere(np.isfinite(values)).tolist():
        value = float(values[row, column])
        weight = "bold" if hits[row, column] else "normal"
        text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": pt(7.5), "fontweight": weight}
        axes.text(column, row, number(value), color=_ink(norm, value), **text)


def _dot(axes: Axes, values: Floats, hits: np.ndarray, norm: SymLogNorm) -> None:
    """A dot in each cell with a hit."""
    rows, columns = np.nonzero(hits)
    colours = [_ink(norm, float(value)) for value in values[rows, columns]]
    size = 5.0 if values.shape[1] <= 40 else 1.2
    axes.scatter(columns, rows, s=size, c=colours, linewidths=0)


def _ink(norm: SymLogNorm, value: float) -> str:
    return "white" if abs(float(norm(value)) - 0.5) > 0.32 else INK


def _ticks(axes: Axes, layers: Sequence[int], features: Sequence[int], marked: int) -> None:
    step = -(-len(layers) // 24)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    labels = [f"{feature} ◆" if index < marked else f"{feature}" for index, feature in enumerate(features)]
    axes.set_yticks(range(len(features)), labels)
    for label in axes.get_yticklabels()[:marked]:
        label.set_fontweight("bold")
    axes.grid(False)
    axes.set_xticks(np.arange(len(layers) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(features) + 1) - 0.5, minor=True)
    # many layers make narrow cells: full lines would whiten them
    axes.grid(True, which="minor", axis="x", color="white", linewidth=0.8 if len(layers) <= 40 else 0.2)
    axes.grid(True, which="minor", axis="y", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    if 0 < marked < len(features):
        axes.axhline(marked - 0.5, color=INK, linewidth=1.2)
