"""A study as a block for a model card: YAML for the front matter, and Markdown for the body.

In: what a published study consists of, its manifest and summary.json, and the verdict of a probe. Everything in it is
published, so that nothing private can be in a card. It knows no store and no folder; `card_metadata` makes the YAML.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from outliers.report.card_metadata import front_matter
from outliers.report.figures import number, percent
from outliers.report.reproduce import command_of
from outliers.results.answer import (
    crowded,
    disagreement,
    perplexity_words,
    range_words,
    reading_counts,
    resampled,
    share_words,
)
from outliers.results.citations import citations
from outliers.results.expert_words import expert_lines
from outliers.results.schema import Advice, CriteriaBlock, FormatVerdict, StudySummary
from outliers.spec import BLOCK, DTYPE_ALIASES, LOCAL_PREFIX, StudySpec
from outliers.units import plural
from outliers.untrusted.visible import code, markdown

MAX_FEATURES = 20
"""Rows of the table of features; a card is short."""
MAX_FORMATS = 16
VERSIONS = ("outlier-features", "torch", "transformers")


@dataclass(frozen=True)
class Card:
    """A model card's two parts; `text` is both, as a README has them."""

    front_matter: str
    body: str

    @property
    def text(self) -> str:
        """The front matter between its two lines of dashes, and the body."""
        return f"---\n{self.front_matter}---\n\n{self.body}"


def make_card(
    summary: StudySummary, manifest: Mapping[str, Any], advice: Advice | None = None, url: str | None = None
) -> Card:
    """The card of a study.

    manifest: of the same study. advice: the verdict of a probe of it. url: where it is published, which is linked where a
    browser opens it.
    """
    spec, asked = card_spec(summary, manifest["spec"])
    part = _corpus_part(spec) if asked else {}
    link = url if url is not None and url.startswith(("https://", "http://")) else None
    parts = [
        "## Activation outliers",
        _measured(summary, part),
        *_answer(summary),
        *_feature_table(summary),
        *_more(summary),
        *([] if advice is None else _verdict(advice)),
        *_notes(summary),
        "### How to reproduce",
        _reproduce(spec, manifest, asked=asked),
        *_ids(summary, manifest, advice, link),
        "### References",
        "```bibtex\n" + "\n\n".join(citations(summary, advice)) + "\n```",
    ]
    return Card(front_matter(summary, part, advice, link), "\n\n".join(parts) + "\n")


def card_spec(summary: StudySummary, public: Mapping[str, Any]) -> tuple[StudySpec, bool]:
    """What was asked for, and whether the manifest says so; else what of it summary.json says, the rest at its default."""
    with contextlib.suppress(ValidationError):
        return StudySpec.model_validate(public), True
    rule, corpus, dtype = summary.criteria, summary.corpus, summary.model.dtype
    known = {
        "model": {
            "id": summary.model.id,
            "revision": summary.model.revision,
            "dtype": dtype if dtype in DTYPE_ALIASES.values() else "auto",
        },
        "corpus": {
            "source": corpus.source,
            "num_sequences": max(corpus.num_sequences, 1),
            "sequence_length": max(corpus.sequence_length, 2),
        },
        "capture": {"sites": [site for site in rule.sites if site != BLOCK]},
        "criteria": {
            name: getattr(rule, name)
            for name in ("magnitude", "layer_fraction", "position_fraction", "reading", "site", "ladder")
        },
    }
    return StudySpec.model_validate(known), False


def _measured(summary: StudySummary, corpus_part: Mapping[str, str]) -> str:
    model, corpus = summary.model, summary.corpus
    kind = ", ".join(
        part
        for part in (
            markdown(model.architecture),
            f"{model.num_layers:,} layers of {model.hidden_size:,} features",
            markdown(model.dtype),
            None if model.quantization is None else markdown(model.quantization),
            None if model.num_experts is None else f"{model.num_experts:,} experts a layer",
        )
        if part
    )
    read = sorted({row.layer for row in summary.layers})
    layers = "every layer" if len(read) == model.num_layers else f"{len(read):,} of the layers"
    part = ", ".join(f"{name} {code(value)}" for name, value in corpus_part.items())
    sites = ", ".join(code(site) for site in summary.criteria.sites)
    return (
        f"{code(model.id)} ({kind}) read {corpus.num_sequences:,} sequences, {corpus.num_tokens:,} tokens in all, of "
        f"{code(corpus.source)}{f' ({part})' if part else ''}. The activations of {layers} were counted at {sites}: all of them, "
        "without a sample."
    )


def _corpus_part(spec: StudySpec) -> dict[str, str]:
    """Which part of a data set of the hub was read."""
    corpus = spec.corpus
    if not _on_hub(corpus.source):
        return {}
    named = {"subset": corpus.subset, "split": corpus.split, "revision": corpus.corpus_revision}
    return {name: value for name, value in named.items() if value is not None}


def _answer(summary: StudySummary) -> list[str]:
    count, ends = len(summary.systematic), resampled(summary)
    others = disagreement(reading_counts(summary))
    said = f"**{count:,} systematic outlier feature{plural(count)}** by {_rule(summary.criteria)}."
    said += f" {range_words(*ends).capitalize()}, which is no confidence interval." if ends else ""
    said += f" {markdown(others[:1].upper() + others[1:])}." if others else ""
    crowd = crowded(summary)
    return [said, *([] if crowd is None else [markdown(crowd) + "."])]


def _rule(rule: CriteriaBlock) -> str:
    return (
        f"the reading {code(rule.reading)} at {code(rule.site)}: abs(x) ≥ {number(rule.magnitude)} in at least "
        f"{percent(rule.layer_fraction)} of the layers and {percent(rule.position_fraction)} of the tokens"
    )


def _feature_table(summary: StudySummary) -> list[str]:
    found = summary.systematic
    if not found:
        return []
    ends = share_words(summary)
    lines = [
        f"| feature | largest abs(x) | layers | tokens | {ends} | passes in resamples |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found[:MAX_FEATURES]:
        own = row.interval
        span = (
            None if own is None or own.position_fraction is None else " to ".join(map(percent, own.position_fraction))
        )
        cells = (
            f"{row.feature}",
            number(row.max_magnitude),
            percent(row.layer_fraction),
            None if row.position_fraction is None else percent(row.position_fraction),
            span,
            None if own is None else percent(own.passes),
        )
        lines.append("| " + " | ".join(cell or "–" for cell in cells) + " |")
    rest = len(found) - MAX_FEATURES
    return ["\n".join(lines), *([f"and {rest:,} smaller ones"] if rest > 0 else [])]


def _more(summary: StudySummary) -> list[str]:
    """Massive activations, perplexity and experts, each where it was read."""
    found = []
    if summary.massive is not None:
        count = summary.massive_count or len(summary.massive)
        said = (
            f"Massive activations at `resid` (abs(x) > 100 and at least 1,000 times the median of its layer): {count:,}"
        )
        if summary.massive:
            top = max(summary.massive, key=lambda row: abs(row.value))
            said += f"; the largest is {number(top.value)}, feature {top.feature} of layer {top.layer}"
        found.append(f"- {said}.")
    if summary.perplexity is not None:
        said = markdown(perplexity_words(summary.perplexity))
        found.append(f"- {said[:1].upper() + said[1:]}, of this corpus with the model's own tokenizer.")
    found += [f"- Experts: {markdown(text)}." for text in expert_lines(summary.experts)]
    return ["\n".join(found)] if found else []


def _verdict(advice: Advice) -> list[str]:
    """What quantizing costs: the verdict in words, and a row for each format that was tried."""
    parts = ["### What can be quantized", markdown(advice.paragraph)]
    tried = [item for item in advice.formats if item.confirmed_kl is not None]
    if tried:
        lines = ["| activations | weights | KL, nats a token | perplexity | verdict |", "|:--|:--|--:|--:|:--|"]
        parts.append("\n".join(lines + [_format_row(item) for item in tried[:MAX_FORMATS]]))
        parts.append(
            f"KL of the next-token distributions from those of the untouched model (perplexity {advice.perplexity:.4g}), over "
            f"{advice.tokens:,} tokens of {code(advice.corpus)}. The verdict is against a budget of {advice.budget:g} nats."
        )
    return parts


def _format_row(item: FormatVerdict) -> str:
    span = "" if item.confirmed_interval is None else " ({:.3g} to {:.3g})".format(*item.confirmed_interval)
    perplexity = "–" if item.perplexity is None else f"{item.perplexity:.4g}"
    weights = "as they are" if item.weights is None else code(item.weights)
    return f"| {code(item.format)} | {weights} | {item.confirmed_kl:.3g}{span} | {perplexity} | {item.verdict or '–'} |"


def _notes(summary: StudySummary) -> list[str]:
    return ["\n".join(f"- Note: {markdown(text)}" for text in summary.notes)] if summary.notes else []


def _reproduce(spec: StudySpec, manifest: Mapping[str, Any], *, asked: bool) -> str:
    """The command, and what to know of it."""
    own = {
        field: "./YOUR-MODEL" if field[0] == "model" else "./YOUR-TEXT"
        for field, name in ((("model", "id"), spec.model.id), (("corpus", "source"), spec.corpus.source))
        if name.startswith(LOCAL_PREFIX)
    }
    versions = manifest["provenance"].get("versions")
    known = [] if not isinstance(versions, Mapping) else [f"{n} {versions[n]}" for n in VERSIONS if n in versions]
    said = [f"Made with {markdown(', '.join(known))}."] if known else []
    if not asked:
        said.append(
            "The manifest does not say what was asked for: options that the results do not tell are the defaults."
        )
    if own:
        said.append("What the command calls YOUR is not public: the ids below say whether yours is the same.")
    said.append("Equal inputs give equal ids, and an equal `results_digest`.")
    return f"```sh\n{command_of(spec, own)}\n```\n\n{' '.join(said)}"


def _on_hub(name: str) -> bool:
    return not name.startswith((LOCAL_PREFIX, "builtin:"))


def _ids(summary: StudySummary, manifest: Mapping[str, Any], advice: Advice | None, link: str | None) -> Sequence[str]:
    label = manifest["spec"].get("label")
    rows = {
        "study_id": summary.study_id,
        "capture_id": summary.capture_id,
        "results_digest": manifest["results_digest"],
        "tokens, sha256": summary.corpus.token_sha256,
        "label": label if isinstance(label, str) else None,
        "probe_id": None if advice is None else advice.probe_id,
    }
    lines = ["| | |", "|:--|:--|", *(f"| {name} | {code(value)} |" for name, value in rows.items() if value)]
    return ["\n".join(lines), *([] if link is None else [f"The whole study: <{link}>"])]
