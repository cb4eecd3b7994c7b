"""The YAML of a model card: what a study found as `model-index`, the form in which the hub keeps evaluation results.

It says nothing of what the model was trained on: a corpus that was read for a study is no training data, so it stands as the
data set of a result and not under `datasets`. Lines end in a newline; a name that holds markup is quoted by the YAML writer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from outliers.results.schema import Advice, StudySummary

TAGS = ["outlier-features", "activation-outliers"]
TASK = {"type": "text-generation"}


def front_matter(summary: StudySummary, corpus_part: Mapping[str, str], advice: Advice | None, link: str | None) -> str:
    """The metadata of a study's card as YAML, without the lines of dashes.

    corpus_part: subset, split and revision of a data set of the hub, as far as they are known. link: the study's own page.
    """
    result: dict[str, Any] = {
        "task": dict(TASK),
        "dataset": _data_set(summary, corpus_part),
        "metrics": _metrics(summary, advice),
    }
    source = {"name": f"outliers study {summary.study_id}"}
    if link is not None:  # the hub takes a source with an address alone
        result["source"] = source | {"url": link}
    content = {"tags": list(TAGS), "model-index": [{"name": summary.model.id, "results": [result]}]}
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    return text


def _data_set(summary: StudySummary, corpus_part: Mapping[str, str]) -> dict[str, Any]:
    source = summary.corpus.source
    size = f"{summary.corpus.num_sequences:,} sequences, {summary.corpus.num_tokens:,} tokens"
    named = {"config" if name == "subset" else name: value for name, value in corpus_part.items()}
    return {"type": source, "name": f"{source} ({size})", **named}


def _metrics(summary: StudySummary, advice: Advice | None) -> list[dict[str, Any]]:
    rule, found = summary.criteria, summary.systematic
    words = (
        f"{rule.reading} at {rule.site}, abs(x) >= {rule.magnitude:g}, {100 * rule.layer_fraction:g}% of layers, "
        f"{100 * rule.position_fraction:g}% of tokens"
    )
    values: list[tuple[str, str, float | int | None]] = [
        ("systematic_outlier_features", f"systematic outlier features ({words})", len(found)),
        (
            "largest_systematic_magnitude",
            "largest abs(x) of a systematic feature",
            max((row.max_magnitude for row in found), default=None),
        ),
        ("massive_activations", "massive activations at resid", summary.massive_count),
        ("perplexity", "perplexity", None if summary.perplexity is None else summary.perplexity.value),
    ]
    for item in () if advice is None else advice.formats:
        weights = "" if item.weights is None else f", weights in {item.weights}"
        values.append(
            ("kl_divergence", f"KL with activations in {item.format}{weights}, nats a token", item.confirmed_kl)
        )
    return [{"type": kind, "name": name, "value": value} for kind, name, value in values if value is not None]
