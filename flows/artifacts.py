"""The artifacts of a finished study in the Prefect UI: the table, the plots, a link. No activations and no secrets."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from urllib.parse import quote

from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact

from outliers.publish.outcome import Outcome
from outliers.untrusted.visible import code
from outliers.untrusted.visible import markdown as plain

TABLE_ROWS = 50
_WORDS = re.compile(r"[A-Za-z0-9_,: ]+")
_URL = ":/?#@!$&'*+,;=%~"
"""Characters that stay as they are in a link; brackets and spaces would end it in Markdown."""


def show_outcome(outcome: Outcome, folder: Path) -> None:
    """Create the artifacts of a study."""
    title = plain(outcome.title)
    create_markdown_artifact(markdown(outcome), key=f"study-{outcome.study_id}", description=title)
    for plot in sorted((folder / "plots").glob("*.png")):
        data = base64.b64encode(plot.read_bytes()).decode()
        create_image_artifact(
            image_url=f"data:image/png;base64,{data}",
            key=f"{plot.stem.replace('_', '-')}-{outcome.study_id}",
            description=f"{title}: {plain(plot.stem.replace('_', ' '))}",
        )
    if outcome.published:
        create_link_artifact(
            link=quote(outcome.published, safe=_URL),
            # no browser opens s3:// or file:// from a page, so the text is the address, to be copied
            link_text=plain(outcome.published),
            key=f"manifest-{outcome.study_id}",
            description=title,
        )


def markdown(outcome: Outcome) -> str:
    """The answer and the table of systematic features, as Markdown; the page has the title above it already."""
    count = len(outcome.systematic)
    lines = [f"# {count} systematic outlier feature{'' if count == 1 else 's'}", ""]
    said = outcome.disagreement[:1].upper() + outcome.disagreement[1:]
    # the words of `answer` alone: an underscore within a word is not emphasis
    lines += [f"**{said if _WORDS.fullmatch(said) else plain(said)}**", ""] if said else []
    if outcome.cached:
        lines += ["The study was there already: nothing was run.", ""]
    if outcome.systematic:
        lines += [
            "| feature | max magnitude | min | max | % of layers | % of tokens | sequences |",
            "|--:|--:|--:|--:|--:|--:|--:|",
        ]
        lines += [_row(feature) for feature in outcome.systematic[:TABLE_ROWS]]
    if count > TABLE_ROWS:
        lines += ["", f"and {count - TABLE_ROWS} more: see report.html"]
    for text in outcome.remarks():
        lines += ["", plain(text)]
    if outcome.verdict:
        lines += ["", "## What can be quantized", "", plain(outcome.verdict)]
    places = [f"- report: {code(outcome.report)}", f"- results: {code(outcome.results)}"]
    places += [f"- probe: {code(outcome.probe)}"] if outcome.probe else []
    places += [f"- published: {code(outcome.published)}"] if outcome.published else []
    ids = f"Study {code(outcome.study_id)}, capture {code(outcome.capture_id)}"
    return "\n".join([*lines, "", ids, "", *places])


def _row(feature: dict[str, float]) -> str:
    share = feature["position_fraction"]
    return (
        f"| {feature['feature']:d} | {feature['max_magnitude']:g} | {feature['min']:g} | {feature['max']:g} "
        f"| {100 * feature['layer_fraction']:.1f} | {'' if share is None else f'{100 * share:.1f}'} "
        f"| {feature['sequences']}/{feature['of_sequences']} |"
    )
