"""Pictures of a mixture's experts: layer by expert heat maps of load and largest output, entropy by layer, who gives a feature.

It knows the part `experts` of summary.json and the rows of experts.parquet and router.parquet, no files and no HTML. An expert
that no token reached is hatched, never coloured as a small number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from outliers.report.content import Floats
from outliers.report.figures import (
    DECIDING,
    DRAWING,
    INK,
    MUTED,
    Plot,
    dress,
    entitle,
    finish,
    legend,
    new_figure,
    number,
    percent,
    pt,
)
from outliers.results.schema import ExpertsBlock, FeatureExperts, FeatureLayer, SuperExpert

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOAD_PLOT, OUTPUT_PLOT = "experts_load.png", "experts_output.png"
ENTROPY_PLOT, GIVERS_PLOT = "experts_entropy.png", "experts_givers.png"
MAX_NAMED = 8
"""Super experts that are named in the picture; the page lists more."""
MAX_GIVEN = 6
"""Features in the picture of who gives them."""
MAX_TICKS = 24
SHARE_COLOURS = ("#0072b2", "#e08214", "#009e73", "#8e44ad")
REST = "#d5d9de"
UNKNOWN = "#aab2bd"
"""Behind the hatching: unlike every colour of the maps."""

Rows = Sequence[Mapping[str, Any]]
"""Of experts.parquet or router.parquet."""


def draw_experts(model: str, block: ExpertsBlock | None, experts: Rows, routers: Rows) -> tuple[Plot, ...]:
    """The pictures that have data, in the order of the report; empty for a study without experts. model: its name."""
    if block is None or not experts:
        return ()
    with DRAWING:
        plots = [
            _load_map(model, block, experts),
            _output_map(model, block, experts),
            _entropy(model, block, routers),
            _givers(model, block),
        ]
        return tuple(plot for plot in plots if plot is not None)


def _grid(block: ExpertsBlock, experts: Rows, column: str) -> Floats:
    """(expert, layer) float64 of the routed experts; NaN where unknown."""
    values = np.full((block.experts, len(block.layers)), np.nan)
    places = {layer: index for index, layer in enumerate(block.layers)}
    for row in experts:
        if row["expert"] >= 0 and row[column] is not None:
            values[row["expert"], places[row["layer"]]] = row[column]
    return values


def _load_map(model: str, block: ExpertsBlock, experts: Rows) -> Plot:
    values = _grid(block, experts, "load")
    unknown = int(np.isnan(values).sum())
    figure, axes = _map(block.layers, values, "load (1: the mean)", about_one=True)
    entitle(figure, axes, model, "load of the experts", below=_unreached(unknown, values.size))
    return finish(
        LOAD_PLOT,
        f"Heat map of the load of {values.shape[0]} experts in {values.shape[1]} layers: from {number(float(np.nanmin(values)))} "
        f"to {number(float(np.nanmax(values)))} of the mean; {unknown} of {values.size} were reached by no token.",
        figure,
    )


def _unreached(unknown: int, size: int) -> str:
    return f"hatched: reached by no token, {unknown:,} of {size:,}" if unknown else f"all {size:,} were reached"


def _output_map(model: str, block: ExpertsBlock, experts: Rows) -> Plot | None:
    values = _grid(block, experts, "output_max")
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    supers = [] if block.super_experts is None else block.super_experts.experts
    count = 0 if block.super_experts is None else block.super_experts.count
    figure, axes = _map(block.layers, values, "largest abs(x)", about_one=False)
    _mark(axes, block.layers, supers, values.shape[0])
    unknown = values.size - known.size
    below = f"○ super expert over all tokens: {count:,}"
    entitle(
        figure,
        axes,
        model,
        "largest output of the experts",
        below=f"{below}; hatched: unknown, {unknown:,} of {values.size:,}" if unknown else below,
    )
    return finish(
        OUTPUT_PLOT,
        f"Heat map of the largest output of {values.shape[0]} experts in {values.shape[1]} layers: from "
        f"{number(float(known.min()))} to {number(float(known.max()))}; {count} super experts are marked, {unknown} "
        "experts are unknown.",
        figure,
    )


def _mark(axes: Axes, layers: Sequence[int], supers: Sequence[SuperExpert], experts: int) -> None:
    """A ring around each super expert, and the names of the largest."""
    for rank, row in enumerate(row for row in supers if row.expert >= 0):
        x, y = layers.index(row.layer), row.expert
        axes.plot([x], [y], "o", markersize=9, markerfacecolor="none", markeredgecolor=DECIDING, markeredgewidth=1.6)
        if rank >= MAX_NAMED:
            continue
        left = x > 0.75 * len(layers)
        axes.annotate(
            f"L{row.layer}E{row.expert}",
            (x, y),
            xytext=(-8 if left else 8, 7 if y > 0.9 * experts else -7),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=pt(8),
            fontweight="bold",
            color=DECIDING,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )


def _map(layers: Sequence[int], values: Floats, label: str, *, about_one: bool) -> tuple[Figure, Axes]:
    """A heat map of logarithms, layers to the right; NaN is hatched. about_one: whether 1 has a neutral colour of its own."""
    from matplotlib.colors import Normalize, TwoSlopeNorm
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = new_figure(1.5 + min(4.6, max(1.15, 0.24 * len(values))))
    axes = figure.subplots()
    known = values[np.isfinite(values) & (values > 0)]
    least = float(known.min()) if known.size else 1.0
    # an output of exactly 0 is known: it has the colour of the least
    logs = np.log10(np.where(values == 0, least, values))
    low, high = (float(np.nanmin(logs)), float(np.nanmax(logs))) if np.isfinite(logs).any() else (0.0, 0.0)
    ends = (min(low, -0.01), 0.0, max(high, 0.01))
    norm = TwoSlopeNorm(ends[1], ends[0], ends[2]) if about_one else Normalize(low, max(high, low + 0.01))
    image = axes.imshow(
        np.ma.masked_invalid(logs),
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r" if about_one else "YlGnBu",
        norm=norm,
    )
    dress(axes, "layer (0-based)", "expert")
    axes.patch.set(facecolor=UNKNOWN, hatch="////", edgecolor="#ffffff", linewidth=0)
    axes.grid(False)
    _layer_ticks(axes, layers)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=22)
    sides = ((ends[0], 0.0), (0.0, ends[2])) if about_one else ((low, high),)
    bar.set_ticks(sorted({tick for side in sides for tick in _log_ticks(*side)}))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(10**value)))
    bar.set_label(label, fontsize=pt(9), color=INK)
    bar.ax.tick_params(labelsize=pt(8), colors=MUTED, length=2)
    bar.outline.set_visible(False)
    return figure, axes


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of round numbers between two logarithms: powers of ten, with 2 and 5 times these where there are few."""
    steps = (1,) if high - low > 3 else (1, 3) if high - low > 1.5 else (1, 2, 5)
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    found = [power + float(np.log10(step)) for power in powers for step in steps]
    inside = [tick for tick in found if low - 1e-9 <= tick <= high + 1e-9]
    return inside or [low]


def _layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    step = -(-len(layers) // MAX_TICKS)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def _entropy(model: str, block: ExpertsBlock, routers: Rows) -> Plot | None:
    """Entropy of the load by layer with its ends, and below the experts of few tokens."""
    layers = block.layers
    entropy = [row["entropy"] for row in routers]
    if not entropy or None in entropy:
        return None
    x = np.arange(len(layers))
    figure = new_figure(4.4)
    above, under = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    drawn = routers[0]["entropy_low"] is not None
    if drawn:
        ends = [[float(row[name]) for row in routers] for name in ("entropy_low", "entropy_high")]
        above.fill_between(x, *ends, color=SHARE_COLOURS[0], alpha=0.22, linewidth=0)
    above.plot(x, entropy, "-o", color=SHARE_COLOURS[0], markersize=3.5, linewidth=1.4)
    dress(above, "", "entropy / ln E")
    below = "1: every expert gets as many tokens" + "; band: middle 95% of resamples of the sequences" * drawn
    entitle(figure, above, model, "how evenly tokens are spread", below=below)
    for most, colour, line in ((100, SHARE_COLOURS[1], "--"), (10, SHARE_COLOURS[3], "-."), (0, DECIDING, "-")):
        shares = [100 * row[f"at_most_{most}"] / block.experts for row in routers]
        label = f"at most {most} tokens" if most else "no token"
        under.plot(x, shares, line, color=colour, linewidth=1.4, marker=".", markersize=4, label=label)
    dress(under, "layer (0-based)", "% of experts")
    under.set_ylim(bottom=0, top=max(1.0, under.get_ylim()[1]))
    legend(under)
    _layer_ticks(under, layers)
    least = int(np.argmin(entropy))
    return finish(
        ENTROPY_PLOT,
        f"Entropy of the load over {len(layers)} layers: least in layer {layers[least]} with {number(entropy[least])}. Below, "
        f"the share of experts with few tokens; {percent(block.never_reached)} have none.",
        figure,
    )


def _givers(model: str, block: ExpertsBlock) -> Plot | None:
    """For the first features, the shares of the experts of the largest share in each layer."""
    found = [one for one in block.attribution or () if any(row.shares for row in one.layers)]
    if not found:
        return None
    shown = found[:MAX_GIVEN]
    figure = new_figure(1.4 + 0.95 * max(2, len(shown)))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    layers = block.layers
    for axes, one in zip(panels, shown, strict=True):
        _giver_row(axes, one, layers)
    _layer_ticks(panels[-1], layers)
    panels[-1].set_xlabel("layer (0-based)", fontsize=pt(9.5), color=INK)
    figure.supylabel("share of the squares at the feature, %", fontsize=pt(9.5), color=INK)
    entitle(
        figure,
        panels[0],
        model,
        "which experts give a systematic feature",
        below="coloured: the four experts of the largest shares, the largest at the bottom; ▼ the layer that gives most",
    )
    names = ", ".join(str(one.feature) for one in shown)
    return finish(GIVERS_PLOT, f"Bars of the experts that give features {names}, by layer. {_said(shown[0])}", figure)


def _strongest(one: FeatureExperts) -> FeatureLayer:
    """The layer that gives most of a feature."""
    return max(one.layers, key=lambda row: (row.experts_squares or 0.0, -row.layer))


def _said(one: FeatureExperts) -> str:
    row = _strongest(one)
    if not row.shares:
        return ""
    name = f"L{row.layer}E{row.experts[0]}"
    return f"Most of feature {one.feature} comes from layer {row.layer}, {percent(row.shares[0])} of it from {name}."


def _giver_row(axes: Axes, one: FeatureExperts, layers: Sequence[int]) -> None:
    places = {layer: index for index, layer in enumerate(layers)}
    x = [places[row.layer] for row in one.layers]
    known = np.array([100.0 if row.shares else 0.0 for row in one.layers])
    dress(axes, "", "")
    axes.bar(x, known, width=0.86, color=REST)
    bottom = np.zeros(len(x))
    for rank, colour in enumerate(SHARE_COLOURS):
        heights = np.array([100 * row.shares[rank] if rank < len(row.shares) else 0.0 for row in one.layers])
        axes.bar(x, heights, width=0.86, bottom=bottom, color=colour)
        bottom += heights
    axes.set_ylim(0, 122)
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_yticks([0, 50, 100])
    row = _strongest(one)
    if row.shares:
        at = places[row.layer]
        axes.plot([at], [109], "v", color=INK, markersize=5)
        axes.text(
            1.012,
            0.5,
            f"feature {one.feature}\nL{row.layer}E{row.experts[0]}\n{percent(row.shares[0])}",
            transform=axes.transAxes,
            va="center",
            fontsize=pt(8.5),
            color=INK,
        )
