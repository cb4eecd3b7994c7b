"""A Summary -> what may be published: summary.json, features.parquet, tokens.json.

The contents hold no clock, path or host, so that two runs of one study can be compared byte for byte. Before it:
`analyze`, `criteria`. After it: `report`, `manifest`, `publish`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from outliers.analyze import read_counts, read_summary
from outliers.architectures import INPUT
from outliers.bits import bits_to_float, pattern_values
from outliers.corpus import Corpus, load_corpus
from outliers.criteria import Rules, Verdict, judge, kurtosis, legacy_passes, median_magnitude
from outliers.files import write_atomic
from outliers.massive import massive_activations
from outliers.parquet import write_parquet
from outliers.prepare import Prepared
from outliers.spec import BLOCK, BLOCK_SITES, READINGS
from outliers.store import Journal
from outliers.summary import SiteTotals, Summary
from outliers.tables import feature_table
from outliers.workspace import Workspace

SCHEMA_VERSION = 1
CONTEXT_CHARACTERS = 60
TOKEN_FEATURES = 64
"""Systematic features that tokens.json shows, by magnitude: a model with more is no less described by its table."""


LARGEST_LOSS = 700.0
"""Nats a token above which the exponential leaves float64: no perplexity is told."""


@dataclass
class Votes:
    """How many sequences each feature passes in on its own: passes[site][reading] is (feature,) int64.

    The legacy arrays are (feature,): sequences passed in, and sums over those of hooks and of the share of tokens.
    """

    passes: dict[str, dict[str, NDArray[np.int64]]]
    legacy: NDArray[np.int64]
    legacy_hooks: NDArray[np.int64]
    legacy_share: NDArray[np.float64]


def write_results(prepared: Prepared, workspace: Workspace) -> Path:
    """Write the three files of a study into its results folder, from its summary; returns that folder."""
    private = workspace.summary(prepared.capture_id, prepared.study_id)
    summary, corpus = read_summary(private), load_corpus(prepared.corpus, workspace)
    content = summarize_study(prepared, summary, count_votes(prepared, private, summary), corpus)
    if prepared.spec.capture.perplexity:
        journal = Journal.open(workspace.capture(prepared.capture_id) / "journal.jsonl")
        content |= perplexity([journal.done[sequence] for sequence in sorted(journal.done)])
        if content["perplexity"]["value"] is None:
            content["notes"].append("perplexity is not a number: the model's logits are not finite on this corpus")
    folder = workspace.study(prepared.study_id)
    folder.mkdir(parents=True, exist_ok=True)
    # a manifest says that a study is finished: an older one must not speak for files that are being rewritten
    (folder / "manifest.json").unlink(missing_ok=True)
    write_atomic(folder / "summary.json", _json(content))
    write_atomic(folder / "tokens.json", _json(describe_tokens(prepared, summary, content, corpus)))
    table = feature_table(summary, prepared.layers)
    write_parquet(private / "features.parquet", table)
    write_parquet(folder / "features.parquet", table.filter(pa.compute.greater(table["hits"], 0)))
    return folder


def _json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def rules_of(prepared: Prepared) -> Rules:
    """The shares that the study's criteria name."""
    return Rules(prepared.spec.criteria.layer_rule, prepared.spec.criteria.position_rule)


def count_votes(prepared: Prepared, folder: Path, summary: Summary) -> Votes:
    """Judge every sequence alone, one after the other from disk."""
    frame, rules = summary.frame, rules_of(prepared)
    votes = Votes(
        passes={site: {r: np.zeros(frame.width(site), np.int64) for r in READINGS} for site in frame.sites},
        legacy=np.zeros(frame.width(frame.sites[-1]), np.int64),
        legacy_hooks=np.zeros(frame.width(frame.sites[-1]), np.int64),
        legacy_share=np.zeros(frame.width(frame.sites[-1]), np.float64),
    )
    for counts in read_counts(folder, frame):
        for site in frame.sites:
            for reading, verdict in judge(counts.hits[site], counts.union[site], counts.tokens, rules).items():
                votes.passes[site][reading] += verdict.passes
        if BLOCK in frame.sites:
            passed = legacy_passes(counts.hooks, counts.legacy_union, frame.num_layers, counts.tokens, rules)
            votes.legacy += passed
            votes.legacy_hooks += np.where(passed, counts.hooks, 0)
            votes.legacy_share += np.where(passed, counts.legacy_union / counts.tokens, 0.0)
    return votes


def summarize_study(prepared: Prepared, summary: Summary, votes: Votes, corpus: Corpus) -> dict[str, Any]:
    """The content of summary.json."""
    frame, rules = summary.frame, rules_of(prepared)
    step = frame.deciding_step
    readings: dict[str, Any] = {}
    for site in frame.sites:
        totals = summary.sites[site]
        verdicts = judge(totals.ladder_hits[step], totals.union[step], summary.tokens, rules)
        readings[site] = {
            reading: _features(prepared, totals, verdict, votes.passes[site][reading], summary)
            for reading, verdict in verdicts.items()
        }
    if BLOCK in frame.sites:
        readings[BLOCK]["legacy"] = _legacy(prepared, summary, votes)
    massive = massive_activations(summary)
    criteria = prepared.spec.criteria
    return {
        "schema_version": SCHEMA_VERSION,
        "study_id": prepared.study_id,
        "capture_id": prepared.capture_id,
        "model": _model(prepared),
        "corpus": {
            "source": prepared.corpus.source,
            "num_sequences": prepared.corpus.num_sequences,
            "sequence_length": prepared.corpus.sequence_length,
            "num_tokens": prepared.corpus.num_tokens,
            "num_documents": prepared.corpus.num_documents,
            "token_sha256": prepared.corpus.token_sha256,
            "publish_text": "context" if prepared.text else "none",
        },
        "criteria": {
            "magnitude": criteria.magnitude,
            "layer_fraction": criteria.layer_fraction,
            "position_fraction": criteria.position_fraction,
            "reading": criteria.reading,
            "site": prepared.site,
            "sites": list(frame.captured),
            "ladder": list(frame.ladder),
        },
        "readings": readings,
        "systematic": readings[prepared.site][criteria.reading],
        "layers": _layers(prepared, summary),
        "massive": None if massive is None else [_massive(prepared, corpus, cell) for cell in massive.cells],
        "massive_count": None if massive is None else massive.count,
        "sweep": _sweep(summary, rules),
        "histogram": {site: _magnitude_bins(summary.sites[site].histogram, frame.dtype) for site in frame.captured},
        "notes": _notes(prepared),
    }


def perplexity(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The key `perplexity` from journal lines in the order of the sequences: exp of the mean negative log-likelihood a token.

    `loss` is that mean, in nats; `tokens` are those that were predicted, all but the first of each sequence.
    """
    tokens = sum(int(entry["nll_tokens"]) for entry in entries)
    loss = math.fsum(entry["nll"] for entry in entries) / tokens
    finite = math.isfinite(loss) and loss < LARGEST_LOSS
    return {
        "perplexity": {
            "value": math.exp(loss) if finite else None,
            "loss": loss if finite else None,
            "tokens": tokens,
        }
    }


def _model(prepared: Prepared) -> dict[str, Any]:
    model = prepared.model
    return {
        "id": model.source.id,
        "revision": model.source.revision,
        "architecture": model.architecture,
        "total_parameters": model.total_parameters,
        "active_parameters": model.active_parameters,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "dtype": model.dtype,
        "num_experts": model.num_experts,
        "quantization": model.quantization,
    }


def _features(
    prepared: Prepared, totals: SiteTotals, verdict: Verdict, votes: NDArray[np.int64], summary: Summary
) -> list[dict[str, Any]]:
    """The features that pass one reading, by max_magnitude, then number."""
    found = []
    hits = totals.ladder_hits[summary.frame.deciding_step]
    for feature in np.flatnonzero(verdict.passes):
        layers = np.flatnonzero(verdict.layer_hits[:, feature])
        share = verdict.position_fraction
        found.append(
            _feature(prepared, totals, int(feature), summary)
            | {
                "layer_fraction": layers.size / summary.frame.num_layers,
                "position_fraction": None if share is None else float(share[feature]),
                "layers": [prepared.layers[layer] for layer in layers],
                "hits": int(hits[:, feature].sum()),
                "sequences": int(votes[feature]),
            }
        )
    return sorted(found, key=lambda item: (-item["max_magnitude"], item["feature"]))


def _feature(prepared: Prepared, totals: SiteTotals, feature: int, summary: Summary) -> dict[str, Any]:
    high, low = float(totals.max[:, feature].max()), float(totals.min[:, feature].min())
    return {
        "feature": feature,
        "max_magnitude": max(abs(high), abs(low)),
        "min": low,
        "max": high,
        "of_sequences": int(summary.sequences.size),
        "first_token_hits": int(totals.first_token_hits[:, feature].sum()),
    }


def _legacy(prepared: Prepared, summary: Summary, votes: Votes) -> dict[str, Any]:
    """The earlier pipeline's numbers: fractions are means over the sequences in which the feature passes."""
    totals, step = summary.sites[BLOCK], summary.frame.deciding_step
    found = []
    for feature in np.flatnonzero(votes.legacy):
        times = int(votes.legacy[feature])
        found.append(
            _feature(prepared, totals, int(feature), summary)
            | {
                "layer_fraction": int(votes.legacy_hooks[feature]) / (2 * summary.frame.num_layers * times),
                "position_fraction": float(votes.legacy_share[feature]) / times,
                "layers": [prepared.layers[n] for n in np.flatnonzero(totals.ladder_hits[step, :, feature])],
                "hits": int(totals.ladder_hits[step, :, feature].sum()),
                "sequences": times,
            }
        )
    found.sort(key=lambda item: (-item["max_magnitude"], item["feature"]))
    return {"feature_sequence_pairs": int(votes.legacy.sum()), "features": found}


def _layers(prepared: Prepared, summary: Summary) -> list[dict[str, Any]]:
    values, _ = pattern_values(summary.frame.dtype)
    rows = []
    for site in summary.frame.captured:
        totals = summary.sites[site]
        for index, layer in enumerate(prepared.layers):
            high, low = float(totals.max[index].max()), float(totals.min[index].min())
            seen = bool(totals.histogram[index].any())
            rows.append(
                {
                    "site": site,
                    "layer": layer,
                    "max_magnitude": max(abs(high), abs(low)) if seen else None,
                    "hits": int(totals.ladder_hits[summary.frame.deciding_step, index].sum()),
                    "nonfinite": int(totals.nonfinite[index]),
                    "kurtosis": kurtosis(totals.histogram[index], values),
                    "median_magnitude": median_magnitude(totals.histogram[index], values),
                }
            )
    return rows


def _sweep(summary: Summary, rules: Rules) -> dict[str, Any]:
    """How many features each reading finds at each magnitude of the ladder."""
    counts: dict[str, dict[str, list[int]]] = {}
    for site in summary.frame.sites:
        totals = summary.sites[site]
        steps = [
            judge(totals.ladder_hits[k], totals.union[k], summary.tokens, rules)
            for k in range(len(summary.frame.ladder))
        ]
        counts[site] = {reading: [int(step[reading].passes.sum()) for step in steps] for reading in READINGS}
    return {"magnitudes": list(summary.frame.ladder), "counts": counts}


def _magnitude_bins(histogram: NDArray[np.int64], dtype: str) -> dict[str, Any]:
    """Counts by magnitude, four bins an octave: the patterns without sign, cut to exponent and two bits of mantissa."""
    kind, shift = ("float16", 8) if dtype == "float16" else ("bfloat16", 5)
    merged = histogram.sum(axis=0)
    unsigned = merged[:0x8000] + merged[0x8000:]
    bins = unsigned.reshape(-1, 1 << shift).sum(axis=1)
    used = np.flatnonzero(bins)
    if not used.size:
        return {"lower_edges": [], "counts": []}
    kept = np.arange(used[0], used[-1] + 1)
    edges = bits_to_float((kept << shift).astype(np.uint16), kind)
    return {"lower_edges": [float(edge) for edge in edges], "counts": [int(n) for n in bins[kept]]}


def _notes(prepared: Prepared) -> list[str]:
    notes = []
    if prepared.model.dtype == "float32":
        notes.append(
            "kurtosis, median and the magnitude histogram are of values rounded to bfloat16; every other number is exact"
        )
    if len(prepared.layers) < prepared.model.num_layers:
        notes.append(
            f"{len(prepared.layers)} of {prepared.model.num_layers} layers were read: layer fractions are of those"
        )
    anatomy = prepared.model.anatomy
    sites = prepared.spec.capture.sites
    for site in sites:
        other = anatomy.alias_of(site)
        if other in sites:
            notes.append(f"{site} is the very same tensor as {other}: one norm feeds attention and MLP")
    named = [item.partition("=")[0] for item in prepared.spec.capture.site_modules]
    bare = [s for s in BLOCK_SITES if s not in named and s in sites and anatomy.sites[s][0].endswith(INPUT)]
    if bare:
        notes.append(
            f"no norm comes before it in this family: {' and '.join(bare)} is the residual stream itself, whose scale grows "
            "with depth"
        )
    notes.extend(f"a site was named by hand: {item}" for item in prepared.spec.capture.site_modules)
    if prepared.corpus.lengths_sha256 is not None:
        notes.append("sequences have unequal lengths: padding is masked and counted nowhere")
    if not prepared.text:
        notes.append("text of the corpus is left out (--publish-text context shows it)")
    return notes


def _massive(prepared: Prepared, corpus: Corpus, cell: dict[str, Any]) -> dict[str, Any]:
    token = corpus.piece(cell["sequence"], cell["position"]) if prepared.text else None
    return cell | {"layer": prepared.layers[cell["layer"]], "token": token}


def describe_tokens(prepared: Prepared, summary: Summary, content: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """The content of tokens.json: where the systematic features' largest values and the massive activations sit."""
    frame = summary.frame
    union = summary.sites[frame.site].union[frame.deciding_step]
    features = []
    for item in content["systematic"][:TOKEN_FEATURES]:
        number, tokens = item["feature"], int(union[item["feature"]])
        cells = summary.top[summary.top["feature"] == number]
        features.append(
            {
                "feature": number,
                "tokens": tokens,
                "first_token_share": int(summary.first_tokens[number]) / tokens,
                "delimiter_share": int(summary.delimiter_tokens[number]) / tokens,
                "positions": {
                    "bin_tokens": frame.bin_positions,
                    "counts": [int(n) for n in summary.position_tokens[:, number]],
                },
                "top": [
                    {
                        "sequence": int(cell["sequence"]),
                        "position": int(cell["position"]),
                        "layer": prepared.layers[int(cell["layer"])],
                        "site": frame.captured[int(cell["site"])],
                        "value": float(cell["value"]),
                    }
                    | context(prepared, corpus, int(cell["sequence"]), int(cell["position"]))
                    for cell in cells
                ],
            }
        )
    kept = ("layer", "sequence", "position", "feature", "value")
    massive = [
        {name: cell[name] for name in kept} | context(prepared, corpus, cell["sequence"], cell["position"])
        for cell in (content["massive"] or [])[:TOKEN_FEATURES]
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "study_id": prepared.study_id,
        "site": frame.site,
        "text": prepared.text,
        "features": features,
        "massive": massive,
    }


def context(prepared: Prepared, corpus: Corpus, sequence: int, position: int) -> dict[str, str | None]:
    """A token and the text around it, or nothing of them where text must not be shown."""
    if not prepared.text:
        return {"token": None, "before": None, "after": None}
    token, text, start = (
        corpus.piece(sequence, position),
        corpus.sequence_texts[sequence],
        int(corpus.starts[sequence, position]),
    )
    end = start + len(token)
    return {
        "token": token,
        "before": text[max(0, start - CONTEXT_CHARACTERS) : start],
        "after": text[end : end + CONTEXT_CHARACTERS],
    }
