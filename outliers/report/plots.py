"""Plots: the numbers of one study as PNG bytes, each with an alternative text.

`draw` returns those that have data. It takes a study's files as the models of `results.schema`. It knows nothing of files,
HTML, how a number was counted, or how a figure becomes bytes (`figures`).
"""

from __future__ import annotations

import numpy as np

from outliers.report.content import Content, Floats, Ints
from outliers.report.figures import (
    DECIDING,
    DRAWING,
    MUTED,
    READING_STYLES,
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
from outliers.report.heat_map import heat_map
from outliers.report.layer_plots import largest_by_layer, layer_curves, trajectories
from outliers.report.token_plots import kinds, massive_positions, massive_surface, positions
from outliers.results.schema import StudySummary, Sweep
from outliers.spec import READINGS, SITES, AnySiteName, ReadingName

Lines = dict[ReadingName, list[int]]
"""A count for each magnitude of the ladder, by reading."""

SMALLEST = 2.0**-10
"""Magnitudes below are not drawn: bfloat16 has forty decades below it, which show nothing."""


def draw(content: Content) -> tuple[Plot, ...]:
    """The plots that have data, in the order of the report."""
    summary, tokens = content.summary, content.tokens
    with DRAWING:
        plots = [
            heat_map(content),
            trajectories(content),
            largest_by_layer(content),
            layer_curves(summary),
            magnitudes(summary),
            sweep(summary),
            positions(summary, tokens),
            kinds(content),
            massive_surface(summary),
            massive_positions(summary, tokens),
        ]
        return tuple(plot for plot in plots if plot is not None)


def magnitudes(summary: StudySummary) -> Plot | None:
    """Share of the values whose magnitude is at least x, log-log, a line a site; None where no value was counted."""
    from matplotlib.ticker import LogLocator

    known = {site: summary.histogram[site] for site in SITES if site in summary.histogram}
    lines = {site: tail(np.asarray(bins.counts), np.asarray(bins.lower_edges)) for site, bins in known.items()}
    lines = {site: line for site, line in lines.items() if line[0].size}
    if not lines:
        return None
    figure = new_figure(3.9)
    axes = figure.subplots()
    for site, (x, shares) in lines.items():
        axes.plot(x, shares, label=site, color=SITE_COLOURS[site], linewidth=1.6)
    magnitude = summary.criteria.magnitude
    dress(axes, "x (no unit)", "share of values with abs(x) ≥ x")
    mark_magnitude(axes, magnitude)
    plain_log(axes, "x")
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5), numticks=99))
    axes.set(xlim=axes.get_xlim(), ylim=(axes.get_ylim()[0], 1.5))
    axes.axvspan(magnitude, max(axes.get_xlim()[1], magnitude), color=DECIDING, alpha=0.05, linewidth=0)
    legend(axes)
    entitle(figure, axes, summary.model.id, "how many values are how large", criterion(summary.criteria))
    total = sum(sum(bins.counts) for bins in known.values())
    return finish(
        "magnitudes.png",
        f"Share of {total:,} values that reach each magnitude, at {', '.join(lines)}, with the magnitude {number(magnitude)} "
        "marked.",
        figure,
    )


def tail(counts: Ints, lower: Floats) -> tuple[Floats, Floats]:
    """(x, share of the values with a magnitude of at least x) at the lower edges of bins from SMALLEST on, where any is."""
    total = int(counts.sum())
    if not total:
        return np.zeros(0), np.zeros(0)
    above = counts[::-1].cumsum()[::-1]
    chosen = (lower >= SMALLEST) & (above > 0)
    return lower[chosen].astype(np.float64), above[chosen] / total


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
    return finish(
        "sweep.png",
        f"Features that pass at {rule.site} for magnitudes {number(min(steps))} to {number(max(steps))}, "
        f"by reading; {rule.reading} finds {passed} at {number(rule.magnitude)}.",
        figure,
    )


def sweep_lines(known: Sweep, site: AnySiteName) -> tuple[Lines, Lines]:
    """The counts of each reading at one site; and those without first tokens, where they differ from them."""
    counts, without = known.counts.get(site, {}), known.counts_without_first_tokens.get(site, {})
    lines = {reading: counts[reading] for reading in READINGS if reading in counts}
    return lines, {
        reading: without[reading] for reading in lines if without.get(reading, lines[reading]) != lines[reading]
    }
