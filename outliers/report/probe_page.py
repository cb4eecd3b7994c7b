"""The page of a probe: the verdict, the table of formats, what the model depends on, the gates. It loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from outliers.report.page import render_template
from outliers.report.probe_plots import draw_probe
from outliers.results.schema import Advice, Probes

CAPTIONS = {
    "formats.png": "KL of the model's predictions where a format is used at all sites, dark, and with what repairs it, light; "
    "grey: at the experts' inputs alone. "
    "A line is the middle 95% over resamples of the sequences.",
    "causes.png": "Perplexity where features are set to zero or to their mean in all layers, or one weight is zero. Red: "
    "systematic; orange: as many others of the largest magnitude; grey: random ones, the control.",
    "experts.png": "Perplexity where experts are silent: their routing weight is 0. Red: super experts; blue: experts that "
    "were named; orange: one of the same layer with the nearest number of tokens; grey: a random one of the same layer.",
    "sensitivity.png": "KL where one site of one layer alone is quantized. What is below twice the floor has the "
    "lightest colour.",
    "expert_map.png": "KL where what one expert gets is quantized, LAYER.EXPERT with the tokens of the probe that reach it; all "
    "else of these tokens is as it was.",
}
VERDICTS = {
    "within": "within budget",
    "beyond": "beyond budget",
    "unclear": "too close to tell",
    "indistinguishable": "not distinguishable",
}
MAX_ROWS = 200


def make_probe_page(probes: Probes, rows: Sequence[Mapping[str, Any]], advice: Advice) -> bytes:
    """probe.html from the checked numbers of a probe and its verdict."""
    plots = [
        (CAPTIONS[plot.name], plot.alt, base64.b64encode(plot.png).decode())
        for plot in draw_probe(probes, rows, advice)
    ]
    values = {
        "probes": probes,
        "advice": advice,
        "verdicts": VERDICTS,
        "plots": plots,
        "changes": probes.changes[:MAX_ROWS],
        "left_out": max(0, len(probes.changes) - MAX_ROWS),
    }
    return render_template("probe.html", values, {"kl": _kl, "span": _span}).encode("utf-8", "replace")


def _kl(value: float | None) -> str:
    """A KL for people: three digits, never 0 for what is not."""
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.3g}"


def _span(ends: Sequence[float] | None) -> str:
    """`0.031 to 0.042`; nothing where there is no interval."""
    return "" if ends is None else " to ".join(f"{end:,.0f}" if end >= 1000 else f"{end:.3g}" for end in ends)
