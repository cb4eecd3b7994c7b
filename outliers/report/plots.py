"""Plots: the numbers of one study as PNG bytes, each with an alternative text.

`draw` returns up to six plots, only those that have data. It takes summary.json and tokens.json as the models of
`results.schema`. It knows nothing of files, HTML, how a number was counted, or how a figure becomes bytes (`figures`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from outliers.report.figures import (
    DECIDING,
    INK,
    MUTED,
    READING_STYLES,
    SITE_COLOURS,
    criterion,
    dress,
    entitle,
    legend,
    mark_magnitude,
    new_figure,
    number,
    plain_log,
    png,
)
from outliers.results.schema import MassiveFeature, StudySummary, Sweep, TokenFeature, Tokens
from outliers.spec import READINGS, SITES, AnySiteName, ReadingName, SiteName

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Lines = dict[ReadingName, list[int]]
"""A count for each magnitude of the ladder, by reading."""

SMALLEST = 2.0**-10
"""Magnitudes below share the first bin of the histogram: bfloat16 has forty decades below it, which show nothing."""
MAX_HEAT_ROWS = 24
MAX_POSITION_ROWS = 10
MASSIVE_RULE = "abs(x) > 100 and at least 1,000 times the median magnitude"
MAX_ANNOTATED_LAYERS = 8
"""With more columns the numbers no longer fit into the cells of the heat map."""

# FreeType and the font caches of matplotlib are not promised to be safe between threads.
DRAWING = threading.Lock()


@dataclass(frozen=True)
class Cells:
    """The (layer, feature) pairs with a hit at the deciding site; four arrays of one length."""

    layer: Ints
    feature: Ints
    hits: Ints
    extreme: Floats  # signed value of the largest magnitude


@dataclass(frozen=True)
class Plot:
    """One plot: `name` is its file name, `alt` plain text for who can't see it, `png` its bytes."""

    name: str
    alt: str
    png: bytes


def captured_layers(summary: StudySummary) -> tuple[int, ...]:
    """The layers that were read, ascending."""
    return tuple(sorted({row.layer for row in summary.layers}))


def captured_sites(summary: StudySummary) -> tuple[SiteName, ...]:
    """The sites that were read, in the order of the model; `block` is not one of them."""
    return tuple(site for site in SITES if any(row.site == site for row in summary.layers))


def draw(summary: StudySummary, tokens: Tokens, cells: Cells) -> tuple[Plot, ...]:
    """The plots that have data, in the order of the report."""
    with DRAWING:
        plots = [
            heat_map(summary, cells),
            layer_curves(summary),
            magnitudes(summary),
            sweep(summary),
            positions(summary, tokens),
            massive_positions(summary, tokens),
        ]
        return tuple(plot for plot in plots if plot is not None)


def _rows(summary: StudySummary, cells: Cells) -> tuple[list[int], int]:
    """Features of the heat map (systematic ones first, then by magnitude) and how many of them are systematic."""
    systematic = [feature.feature for feature in summary.systematic]
    by_reach = list(dict.fromkeys(cells.feature[np.lexsort((cells.feature, -np.abs(cells.extreme)))].tolist()))
    chosen = [feature for feature in systematic if feature in by_reach][:MAX_HEAT_ROWS]
    others = [feature for feature in by_reach if feature not in systematic]
    return chosen + others[: MAX_HEAT_ROWS - len(chosen)], len(chosen)


def heat_map(summary: StudySummary, cells: Cells) -> Plot | None:
    """Layer by feature at the deciding site; None where nothing was hit."""
    features, marked = _rows(summary, cells)
    if not features:
        return None
    site, layers = summary.criteria.site, captured_layers(summary)
    values = np.full((len(features), len(layers)), np.nan)  # (feature, layer); NaN: no hit
    for index, feature in enumerate(features):
        own = cells.feature == feature
        values[index, np.searchsorted(layers, cells.layer[own])] = cells.extreme[own]
    figure = new_figure(1.75 + 0.215 * max(len(features), 6))
    axes = figure.subplots()
    _heat_cells(figure, axes, values, summary.criteria.magnitude)
    entitle(figure, axes, summary.model.id, "largest value in each layer", criterion(summary.criteria))
    dress(axes, "layer (0-based)" + "; ◆ systematic" * bool(marked), "feature")
    _heat_ticks(axes, layers, features, marked)
    strongest, _ = np.unravel_index(np.nanargmax(np.abs(values)), values.shape)
    peak = values.flat[np.nanargmax(np.abs(values))]
    return Plot(
        "heatmap.png",
        f"Heat map of {len(features)} features over {len(layers)} layers at {site}; {marked} of them are systematic. "
        f"The largest value is {number(float(peak))}, in feature {features[int(strongest)]}.",
        png(figure),
    )


def _heat_cells(figure: Figure, axes: Axes, values: Floats, magnitude: float) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize, SymLogNorm

    reach = float(np.nanmax(np.abs(values)))
    # Hits of 6 and of 2,000 meet at `resid`: on a linear scale all but a few cells would look empty.
    wide = reach > 4 * magnitude
    curved = SymLogNorm(linthresh=magnitude, linscale=0.25, vmin=-reach, vmax=reach, base=10)
    norm = curved if wide else Normalize(-reach, reach)
    colours = colormaps["RdBu_r"].with_extremes(bad="#eceef1")
    image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=28)
    powers = [10.0**power for power in range(7) if magnitude * 1.2 < 10.0**power < reach * 0.75]
    steps = [magnitude, *powers, reach] if wide and len(values) > 8 else [reach]
    steps = sorted({*steps, 0.0, *(-step for step in steps)})
    bar.set_ticks(steps, labels=[number(step if abs(step) < 10 else round(step)) for step in steps])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8, colors=INK, length=2)
    bar.set_label("signed value (no unit)", fontsize=9, color=INK)
    bar.outline.set_visible(False)
    if values.shape[1] <= MAX_ANNOTATED_LAYERS:
        for row, column in np.argwhere(np.isfinite(values)).tolist():
            value = float(values[row, column])
            ink = "white" if abs(float(norm(value)) - 0.5) > 0.32 else INK
            axes.text(column, row, number(value), ha="center", va="center", fontsize=7.5, color=ink)


def _heat_ticks(axes: Axes, layers: Sequence[int], features: Sequence[int], marked: int) -> None:
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


def layer_curves(summary: StudySummary) -> Plot | None:
    """Largest magnitude and kurtosis of each layer, a line a site."""
    from matplotlib.ticker import MaxNLocator

    sites, layers = captured_sites(summary), captured_layers(summary)
    if not sites:
        return None
    figure = new_figure(5.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, key in ((upper, "max_magnitude"), (lower, "kurtosis")):
        for site in sites:
            known = [(row.layer, getattr(row, key) or 0) for row in summary.layers if row.site == site]
            line = sorted((layer, value) for layer, value in known if value > 0)
            style = {"color": SITE_COLOURS[site], "marker": "o", "markersize": 3.5 if len(layers) <= 40 else 2}
            axes.plot([at for at, _ in line], [value for _, value in line], label=site, linewidth=1.6, **style)
    _bulk_curves(upper, summary)
    mark_magnitude(upper, summary.criteria.magnitude, vertical=False)
    lower.axhline(3, color=MUTED, linewidth=1.2, linestyle="--", label="normal: 3")
    dress(upper, "", "max abs(x) (no unit)")
    dress(lower, "layer (0-based)", "Pearson kurtosis (no unit)")
    for axes in (upper, lower):
        plain_log(axes, "y")
        legend(axes)
    lower.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    lower.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    entitle(figure, upper, summary.model.id, "layer by layer", criterion(summary.criteria))
    peak = max(summary.layers, key=lambda row: (row.max_magnitude or 0.0, -row.layer))
    return Plot(
        "layer_curves.png",
        f"Curves over {len(layers)} layers for {', '.join(sites)}. The largest magnitude is "
        f"{number(peak.max_magnitude or 0.0)}, at {peak.site} of layer {peak.layer}.",
        png(figure),
    )


def _bulk_curves(axes: Axes, summary: StudySummary) -> None:
    """The highest quantile of each layer as a thin line below the maximum: how far off the outliers are."""
    levels = summary.quantile_levels
    if not levels:
        return
    index = levels.index(max(levels))
    for site in captured_sites(summary):
        known = [(row.layer, row.quantiles or []) for row in summary.layers if row.site == site]
        line = sorted((layer, values[index]) for layer, values in known if len(values) > index and values[index] > 0)
        axes.plot(
            [at for at, _ in line], [value for _, value in line], color=SITE_COLOURS[site], linewidth=0.9, alpha=0.6
        )
    # one entry for all of them: their colours are those of the sites
    axes.plot([], [], color=MUTED, linewidth=0.9, label=f"thin: {max(levels) * 100:g}% quantile")


def magnitudes(summary: StudySummary) -> Plot | None:
    """Histogram of magnitudes, log-log, a line a site; None where no value was counted."""
    known = {site: summary.histogram[site] for site in SITES if site in summary.histogram}
    filled = {site: bins for site, bins in known.items() if any(bins.counts)}
    if not filled:
        return None
    figure = new_figure(3.9)
    axes = figure.subplots()
    for site, bins in filled.items():
        counts, edges = log_bins(np.asarray(bins.counts), np.asarray(bins.lower_edges, dtype=np.float64))
        axes.stairs(counts, edges, baseline=0.5, label=site, color=SITE_COLOURS[site], linewidth=1.6)
    magnitude = summary.criteria.magnitude
    dress(axes, "magnitude, abs(x) (no unit)", "values in the bin (count)")
    mark_magnitude(axes, magnitude)
    plain_log(axes, "x")
    plain_log(axes, "y")
    axes.set(xlim=axes.get_xlim(), ylim=(0.5, None))
    axes.axvspan(magnitude, axes.get_xlim()[1], color=DECIDING, alpha=0.05, linewidth=0)
    legend(axes)
    entitle(figure, axes, summary.model.id, "how large the values are", criterion(summary.criteria))
    total = sum(sum(bins.counts) for bins in filled.values())
    return Plot(
        "magnitudes.png",
        f"Histogram of {total:,} magnitudes at {', '.join(filled)}, with the magnitude {number(magnitude)} marked.",
        png(figure),
    )


def log_bins(counts: Ints, lower: Floats) -> tuple[Ints, Floats]:
    """Bins for a log axis: counts, and edges (one more); the first bin takes all below SMALLEST, empty ends are cut."""
    small = int(np.searchsorted(lower, SMALLEST))
    counts = np.append(counts[:small].sum(), counts[small:])
    lower = np.append(SMALLEST / 2, lower[small:])
    edges = np.append(lower, max(lower[-1] * 1.25, SMALLEST))  # a bin of four an octave is at most this wide
    first, last = np.flatnonzero(counts)[[0, -1]]
    return counts[first : last + 1], edges[first : last + 2]


def sweep(summary: StudySummary) -> Plot | None:
    """Number of features against the magnitude asked for, a line a reading, at the deciding site."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    rule, steps, passed = summary.criteria, summary.sweep.magnitudes, len(summary.systematic)
    lines, without = sweep_lines(summary.sweep, rule.site)
    if not steps or not lines:
        return None
    figure = new_figure(3.6)
    axes = figure.subplots()
    for size, (reading, counts) in zip((8, 6.5, 5, 3.5), lines.items(), strict=False):
        colour, dash, marker = READING_STYLES[reading]
        decides = reading == rule.reading
        if decides:  # wide and pale, below the others: equal counts must not hide a line
            axes.plot(steps, counts, color=colour, linewidth=7, alpha=0.3, solid_capstyle="round")
        label = f"{reading} (decides)" if decides else reading
        axes.plot(steps, counts, color=colour, linestyle=dash, marker=marker, markersize=size, label=label)
    for reading, counts in without.items():
        axes.plot(steps, counts, color=READING_STYLES[reading][0], linestyle=READING_STYLES[reading][1], linewidth=0.9)
    if without:
        axes.plot([], [], color=MUTED, linewidth=0.9, label="thin: without\nfirst tokens")
    dress(axes, "magnitude asked for, abs(x) ≥ (no unit)", "features that pass (count)")
    mark_magnitude(axes, rule.magnitude)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(steps, [number(step) for step in steps])
    most = max(max(counts) for counts in [*lines.values(), *without.values()])
    # room below 0, or the line of no features would lie half outside
    if most > 40:
        axes.set_yscale("symlog", linthresh=1, linscale=0.5)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_ylim(-0.15, most * 1.6)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylim(-0.05 * max(most, 1), 1.08 * max(most, 1))
    legend(axes)
    entitle(figure, axes, summary.model.id, "features at other magnitudes", criterion(rule))
    return Plot(
        "sweep.png",
        f"Features that pass at {rule.site} for magnitudes {number(min(steps))} to {number(max(steps))}, "
        f"by reading; {rule.reading} finds {passed} at {number(rule.magnitude)}.",
        png(figure),
    )


def sweep_lines(known: Sweep, site: AnySiteName) -> tuple[Lines, Lines]:
    """The counts of each reading at one site; and those without first tokens, where they differ from them."""
    counts, without = known.counts.get(site, {}), known.counts_without_first_tokens.get(site, {})
    lines = {reading: counts[reading] for reading in READINGS if reading in counts}
    return lines, {
        reading: without[reading] for reading in lines if without.get(reading, lines[reading]) != lines[reading]
    }


def positions(summary: StudySummary, tokens: Tokens) -> Plot | None:
    """Where in a sequence the systematic features are hit, a row a feature; None without one."""
    drawn = _position_rows(summary, tokens.features, "where the hits sit", criterion(summary.criteria))
    if drawn is None:
        return None
    features, data = drawn
    return Plot("positions.png", f"Histograms of the positions of hits for features {features}.", data)


def massive_positions(summary: StudySummary, tokens: Tokens) -> Plot | None:
    """Where in a sequence massive activations sit, a row a feature; None without one."""
    rows, below = tokens.massive_features, f"at resid: {MASSIVE_RULE} of the layer"
    drawn = _position_rows(summary, rows, "where massive activations sit", below)
    if drawn is None:
        return None
    features, data = drawn
    return Plot(
        "massive_positions.png", f"Histograms of the positions of massive activations for features {features}.", data
    )


def _position_rows(
    summary: StudySummary, rows: Sequence[TokenFeature | MassiveFeature], what: str, below: str
) -> tuple[str, bytes] | None:
    """The features that are drawn, as text, and the picture."""
    shown = [row for row in rows if any(row.positions.counts)][:MAX_POSITION_ROWS]
    if not shown:
        return None
    figure = new_figure(1.5 + 0.55 * max(len(shown), 2))
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, row in zip(grid, shown, strict=True):
        _position_row(axes, row, summary.corpus.sequence_length)
    bin_tokens = shown[0].positions.bin_tokens
    unit = "tokens" if bin_tokens == 1 else f"tokens, {bin_tokens} a bin"
    grid[-1].set_xlabel(f"position in the sequence ({unit})", fontsize=9.5, color=INK)
    figure.supylabel("feature", fontsize=9.5, color=INK)
    entitle(figure, grid[0], summary.model.id, what, below)
    return ", ".join(str(row.feature) for row in shown), png(figure)


def _position_row(axes: Axes, row: TokenFeature | MassiveFeature, sequence_length: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    counts = row.positions.counts
    edges = np.arange(len(counts) + 1) * row.positions.bin_tokens
    dress(axes, "", "")
    axes.stairs(counts, edges, fill=True, color=SITE_COLOURS["attn_in"])
    axes.set(xlim=(0, min(edges[-1], sequence_length)), ylim=(0, max(counts) * 1.08))
    label: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center", "labelpad": 10}
    axes.set_ylabel(str(row.feature), fontsize=9.5, fontweight="bold", color=INK, **label)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.tick_right()
