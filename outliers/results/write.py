"""A Summary -> what may be published: summary.json, features.parquet, tokens.json; quantization.parquet with `--formats`;
experts.parquet and router.parquet of a mixture of experts; pictures.json, which holds what the pictures need besides.

The contents hold no clock, path or host, so that two runs of one study can be compared byte for byte.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from outliers.corpus.tokens import Corpus, load_corpus
from outliers.counting.massive import Massive, massive_activations
from outliers.counting.summary import Summary
from outliers.counting.summary_files import read_counts, read_summary
from outliers.errors import CaptureError, ForbiddenFile
from outliers.files.atomic import write_atomic
from outliers.files.parquet import write_parquet
from outliers.results.bootstrap import LEVEL, SEED, Intervals, bootstrap
from outliers.results.expert_tables import experts_table, router_table
from outliers.results.experts import expert_notes, experts_block, read_experts
from outliers.results.format_errors import errors_block, errors_table, read_errors
from outliers.results.ladders import QUANTILES, layer_rows, magnitude_bins, threshold_ladder, without_first_tokens
from outliers.results.lists import readings_at, rules_of, shortened, sizes
from outliers.results.notes import ROWS_LEFT_OUT, notes, perplexity_notes
from outliers.results.per_sequence import PerSequence, count_per_sequence
from outliers.results.pictures import describe_pictures
from outliers.results.scale import ladder
from outliers.results.schema import (
    CorpusBlock,
    IntervalCounts,
    MassiveRow,
    ModelBlock,
    Perplexity,
    StudySummary,
    first_error,
)
from outliers.results.tables import feature_table, published_rows
from outliers.results.top_tokens import SCHEMA_VERSION, describe_tokens
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

LARGEST_LOSS = 700.0
"""Nats a token above which the exponential leaves float64: there is no perplexity."""


@dataclass(frozen=True)
class Findings:
    """Everything that was counted for one study. intervals: None for a single sequence."""

    summary: Summary
    per_sequence: PerSequence
    intervals: Intervals | None


def write_results(prepared: Prepared, workspace: Workspace, into: Path | None = None) -> Path:
    """Write the files of a study's numbers into its results folder, or into another, from its summary; returns that folder.

    Raises CaptureError where the summary is not of the whole corpus, ForbiddenFile for numbers or texts that the schema does
    not allow.
    """
    private = workspace.summary(prepared.capture_id, prepared.study_id)
    found, corpus = load_findings(prepared, private), load_corpus(prepared.corpus, workspace)
    errors = read_errors(private, prepared) if prepared.spec.formats.formats else None
    experts = read_experts(prepared, private)
    try:
        content = summarize_study(prepared, found, corpus)
        if errors is not None:
            content.quantization = errors_block(prepared, errors)
        if experts is not None:
            content.experts = experts_block(prepared, experts, content, corpus)
            content.notes += expert_notes(experts)
        tokens = describe_tokens(prepared, found.summary, content, corpus)
        pictures = describe_pictures(prepared, found.summary, content, corpus)
    except ValidationError as error:
        raise ForbiddenFile(
            f"the results of {prepared.study_id} are not what is published: {error.title}: {first_error(error)}"
        ) from error
    table = feature_table(found.summary, prepared.layers)
    rows, left_out = published_rows(table, [row.feature for row in content.systematic], prepared.site)
    if left_out:
        content.notes.append(
            f"{ROWS_LEFT_OUT}{rows.num_rows:,} of the {rows.num_rows + left_out:,} rows with a hit: those of the "
            "systematic features, then the largest; the whole table stays next to the capture"
        )
    folder = workspace.study(prepared.study_id) if into is None else into
    folder.mkdir(parents=True, exist_ok=True)
    # a manifest says that a study is finished: an older one must not speak for files that are being rewritten
    (folder / "manifest.json").unlink(missing_ok=True)
    write_atomic(folder / "summary.json", json_bytes(content))
    write_atomic(folder / "tokens.json", json_bytes(tokens))
    write_atomic(folder / "pictures.json", json_bytes(pictures))
    write_parquet(private / "features.parquet", table)
    write_parquet(folder / "features.parquet", rows)
    if errors is not None:
        write_parquet(folder / "quantization.parquet", errors_table(errors))
    if experts is not None:
        write_parquet(folder / "experts.parquet", experts_table(experts, prepared.spec.criteria.magnitude))
        write_parquet(folder / "router.parquet", router_table(experts))
    return folder


def load_findings(prepared: Prepared, private: Path) -> Findings:
    """What the private summary in a folder says of a study. Raises CaptureError where it is not of the whole corpus."""
    summary = read_summary(private)
    wanted = prepared.corpus.num_sequences
    if summary.sequences.size != wanted:
        raise CaptureError(
            f"the summary in {private} is of {summary.sequences.size} of {wanted} sequences: `outliers merge` it with those of "
            "the others, or analyze the whole capture"
        )
    rules = rules_of(prepared)
    per_sequence = count_per_sequence(private, summary, rules)
    drawn = bootstrap(summary.frame, rules, per_sequence.candidates, read_counts(private, summary.frame))
    return Findings(summary, per_sequence, drawn)


def json_bytes(content: Any) -> bytes:
    """JSON as results are written: equal values give equal bytes. Of a model, the fields that were set."""
    if isinstance(content, BaseModel):
        content = content.model_dump(exclude_unset=True)
    return json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def summarize_study(prepared: Prepared, found: Findings, corpus: Corpus) -> StudySummary:
    """The content of summary.json. Raises ValidationError for a number or a text that the schema does not allow."""
    summary, frame, criteria = found.summary, found.summary.frame, prepared.spec.criteria
    whole = {site: readings_at(prepared, summary, found.per_sequence, found.intervals, site) for site in frame.sites}
    counts = {site: sizes(own) for site, own in whole.items()}
    readings = {
        site: shortened(own, frame.width(site), criteria.reading if site == prepared.site else None)
        for site, own in whole.items()
    }
    cut = [
        f"{name} at {site}"
        for site, own in readings.items()
        for name, n in sizes(own).items()
        if n < counts[site][name]
    ]
    massive = massive_activations(summary)
    content = identity(prepared)
    content["criteria"] |= {"sites": list(frame.captured), "ladder": list(frame.ladder)}
    content |= {
        "schema_version": SCHEMA_VERSION,
        "readings": readings,
        "reading_counts": counts,
        "systematic": readings[prepared.site].lists[criteria.reading],
        "without_first_tokens": without_first_tokens(prepared, summary),
        "intervals": None if found.intervals is None else _intervals(found.intervals),
        "layers": layer_rows(prepared, summary, found.per_sequence),
        "quantile_levels": [float(level) for level in QUANTILES],
        "sweep": threshold_ladder(prepared, summary),
        "sd_ladder": ladder(summary, criteria.layer_rule),
        "histogram": {site: magnitude_bins(summary.sites[site].histogram, frame.dtype) for site in frame.captured},
        "notes": notes(prepared, summary, massive, cut),
    }
    if prepared.spec.capture.perplexity:
        measured, predicted = found.per_sequence.nll_tokens, int(np.maximum(corpus.lengths - 1, 0).sum(dtype=np.int64))
        if measured != predicted:
            raise CaptureError(
                f"the losses of {measured:,} of {predicted:,} tokens were measured: the capture was made without --perplexity. "
                "Extract again, which measures the rest, and analyze again"
            )
        content["perplexity"] = perplexity(found.per_sequence.nll, measured)
        content["notes"] += perplexity_notes(prepared, content["perplexity"])
    return StudySummary.model_validate(content | _massive_lists(prepared, corpus, massive))


def identity(prepared: Prepared) -> dict[str, Any]:
    """The fields of summary.json that are known before anything is counted, as plain values.

    These are the ids, the model, the corpus, and the criteria without `sites` and `ladder`.
    """
    criteria, corpus, model = prepared.spec.criteria, prepared.corpus, prepared.model
    return {
        "study_id": prepared.study_id,
        "capture_id": prepared.capture_id,
        "model": {
            name: getattr(model, name) for name in ModelBlock.model_fields if name not in ("id", "revision", "name")
        }
        | {"id": model.source.id, "revision": model.source.revision}
        | _given(prepared.spec.model.name),
        "corpus": {
            name: getattr(corpus, name) for name in CorpusBlock.model_fields if name not in ("publish_text", "name")
        }
        | {"publish_text": "context" if prepared.text else "none"}
        | _given(prepared.spec.corpus.name),
        "criteria": {
            "magnitude": criteria.magnitude,
            "layer_fraction": criteria.layer_fraction,
            "position_fraction": criteria.position_fraction,
            "reading": criteria.reading,
            "site": prepared.site,
        },
    }


def _given(name: str | None) -> dict[str, str]:
    """The name under which something is published, where one was given."""
    return {} if name is None else {"name": name}


def perplexity(nll: float, tokens: int) -> Perplexity:
    """exp of the mean negative log-likelihood of a token, from their sum in nats.

    `loss` is that mean, None where the logits are not finite; `tokens` are those that were predicted, all but the first of
    each sequence, 0 where none has a second. A finite loss may be too large for `value`.
    """
    if not tokens:
        return Perplexity(value=None, loss=None, tokens=0)
    loss = nll / tokens
    known = math.isfinite(loss)
    value = math.exp(loss) if known and loss < LARGEST_LOSS else None
    return Perplexity(value=value, loss=loss if known else None, tokens=tokens)


def _intervals(drawn: Intervals) -> IntervalCounts:
    counts = {site: {reading: list(ends) for reading, ends in own.items()} for site, own in drawn.counts.items()}
    return IntervalCounts.model_validate(
        {"level": LEVEL, "resamples": drawn.resamples, "seed": SEED, "counts": counts, "shares": drawn.shares}
    )


def _massive_lists(prepared: Prepared, corpus: Corpus, massive: Massive | None) -> dict[str, Any]:
    """The fields of summary.json about massive activations; None where resid was not captured."""
    if massive is None:
        names = ("massive", "massive_count", "massive_undecided", "massive_by_token", "massive_by_token_count")
        return dict.fromkeys(names)
    return {
        "massive": [_massive(prepared, corpus, cell) for cell in massive.cells],
        "massive_count": massive.count,
        "massive_undecided": massive.undecided,
        "massive_by_token": [_massive(prepared, corpus, cell) for cell in massive.by_token],
        "massive_by_token_count": massive.by_token_count,
    }


def _massive(prepared: Prepared, corpus: Corpus, cell: dict[str, Any]) -> MassiveRow:
    token = corpus.shown(cell["sequence"], cell["position"]) if prepared.text else None
    return MassiveRow(**(cell | {"layer": prepared.layers[cell["layer"]], "token": token}))
