"""The page of a finished study in the Prefect UI: one Markdown artifact with the answer, the table, pictures and where the report
is. No activations and no secrets.

Prefect shows an artifact under its key, and artifacts of one key as versions of each other. So the key says what the page is
about, and ends with the study's id. Pictures are within the page, as data: URLs: no server is asked for them.
"""

from __future__ import annotations

import base64
import re
import shlex
from pathlib import Path

from prefect.artifacts import create_markdown_artifact

from flows.run_names import corpus_name
from outliers.publish.outcome import Outcome
from outliers.publish.stores.links import web_link
from outliers.study.prepare import Prepared
from outliers.units import plural
from outliers.untrusted.visible import code
from outliers.untrusted.visible import markdown as plain

TABLE_ROWS = 50
PICTURES = {
    "heatmap": "The largest magnitude of each feature in each layer",
    "layer_curves": "The activations, layer by layer",
}
"""Pictures of a study's results that its page shows, by their file's name."""
KEY_CHARS = 60
_WORDS = re.compile(r"[A-Za-z0-9_,: ]+")
_NOT_IN_KEYS = re.compile(r"[^a-z0-9]+")
_OPENS = re.compile(r"https?://[^\s<>()\[\]]+")
"""An address that a browser opens from a page, and that Markdown takes as it is."""


def show_outcome(outcome: Outcome, prepared: Prepared, folder: Path) -> None:
    """Create the artifact of a study. `folder`: its results."""
    create_markdown_artifact(
        study_page(outcome, prepared, folder),
        key=page_key(outcome, prepared),
        description=f"{plain(outcome.title)}: {_count(outcome)}",
    )


def page_key(outcome: Outcome, prepared: Prepared) -> str:
    """`smollm2-135m-instruct-8x512-python-docs-0123456789abcdef`: small letters, digits and dashes."""
    said = f"{outcome.title} {corpus_name(prepared.spec.corpus)}"
    return f"{_NOT_IN_KEYS.sub('-', said.lower())[:KEY_CHARS].strip('-')}-{outcome.study_id}".strip("-")


def study_page(outcome: Outcome, prepared: Prepared, folder: Path) -> str:
    """The whole page of a study, as Markdown; Prefect has the artifact's description above it."""
    lines = [markdown(outcome), ""]
    for name, caption in PICTURES.items():
        picture = folder / "plots" / f"{name}.png"
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode()
            lines += [f"## {caption}", "", f"![{caption}](data:image/png;base64,{data})", ""]
    lines += ["## What was looked for", "", _criteria(prepared), "", "## What was read", "", *_read(prepared), ""]
    lines += [
        "## Report",
        "",
        *_places(outcome),
        "",
        f"Study {code(outcome.study_id)}, capture {code(outcome.capture_id)}",
    ]
    return "\n".join(lines)


def markdown(outcome: Outcome) -> str:
    """The answer and the table of systematic features, as Markdown."""
    count = len(outcome.systematic)
    lines = [f"# {_count(outcome)}", ""]
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
    return "\n".join(lines)


def _count(outcome: Outcome) -> str:
    return _some(len(outcome.systematic), "systematic outlier feature")


def _some(count: int, noun: str) -> str:
    return f"{count:,} {noun}{plural(count)}"


def _row(feature: dict[str, float]) -> str:
    share = feature["position_fraction"]
    return (
        f"| {feature['feature']:d} | {feature['max_magnitude']:g} | {feature['min']:g} | {feature['max']:g} "
        f"| {100 * feature['layer_fraction']:.1f} | {'' if share is None else f'{100 * share:.1f}'} "
        f"| {feature['sequences']}/{feature['of_sequences']} |"
    )


def _criteria(prepared: Prepared) -> str:
    rule = prepared.spec.criteria
    return plain(
        f"Features whose magnitude is at least {rule.magnitude:g} in at least {100 * rule.layer_fraction:g}% of "
        f"{len(prepared.layers)} layers and {100 * rule.position_fraction:g}% of {prepared.corpus.num_tokens:,} tokens, at "
        f"{prepared.site}, by the reading {rule.reading}."
    )


def _read(prepared: Prepared) -> list[str]:
    """A table of the model and the corpus."""
    model, corpus = prepared.model, prepared.corpus
    sequences, documents = _some(corpus.num_sequences, "sequence"), _some(corpus.num_documents, "document")
    rows = {
        "model": f"{model.source.name}, {model.num_layers} layers, computed in {model.dtype}",
        "revision": model.source.revision[:12],
        "corpus": corpus_name(prepared.spec.corpus),
        "tokens": f"{corpus.num_tokens:,}, in {sequences} of {documents}",
        "sites": ", ".join(prepared.spec.capture.sites),
    }
    head, *rest = [f"| {name} | {plain(said)} |" for name, said in rows.items()]
    return [head, "|:--|:--|", *rest]


def _opens(published: str) -> str | None:
    """The address at which a browser shows what is published; None where none does."""
    address = web_link(published.rpartition("/")[0] if published.startswith("hf://") else published)
    return address if address and _OPENS.fullmatch(address) else None


def _places(outcome: Outcome) -> list[str]:
    """Where the report is: a link where a browser can follow it, else what to do."""
    lines = []
    if outcome.published and (address := _opens(outcome.published)):
        lines += [f"[{plain(outcome.published)}]({address})", ""]
    elif outcome.published:
        command = f"outliers runs show {shlex.quote(outcome.published)}"
        lines += [
            f"Published as {code(outcome.published)}. Browsers do not open such an address; in a terminal: {code(command)}",
            "",
        ]
    lines.append(
        f"The page with every plot and list is a file of the machine that ran this: {code(outcome.report)}. Open it there."
    )
    lines += ["", f"Its newest probe: {code(outcome.probe)}"] if outcome.probe else []
    return lines
