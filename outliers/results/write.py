"""A Summary -> what may be published: summary.json, features.parquet, tokens.json.

The contents hold no clock, path or host, so that two runs of one study can be compared byte for byte. Before it:
`analyze`, `votes`, `bootstrap`. After it: `report`, `manifest`, `publish`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.corpus.tokens import Corpus, load_corpus
from outliers.counting.bits import bits_to_float, pattern_values
from outliers.counting.massive import massive_activations
from outliers.counting.summary import SiteTotals, Summary
from outliers.counting.summary_files import read_counts, read_summary
from outliers.errors import CaptureError
from outliers.files.atomic import write_atomic
from outliers.files.parquet import write_parquet
from outliers.results.bootstrap import LEVEL, SEED, Interval, Intervals, bootstrap
from outliers.results.criteria import Rules, Verdict, judge, kurtosis, median_magnitude, quantile_magnitudes
from outliers.results.notes import notes, perplexity_notes
from outliers.results.per_sequence import Votes, count_votes
from outliers.results.scale import ladder, largest, layer_ladder, magnitudes
from outliers.results.tables import feature_table, published_rows
from outliers.results.top_tokens import SCHEMA_VERSION, describe_tokens
from outliers.spec import BLOCK, READINGS
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

QUANTILES = ("0.9", "0.99", "0.999", "0.9999")
"""Levels at which each layer's magnitudes are told, beside the median."""
LISTED = 256
"""Features in each list but the deciding one, by magnitude."""
HEAD = 16
"""The same where most features of the site pass, as at `resid`: their number says it, and a list of all says no more."""
LARGEST_LOSS = 700.0
"""Nats a token above which the exponential leaves float64: no perplexity is told."""


@dataclass(frozen=True)
class Findings:
    """Everything that was counted for one study."""

    summary: Summary
    votes: Votes
    intervals: Intervals | None


def write_results(prepared: Prepared, workspace: Workspace, into: Path | None = None) -> Path:
    """Write the three files of a study into its results folder, or into another, from its summary; returns that folder.

    Raises CaptureError where the summary is not of the whole corpus.
    """
    private = workspace.summary(prepared.capture_id, prepared.study_id)
    found, corpus = find(prepared, private), load_corpus(prepared.corpus, workspace)
    content = summarize_study(prepared, found, corpus)
    if "perplexity" in content:
        content["notes"] += perplexity_notes(prepared, content["perplexity"])
    table = feature_table(found.summary, prepared.layers)
    rows, left_out = published_rows(table, content["systematic"], prepared.site)
    if left_out:
        content["notes"].append(
            f"features.parquet holds {rows.num_rows:,} of the {rows.num_rows + left_out:,} rows with a hit: those of the "
            "systematic features, then the largest; the whole table stays beside the capture"
        )
    folder = workspace.study(prepared.study_id) if into is None else into
    folder.mkdir(parents=True, exist_ok=True)
    # a manifest says that a study is finished: an older one must not speak for files that are being rewritten
    (folder / "manifest.json").unlink(missing_ok=True)
    write_atomic(folder / "summary.json", json_bytes(content))
    write_atomic(folder / "tokens.json", json_bytes(describe_tokens(prepared, found.summary, content, corpus)))
    write_parquet(private / "features.parquet", table)
    write_parquet(folder / "features.parquet", rows)
    return folder


def find(prepared: Prepared, private: Path) -> Findings:
    """What the private summary in a folder says of a study. Raises CaptureError where it is not of the whole corpus."""
    summary = read_summary(private)
    wanted = prepared.corpus.num_sequences
    if summary.sequences.size != wanted:
        raise CaptureError(
            f"the summary in {private} is of {summary.sequences.size} of {wanted} sequences: `outliers merge` it with those of "
            "the others, or analyze the whole capture"
        )
    rules = rules_of(prepared)
    votes = count_votes(private, summary, rules)
    drawn = bootstrap(summary.frame, rules, votes.candidates, read_counts(private, summary.frame))
    return Findings(summary, votes, drawn)


def json_bytes(content: Any) -> bytes:
    """JSON as results are written: equal values give equal bytes."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def rules_of(prepared: Prepared) -> Rules:
    """The shares that the study's criteria name."""
    return Rules(prepared.spec.criteria.layer_rule, prepared.spec.criteria.position_rule)


def summarize_study(prepared: Prepared, found: Findings, corpus: Corpus) -> dict[str, Any]:
    """The content of summary.json."""
    summary, votes, drawn = found.summary, found.votes, found.intervals
    frame, criteria = summary.frame, prepared.spec.criteria
    lists = {site: _lists(prepared, found, site) for site in frame.sites}
    counts = {site: {reading: len(rows) for reading, rows in own.items()} for site, own in lists.items()}
    systematic = lists[prepared.site][criteria.reading]
    readings: dict[str, Any] = {
        site: {
            reading: rows if rows is systematic else rows[: _listed(len(rows), frame.width(site))]
            for reading, rows in own.items()
        }
        for site, own in lists.items()
    }
    if BLOCK in frame.sites:
        legacy = _legacy(prepared, summary, votes)
        counts[BLOCK]["legacy"] = len(legacy["features"])
        readings[BLOCK]["legacy"] = legacy | {"features": legacy["features"][:LISTED]}
    massive = massive_activations(summary)
    cut = [f"{r} at {s}" for s, own in readings.items() for r, rows in own.items() if _held(rows) < counts[s][r]]
    own = identity(prepared)
    content = {
        "schema_version": SCHEMA_VERSION,
        **own,
        "criteria": own["criteria"] | {"sites": list(frame.captured), "ladder": list(frame.ladder)},
        "readings": readings,
        "reading_counts": counts,
        "systematic": systematic,
        "without_first_tokens": _without_first_tokens(prepared, summary),
        "intervals": None
        if drawn is None
        else {"level": LEVEL, "resamples": drawn.resamples, "seed": SEED, "counts": drawn.counts}
        | {"shares": drawn.shares},
        "layers": _layers(prepared, summary, votes),
        "quantile_levels": [float(level) for level in QUANTILES],
        "massive": None if massive is None else [_massive(prepared, corpus, cell) for cell in massive.cells],
        "massive_count": None if massive is None else massive.count,
        "massive_undecided": None if massive is None else massive.undecided,
        "massive_by_token": None
        if massive is None
        else [_massive(prepared, corpus, cell) for cell in massive.by_token],
        "massive_by_token_count": None if massive is None else massive.by_token_count,
        "sweep": _sweep(prepared, summary),
        "sd_ladder": ladder(summary, criteria.layer_rule),
        "histogram": {site: _magnitude_bins(summary.sites[site].histogram, frame.dtype) for site in frame.captured},
        "notes": notes(prepared, summary, massive, cut),
    }
    if prepared.spec.capture.perplexity:
        content["perplexity"] = perplexity(votes.nll, votes.nll_tokens)
    return content


def identity(prepared: Prepared) -> dict[str, Any]:
    """What of summary.json is known before anything is counted: ids, model, corpus, and the criteria but sites and ladder."""
    criteria, corpus = prepared.spec.criteria, prepared.corpus
    return {
        "study_id": prepared.study_id,
        "capture_id": prepared.capture_id,
        "model": _model(prepared),
        "corpus": {
            "source": corpus.source,
            "num_sequences": corpus.num_sequences,
            "sequence_length": corpus.sequence_length,
            "num_tokens": corpus.num_tokens,
            "num_documents": corpus.num_documents,
            "token_sha256": corpus.token_sha256,
            "publish_text": "context" if prepared.text else "none",
        },
        "criteria": {
            "magnitude": criteria.magnitude,
            "layer_fraction": criteria.layer_fraction,
            "position_fraction": criteria.position_fraction,
            "reading": criteria.reading,
            "site": prepared.site,
        },
    }


def perplexity(nll: float, tokens: int) -> dict[str, Any]:
    """exp of the mean negative log-likelihood a token, from their sum in nats.

    `loss` is that mean, null where the logits were not finite; `tokens` are those that were predicted, all but the first of each
    sequence. A finite loss may be too large for `value`.
    """
    loss = nll / tokens
    known = math.isfinite(loss)
    value = math.exp(loss) if known and loss < LARGEST_LOSS else None
    return {"value": value, "loss": loss if known else None, "tokens": tokens}


def _listed(count: int, width: int) -> int:
    """How many of a list's features are written."""
    return min(HEAD, LISTED) if 2 * count >= width else LISTED


def _held(rows: Any) -> int:
    return len(rows["features"] if isinstance(rows, dict) else rows)


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


def _lists(prepared: Prepared, found: Findings, site: str) -> dict[str, list[dict[str, Any]]]:
    """The features that pass each reading at one site, by max_magnitude, then number."""
    summary = found.summary
    totals, step = summary.sites[site], summary.frame.deciding_step
    verdicts = judge(*totals.counts(step), summary.tokens, rules_of(prepared))
    drawn = None if found.intervals is None else found.intervals.features[site]
    units = magnitudes(summary, site)
    return {
        reading: _features(
            prepared,
            totals,
            units,
            verdict,
            found.votes.passes[site][reading],
            summary,
            None if drawn is None else drawn[reading],
        )
        for reading, verdict in verdicts.items()
    }


def _features(
    prepared: Prepared,
    totals: SiteTotals,
    units: NDArray[np.float64],
    verdict: Verdict,
    votes: NDArray[np.int64],
    summary: Summary,
    drawn: dict[int, Interval] | None,
) -> list[dict[str, Any]]:
    found = []
    hits = totals.hits[summary.frame.deciding_step]
    for feature in np.flatnonzero(verdict.passes):
        layers = np.flatnonzero(verdict.layer_hits[:, feature])
        share = verdict.position_fraction
        found.append(
            _feature(totals, units, int(feature), summary)
            | {
                "layer_fraction": layers.size / summary.frame.num_layers,
                "position_fraction": None if share is None else float(share[feature]),
                "layers": [prepared.layers[layer] for layer in layers],
                "hits": int(hits[:, feature].sum()),
                "sequences": int(votes[feature]),
                "interval": None if drawn is None else _interval(drawn[int(feature)]),
            }
        )
    return sorted(found, key=lambda item: (-item["max_magnitude"], item["feature"]))


def _interval(interval: Interval) -> dict[str, Any]:
    share = interval.position_fraction
    return {"position_fraction": None if share is None else list(share), "passes": interval.passes}


def _feature(totals: SiteTotals, units: NDArray[np.float64], feature: int, summary: Summary) -> dict[str, Any]:
    high, low = float(totals.max[:, feature].max()), float(totals.min[:, feature].min())
    return {
        "feature": feature,
        "max_magnitude": max(abs(high), abs(low)),
        "min": low,
        "max": high,
        "max_sd": largest(units, feature),
        "of_sequences": int(summary.sequences.size),
        "first_token_hits": int(totals.first_hits[summary.frame.deciding_step, :, feature].sum()),
    }


def _legacy(prepared: Prepared, summary: Summary, votes: Votes) -> dict[str, Any]:
    """The earlier pipeline's numbers: fractions are means over the sequences in which the feature passes."""
    totals, step = summary.sites[BLOCK], summary.frame.deciding_step
    units, found = magnitudes(summary, BLOCK), []
    for feature in np.flatnonzero(votes.legacy):
        times = int(votes.legacy[feature])
        found.append(
            _feature(totals, units, int(feature), summary)
            | {
                "layer_fraction": int(votes.legacy_hooks[feature]) / (2 * summary.frame.num_layers * times),
                "position_fraction": math.fsum(votes.legacy_shares[int(feature)]) / times,
                "layers": [prepared.layers[n] for n in np.flatnonzero(totals.hits[step, :, feature])],
                "hits": int(totals.hits[step, :, feature].sum()),
                "sequences": times,
            }
        )
    found.sort(key=lambda item: (-item["max_magnitude"], item["feature"]))
    return {"feature_sequence_pairs": int(votes.legacy.sum()), "features": found}


def _layers(prepared: Prepared, summary: Summary, votes: Votes) -> list[dict[str, Any]]:
    levels = tuple(Fraction(level) for level in QUANTILES)
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
                    "hits": int(totals.hits[summary.frame.deciding_step, index].sum()),
                    "nonfinite": int(totals.nonfinite[index]),
                    "kurtosis": kurtosis(totals.histogram[index], values),
                    "median_magnitude": median_magnitude(totals.histogram[index], values),
                    "quantiles": quantile_magnitudes(totals.histogram[index], values, levels),
                    "mean_inf_norm": votes.inf_norms[site][index] if seen else None,
                    **layer_ladder(summary, site, index),
                }
            )
    return rows


def _without_first_tokens(prepared: Prepared, summary: Summary) -> dict[str, dict[str, list[int]]]:
    """site -> reading -> numbers of the features that pass where the first token of each sequence is left out."""
    step = summary.frame.deciding_step
    found: dict[str, dict[str, list[int]]] = {}
    for site in summary.frame.sites:
        verdicts = _judge(prepared, summary, site, step, first_tokens=False)
        found[site] = {reading: np.flatnonzero(verdict.passes).tolist() for reading, verdict in verdicts.items()}
    return found


def _judge(prepared: Prepared, summary: Summary, site: str, step: int, *, first_tokens: bool) -> dict[str, Verdict]:
    """Every reading at one magnitude of the ladder, with the first tokens of the sequences or without them."""
    tokens = summary.tokens if first_tokens else summary.tokens - summary.sequences.size
    return judge(*summary.sites[site].counts(step, first_tokens=first_tokens), tokens, rules_of(prepared))


def _sweep(prepared: Prepared, summary: Summary) -> dict[str, Any]:
    """How many features each reading finds at each magnitude of the ladder, with first tokens and without them."""

    def counts(*, first_tokens: bool) -> dict[str, dict[str, list[int]]]:
        found: dict[str, dict[str, list[int]]] = {}
        for site in summary.frame.sites:
            steps = [
                _judge(prepared, summary, site, step, first_tokens=first_tokens)
                for step in range(len(summary.frame.ladder))
            ]
            found[site] = {reading: [int(step[reading].passes.sum()) for step in steps] for reading in READINGS}
        return found

    return {
        "magnitudes": list(summary.frame.ladder),
        "counts": counts(first_tokens=True),
        "counts_without_first_tokens": counts(first_tokens=False),
    }


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


def _massive(prepared: Prepared, corpus: Corpus, cell: dict[str, Any]) -> dict[str, Any]:
    token = corpus.shown(cell["sequence"], cell["position"]) if prepared.text else None
    return cell | {"layer": prepared.layers[cell["layer"]], "token": token}
