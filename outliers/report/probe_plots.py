"""Pictures of a probe: what the model loses without some features, what formats cost, and which places are sensitive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from outliers.report.figures import DECIDING, INK, Plot, dress, entitle, finish, new_figure, number, plain_log, pt
from outliers.results.schema import Advice, Change, Probes
from outliers.spec import SITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 40
"""Bars of one picture; the costliest are shown."""
GROUP_COLOURS = {
    "systematic": "#b4232c",
    "each": "#d9777d",
    "matched": "#e08214",
    "random": "#7d8896",
    "given": "#0072b2",
    "control": "#7d8896",
    "super": "#b4232c",
    "load": "#e08214",
}
OTHER_COLOUR = "#0072b2"


def draw_probe(probes: Probes, rows: Sequence[Mapping[str, Any]], advice: Advice) -> tuple[Plot, ...]:
    """The pictures of a probe, in the order of its page; those without data are left out."""
    found = (
        causes(probes),
        draw_experts(probes),
        formats(probes, advice),
        sensitivity(probes, rows),
        draw_expert_map(probes),
    )
    return tuple(plot for plot in found if plot)


def causes(probes: Probes) -> Plot | None:
    """Bars of the perplexity without some features or weights, with the controls; None where nothing was taken out."""
    changes = [change for change in probes.changes if change.kind in ("zero", "mean", "weight")]
    changes = sorted(changes, key=lambda change: -change.perplexity)[:MAX_BARS]
    if not changes:
        return None
    return _perplexities(probes, changes, "perplexity without some features", "causes.png")


def draw_experts(probes: Probes) -> Plot | None:
    """Bars of the perplexity without experts, each with its controls; None where no expert was silenced."""
    changes = [change for change in probes.changes if change.kind == "silence"][:MAX_BARS]
    if not changes:
        return None
    return _perplexities(probes, changes, "perplexity without experts", "experts.png")


def _perplexities(probes: Probes, changes: list[Change], title: str, name: str) -> Plot:
    """Bars of the perplexity under some changes, from the first down, with a line where nothing is changed."""
    figure = new_figure(1.3 + 0.24 * len(changes))
    axes = figure.subplots()
    values = [change.perplexity for change in changes]
    colours = [GROUP_COLOURS.get(change.group, OTHER_COLOUR) for change in changes]
    _bars(axes, values, [change.perplexity_interval for change in changes], colours)
    axes.set_yticks(range(len(changes)), [_label(change) for change in changes])
    axes.axvline(probes.reference.perplexity, color=DECIDING, linewidth=1.2, linestyle="--")
    axes.set_xlim(left=0.9 * min([probes.reference.perplexity, *values]))
    entitle(figure, axes, probes.model, title, f"dashed: untouched. {_measured(probes)}")
    dress(axes, "perplexity (log scale)", "")
    plain_log(axes, "x")
    worst = max(changes, key=lambda change: change.perplexity)
    alt = f"Bars of {len(changes)} changes; the largest perplexity is {number(worst.perplexity)}, {_label(worst)}."
    return finish(name, alt, figure)


def formats(probes: Probes, advice: Advice) -> Plot | None:
    """Bars of the KL of each format at all sites, with its repairs; None where no format was tried."""
    changes = [change for change in probes.changes if change.kind in ("quantize", "experts") and change.kl > 0]
    changes = sorted(changes, key=lambda change: -change.kl)[:MAX_BARS]
    if not changes:
        return None
    figure = new_figure(1.3 + 0.24 * len(changes))
    axes = figure.subplots()
    colours = [_format_colour(change) for change in changes]
    _bars(axes, [change.kl for change in changes], [change.kl_interval for change in changes], colours)
    axes.set_yticks(range(len(changes)), [_label(change) for change in changes])
    axes.axvline(advice.budget, color=DECIDING, linewidth=1.2, linestyle="--")
    floor = 2 * advice.floor
    axes.set_xlim(left=0.5 * min([*(change.kl for change in changes), advice.budget]))
    if floor > 0:
        axes.axvspan(axes.get_xlim()[0], max(floor, axes.get_xlim()[0]), color="#eceef1", zorder=0)
    below = f"dashed: the budget, {number(advice.budget)}; grey: not distinguishable. {_measured(probes)}"
    entitle(figure, axes, probes.model, "what each format costs", below)
    dress(axes, "KL to the untouched model, nats a token (log scale)", "")
    plain_log(axes, "x")
    alt = f"Bars of {len(changes)} formats; the costliest is {_label(changes[0])} with KL {number(changes[0].kl)}."
    return finish("formats.png", alt, figure)


def sensitivity(probes: Probes, rows: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Site by layer: the measured KL of one format at one place; None without a map."""
    measured = [row for row in rows if row["kl"] is not None]
    if not measured:
        return None
    from matplotlib.colors import LogNorm

    sites = [site for site in SITES if any(row["site"] == site for row in measured)]
    layers = sorted({int(row["layer"]) for row in measured})
    values = np.full((len(sites), len(layers)), np.nan)  # (site, layer); NaN: not measured
    for row in measured:
        values[sites.index(row["site"]), layers.index(row["layer"])] = max(row["kl"], 0.0)
    floor = max(2 * (probes.gates.floor.value or 0.0), float(np.nanmax(values)) * 1e-4, 1e-12)
    figure = new_figure(1.3 + 0.42 * len(sites))
    axes = figure.subplots()
    norm = LogNorm(floor, max(float(np.nanmax(values)), floor * 10))
    image = axes.imshow(np.maximum(values, floor), aspect="auto", cmap="YlOrRd", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=12)
    bar.set_label("KL, nats a token", fontsize=pt(9), color=INK)
    bar.ax.tick_params(labelsize=pt(8), colors=INK, length=2)
    bar.outline.set_visible(False)
    entitle(figure, axes, probes.model, f"{measured[0]['format']} at one place alone", _measured(probes))
    dress(axes, "layer (0-based)", "")
    axes.grid(False)
    axes.set_yticks(range(len(sites)), sites)
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    worst = max(measured, key=lambda row: row["kl"])
    alt = (
        f"Heat map of {len(sites)} sites over {len(layers)} layers; the largest KL is {number(worst['kl'])}, at {worst['site']} "
        f"of layer {worst['layer']}."
    )
    return finish("sensitivity.png", alt, figure)


def draw_expert_map(probes: Probes) -> Plot | None:
    """Bars of the KL where the input of one expert alone is quantized, the costliest first; None where no expert was."""
    mapped = [change for change in probes.changes if change.kind == "map" and change.experts]
    shown = sorted(mapped, key=lambda change: -change.kl)[:MAX_BARS]
    if not shown or not shown[0].kl > 0:
        return None
    shown = [change for change in shown if change.kl > 0]
    figure = new_figure(1.3 + 0.24 * len(shown))
    axes = figure.subplots()
    labels = [f"{change.experts[0]}, {change.expert_tokens[0]:,} tokens" for change in shown]
    _bars(axes, [change.kl for change in shown], [change.kl_interval for change in shown], [OTHER_COLOUR] * len(shown))
    axes.set_yticks(range(len(shown)), labels)
    if probes.gates.floor.value:
        axes.axvline(2 * probes.gates.floor.value, color=DECIDING, linewidth=1.2, linestyle="--")
    some = f"the {len(shown)} costliest of {len(mapped):,} experts; " if len(mapped) > len(shown) else ""
    note = f"{some}dashed: twice the floor. {_measured(probes)}"
    entitle(figure, axes, probes.model, f"{shown[0].format} at the input of one expert alone", note)
    dress(axes, "KL, nats a token (log scale)", "")
    axes.set_xscale("log")
    alt = f"Bars of {len(shown)} experts; the largest KL is {number(shown[0].kl)}, expert {shown[0].experts[0]}."
    return finish("expert_map.png", alt, figure)


def _bars(axes: Axes, values: Sequence[float], spans: Sequence[Sequence[float] | None], colours: Sequence[str]) -> None:
    """Horizontal bars, the first on top, with a line from end to end of each interval."""
    places = np.arange(len(values))
    axes.barh(places, values, color=list(colours), height=0.66)
    for place, span in zip(places.tolist(), spans, strict=True):
        if span is not None:
            axes.plot([max(span[0], 1e-12), max(span[1], 1e-12)], [place, place], color=INK, linewidth=1.1)
    axes.invert_yaxis()


def _label(change: Change) -> str:
    name = "".join(char if " " <= char <= "~" else "?" for char in change.name)
    return name if len(name) <= 44 else f"{name[:43]}…"


def _format_colour(change: Change) -> str:
    if change.kind == "experts":
        return "#8a8f98"
    return "#7cb5dd" if _repair(change) else "#0072b2"


def _repair(change: Change) -> bool:
    return bool(change.held or change.smooth is not None or change.prefix or (change.format or "").startswith("had"))


def _measured(probes: Probes) -> str:
    return f"{probes.tokens:,} tokens of {probes.sequences:,} sequences, {probes.dtype}"
