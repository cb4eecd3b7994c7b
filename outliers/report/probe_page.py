"""The page of a probe, and the section about it in the study's report: the verdict, the table of formats, what the model
depends on. Both load nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from outliers.report.figures import Plot, page_image
from outliers.report.page import render_template
from outliers.report.probe_plots import causes, draw_experts, draw_probe, formats
from outliers.results.schema import Advice, Change, FormatVerdict, Probes

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
MAX_PREFIX_ROWS = 40
MAX_NAMED = 4
"""Formats that the line among the contents names."""


@dataclass(frozen=True)
class PrefixRow:
    """A change, and the same change with tokens before each sequence, which is the second of each pair."""

    name: str
    tokens: str
    kl: tuple[float | None, float]
    perplexity: tuple[float, float]


@dataclass(frozen=True)
class ProbeSection:
    """What the study's report says of a probe. plots: caption, text for those who don't see it, and PNG as base64."""

    probes: Probes
    advice: Advice
    plots: tuple[tuple[str, str, str], ...]
    prefixes: tuple[PrefixRow, ...]
    others: int

    @property
    def line(self) -> str:
        """The answer in one line: which formats are within the budget, alone and at all sites that were tried."""
        return _answer_line(self.advice)


def _answer_line(advice: Advice) -> str:
    tried = [one for one in advice.formats if one.verdict is not None]
    if not tried:
        return "no format was tried at all sites together."
    good = [one for one in tried if _fits(advice, one.verdict, one.confirmed_kl)]
    others = [one for one in tried if one not in good]
    # the first repair is the best one
    mended = [one for one in others if one.repairs and _fits(advice, one.repairs[0].verdict, one.repairs[0].kl)]
    left = [one for one in others if one not in mended]
    beyond = sum(one.verdict == "beyond" for one in left)
    close = len(left) - beyond
    budget = f"within {advice.budget:g} nats a token"
    names = [_format_name(one) for one in good[:MAX_NAMED]]
    more = f" and {len(good) - MAX_NAMED} more" if len(good) > MAX_NAMED else ""
    said = [f"{', '.join(names)}{more} {budget}" if good else f"no format alone is {budget}"]
    if good and not others:
        said[0] += ", all that were tried"
    said += [f"{_format_name(one)} is with {one.repairs[0].what}" for one in mended[:MAX_NAMED]]
    if good and beyond:
        said.append(f"{beyond} more {'is' if beyond == 1 else 'are'} beyond it")
    if close:
        said.append(f"{close} too close to tell")
    return "; ".join(said) + "."


def _fits(advice: Advice, verdict: str | None, kl: float | None) -> bool:
    """Whether a format is within the budget. What can't be told from rounding is, where its KL is."""
    return verdict == "within" or (verdict == "indistinguishable" and kl is not None and kl <= advice.budget)


def _format_name(one: FormatVerdict) -> str:
    return one.format if one.weights is None else f"{one.format} with {one.weights} weights"


def probe_section(probes: Probes, advice: Advice, others: int = 0) -> ProbeSection:
    """The section of the report about a probe. others: how many more probes the study has."""
    found = (causes(probes), draw_experts(probes), formats(probes, advice))
    plots = tuple((CAPTIONS[plot.name], plot.alt, page_image(plot.png)) for plot in found if plot)
    return ProbeSection(probes, advice, plots, tuple(prefix_rows(probes)), others)


def probe_figures(probes: Probes, rows: Sequence[Mapping[str, Any]], advice: Advice) -> tuple[tuple[Plot, str], ...]:
    """The pictures of a probe with their captions, each under the name `probe_...`, in the look of now."""
    drawn = draw_probe(probes, rows, advice)
    return tuple((replace(plot, name=f"probe_{plot.name}"), CAPTIONS[plot.name]) for plot in drawn)


def prefix_rows(probes: Probes) -> list[PrefixRow]:
    """What tokens before each sequence do: alone, and with each format that was tried with and without them."""
    plain = {_without_prefix(change): change for change in probes.changes if not change.prefix}
    found = []
    for change in probes.changes:
        if not change.prefix:
            continue
        if change.kind == "prefix":
            before: tuple[float | None, float] = (None, probes.reference.perplexity)
            name = "nothing else"
        else:
            same = plain.get(_without_prefix(change))
            if same is None:
                continue
            before, name = (same.kl, same.perplexity), same.name
        tokens = ", ".join(map(str, change.prefix))
        found.append(PrefixRow(name, tokens, (before[0], change.kl), (before[1], change.perplexity)))
    return found[:MAX_PREFIX_ROWS]


def _without_prefix(change: Change) -> str:
    """What a change is, apart from the tokens before each sequence and from what was measured."""
    named = ("kind", "sites", "layers", "features", "format", "weights", "held", "range", "smooth", "weight", "value")
    return repr([getattr(change, name) for name in named])


def make_probe_page(probes: Probes, rows: Sequence[Mapping[str, Any]], advice: Advice, published: str = "") -> bytes:
    """probe.html from the checked numbers of a probe and its verdict. published: what is published in the place of names."""
    plots = [(CAPTIONS[plot.name], plot.alt, page_image(plot.png)) for plot in draw_probe(probes, rows, advice)]
    values = {
        "probes": probes,
        "advice": advice,
        "verdicts": VERDICTS,
        "published": published,
        "plots": plots,
        "changes": probes.changes[:MAX_ROWS],
        "left_out": max(0, len(probes.changes) - MAX_ROWS),
    }
    return render_template("probe.html", values, FILTERS).encode("utf-8", "replace")


def _kl(value: float | None) -> str:
    """A KL for people: three digits, never 0 for what is not."""
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.3g}"


def _span(ends: Sequence[float] | None) -> str:
    """`0.031 to 0.042`; nothing where there is no interval."""
    return "" if ends is None else " to ".join(f"{end:,.0f}" if end >= 1000 else f"{end:.3g}" for end in ends)


FILTERS: dict[str, Callable[..., str]] = {"kl": _kl, "span": _span}
"""The formatters of a verdict, besides those of every page."""
