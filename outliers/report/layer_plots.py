"""Pictures with the layers on their axis: the largest magnitudes, each systematic feature on its way, kurtosis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outliers.report.content import Content, captured_layers, captured_sites, stream_sites
from outliers.report.figures import (
    MUTED,
    SITE_COLOURS,
    Plot,
    criterion,
    dress,
    entitle,
    finish,
    legend,
    mark_magnitude,
    new_figure,
    number,
    plain_log,
)
from outliers.results.schema import StudySummary
from outliers.spec import AnySiteName

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TRAJECTORIES = 10
"""Features that are drawn; more lines can't be told apart."""
RANK_STYLES = (("#0072b2", "o", "-"), ("#e08214", "s", "-"), ("#009e73", "^", "-"))
MEDIAN_COLOUR = "#667080"
LINE_COLOURS = (
    "#0072b2",
    "#e08214",
    "#009e73",
    "#8e44ad",
    "#b4232c",
    "#56b4e9",
    "#a6761d",
    "#cc79a7",
    "#1b9e77",
    "#666666",
)
Line = list[tuple[int, float]]
"""(layer, value) of the layers that have a value above zero, ascending."""


def largest_by_layer(content: Content) -> Plot | None:
    """The three largest features and the median of each layer, in the residual stream; None where nothing was finite."""
    summary, sites = content.summary, stream_sites(content.summary)
    ranks = _ranks(content, sites)
    if not ranks:
        return None
    figure = new_figure(3.7)
    axes = figure.subplots()
    names = ("largest feature", "second", "third")
    for (colour, marker, dash), name, line in zip(RANK_STYLES, names, ranks, strict=False):
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "linestyle": dash,
            "markersize": _marker(summary),
            "linewidth": 1.5,
        }
        axes.plot(*_xy(line), label=name, **style)
    for site, dash in zip(sites, ("-", ":"), strict=False):
        where = f" at {site}" if len(sites) > 1 else ""
        line = _column(summary, site, "median_magnitude")
        axes.plot(*_xy(line), color=MEDIAN_COLOUR, linewidth=1.6, linestyle=dash, label=f"median{where}")
    for site in sites if len(sites) == 1 else ():
        line = _column(summary, site, "mean_inf_norm")
        if line:
            axes.plot(*_xy(line), color=RANK_STYLES[0][0], linewidth=1.1, linestyle="--", label="mean of sequences")
    where = " and ".join(sites)
    dress(axes, "layer (0-based)", f"abs(x) at {where} (no unit)")
    plain_log(axes, "y")
    _layer_axis(axes, summary)
    legend(axes)
    entitle(figure, axes, summary.model.id, "largest magnitudes by layer", f"at {where}, over the whole corpus")
    layer, peak = max(ranks[0], key=lambda point: (point[1], -point[0]))
    return finish(
        "largest_by_layer.png",
        f"Lines over {len(captured_layers(summary))} layers at {where}: the {len(ranks)} largest features and the median. "
        f"The largest magnitude is {number(peak)}, in layer {layer}.",
        figure,
    )


def _ranks(content: Content, sites: Sequence[AnySiteName]) -> list[Line]:
    """A line for the largest, second and third feature. Of older studies the largest alone is known."""
    found: dict[int, dict[int, float]] = {}  # layer -> feature -> magnitude
    if content.pictures is None:
        for row in content.summary.layers:
            if row.site in sites and row.max_magnitude is not None:
                known = found.setdefault(row.layer, {0: 0.0})
                known[0] = max(known[0], row.max_magnitude)
    else:
        # the third largest feature of two sites together is among the three largest of one of them
        for own in content.pictures.layers:
            if own.site in sites:
                known = found.setdefault(own.layer, {})
                for item in own.largest:
                    known[item.feature] = max(known.get(item.feature, 0.0), abs(item.value))
    ordered = {layer: sorted(known.values(), reverse=True) for layer, known in sorted(found.items())}
    lines = [[(layer, sizes[rank]) for layer, sizes in ordered.items() if len(sizes) > rank] for rank in range(3)]
    return [line for line in ([point for point in line if point[1] > 0] for line in lines) if line]


def trajectories(content: Content) -> Plot | None:
    """Each systematic feature's largest magnitude by layer; None without such a feature, or where the values are unknown."""
    summary, pictures = content.summary, content.pictures
    passing = [row.feature for row in summary.systematic][:MAX_TRAJECTORIES]
    if pictures is None or not passing:
        return None
    rows = {row.feature: row for row in pictures.features if row.feature in passing}
    sites: list[AnySiteName] = [s for s in stream_sites(summary) if any(s in row.values for row in rows.values())]
    if not sites:
        return None
    layers = captured_layers(summary)
    figure = new_figure(3.6 if len(sites) == 1 else 5.4)
    panels = figure.subplots(len(sites), 1, sharex=True, squeeze=False)[:, 0]
    for axes, site in zip(panels, sites, strict=True):
        for colour, feature in zip(LINE_COLOURS, passing, strict=False):
            values = rows[feature].values[site] if feature in rows else []
            line = [(layer, abs(x)) for layer, x in zip(layers, values, strict=False) if x]
            style = {"color": colour, "marker": "o", "markersize": _marker(summary), "linewidth": 1.5}
            axes.plot(*_xy(line), label=str(feature), **style)
        axes.plot(*_xy(_column(summary, site, "median_magnitude")), color=MEDIAN_COLOUR, linewidth=1.4, label="median")
        mark_magnitude(axes, summary.criteria.magnitude, vertical=False)
        dress(axes, "layer (0-based)" if axes is panels[-1] else "", f"max abs(x) at {site}\n(no unit)")
        plain_log(axes, "y")
        _layer_axis(axes, summary)
    legend(panels[0])
    entitle(figure, panels[0], summary.model.id, "systematic features, layer by layer", criterion(summary.criteria))
    said = []
    for feature in passing[:3]:
        known = [(abs(x), layer) for layer, x in zip(layers, rows[feature].values[sites[0]], strict=False) if x]
        if known:
            said.append(f"feature {feature} is largest in layer {max(known)[1]}, {number(max(known)[0])}")
    alt = f"Lines of {len(passing)} systematic features over {len(layers)} layers at {' and '.join(sites)}: {'; '.join(said)}."
    return finish("trajectories.png", alt, figure)


def layer_curves(summary: StudySummary) -> Plot | None:
    """Largest magnitude and kurtosis of each layer, a line a site."""
    sites, layers = captured_sites(summary), captured_layers(summary)
    if not sites:
        return None
    figure = new_figure(5.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, key in ((upper, "max_magnitude"), (lower, "kurtosis")):
        for site in sites:
            style = {"color": SITE_COLOURS[site], "marker": "o", "markersize": _marker(summary)}
            axes.plot(*_xy(_column(summary, site, key)), label=site, linewidth=1.6, **style)
    _bulk_curves(upper, summary)
    mark_magnitude(upper, summary.criteria.magnitude, vertical=False)
    lower.axhline(3, color=MUTED, linewidth=1.2, linestyle="--", label="normal: 3")
    dress(upper, "", "max abs(x) (no unit)")
    dress(lower, "layer (0-based)", "Pearson kurtosis (no unit)")
    for axes in (upper, lower):
        plain_log(axes, "y")
        legend(axes)
    _layer_axis(lower, summary)
    entitle(figure, upper, summary.model.id, "layer by layer", criterion(summary.criteria))
    peak = max(summary.layers, key=lambda row: (row.max_magnitude or 0.0, -row.layer))
    return finish(
        "layer_curves.png",
        f"Curves over {len(layers)} layers for {', '.join(sites)}. The largest magnitude is "
        f"{number(peak.max_magnitude or 0.0)}, at {peak.site} of layer {peak.layer}.",
        figure,
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
        axes.plot(*_xy(line), color=SITE_COLOURS[site], linewidth=0.9, alpha=0.6)
    # one entry for all of them: their colours are those of the sites
    axes.plot([], [], color=MUTED, linewidth=0.9, label=f"thin: {max(levels) * 100:g}% quantile")


def _column(summary: StudySummary, site: AnySiteName, key: str) -> Line:
    """One number of each layer at a site."""
    known = [(row.layer, getattr(row, key) or 0.0) for row in summary.layers if row.site == site]
    return sorted((layer, value) for layer, value in known if value > 0)


def _xy(line: Line) -> tuple[list[int], list[float]]:
    return [layer for layer, _ in line], [value for _, value in line]


def _marker(summary: StudySummary) -> float:
    return 3.5 if len(captured_layers(summary)) <= 40 else 2


def _layer_axis(axes: Axes, summary: StudySummary) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = captured_layers(summary)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
