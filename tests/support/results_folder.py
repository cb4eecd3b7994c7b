"""A small finished study, written by code: what `results` and `report` leave behind, without a model.

Two folders of one `seed` are equal in every number and byte; another seed is other hardware: the same study, other
values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from outliers.publish.allowlist import read_log, read_numbers
from outliers.publish.publishable import make_publishable, write_publishable
from outliers.results.schema import FEATURES_SCHEMA

STUDY_ID = "a" * 24
CAPTURE_ID = "b" * 24
SLUG = "Qwen--Qwen3-0.6B"
LADDER = [3.0, 6.0, 12.0]
LAYERS, HIDDEN, TOKENS = 4, 32, 256


def feature(number: int, magnitude: float) -> dict[str, Any]:
    """FEATURE, one of the lists of summary.json."""
    return {
        "feature": number,
        "layer_fraction": 0.75,
        "position_fraction": 0.25,
        "layers": [0, 1, 3],
        "hits": 210,
        "max_magnitude": magnitude,
        "min": -magnitude,
        "max": 1.5,
        "sequences": 2,
        "of_sequences": 2,
        "first_token_hits": 2,
        "interval": {"position_fraction": [0.2, 0.3], "passes": 0.98},
        "max_sd": 31.5,
    }


def summary(seed: int = 0, study_id: str = STUDY_ID) -> dict[str, Any]:
    """summary.json of a model with LAYERS x HIDDEN, two sites and two systematic features."""
    found = [feature(7, 33.75 + seed), feature(3, 12.5)]
    readings: dict[str, Any] = {
        site: {"pooled": found, "union": found, "per_layer": found[:1], "affected": found}
        for site in ("attn_in", "mlp_in", "block")
    }
    readings["block"]["legacy"] = {"feature_sequence_pairs": 4, "features": found}
    layer = {"max_magnitude": 33.75, "hits": 210, "nonfinite": 0, "kurtosis": 61.5, "median_magnitude": None}
    layer |= {"quantiles": [2.5, 12.0], "mean_inf_norm": 30.5}
    layer |= {"standard_deviation": 0.4, "sd_hits": [900, 210, 60, 9, 0], "sd_features": [32, 9, 4, 2, 0]}
    counts = {site: {how: len(rows) for how, rows in own.items() if how != "legacy"} for site, own in readings.items()}
    return {
        "schema_version": 1,
        "study_id": study_id,
        "capture_id": CAPTURE_ID,
        "model": {
            "id": "Qwen/Qwen3-0.6B",
            "revision": "c1899de289a04d12100db370d81485cdf75e47ca",
            "architecture": "qwen3",
            "total_parameters": 596_049_920,
            "active_parameters": 596_049_920,
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "dtype": "bfloat16",
            "num_experts": None,
            "quantization": None,
        },
        "corpus": {
            "source": "HuggingFaceFW/fineweb-edu",
            "num_sequences": 2,
            "sequence_length": TOKENS // 2,
            "num_tokens": TOKENS,
            "num_documents": 2,
            "token_sha256": "0" * 64,
            "publish_text": "context",
        },
        "criteria": {
            "magnitude": 6.0,
            "layer_fraction": 0.25,
            "position_fraction": 0.06,
            "reading": "pooled",
            "site": "block",
            "sites": ["attn_in", "mlp_in"],
            "ladder": LADDER,
        },
        "readings": readings,
        "reading_counts": counts | {"block": counts["block"] | {"legacy": 2}},
        "systematic": found,
        "without_first_tokens": {"block": {"pooled": [7], "union": [3, 7], "per_layer": [], "affected": [7]}},
        "intervals": {"level": 0.95, "resamples": 1000, "seed": 0, "counts": {"block": {"pooled": [1, 2]}}}
        | {"shares": "range over sequences"},
        "sd_ladder": {
            "multiples": [3.0, 6.0, 10.0, 20.0, 50.0],
            "features": {site: [32, 9, 4, 2, 0] for site in ("attn_in", "mlp_in", "block")},
            "features_in_layers": {site: [30, 8, 3, 1, 0] for site in ("attn_in", "mlp_in", "block")},
        },
        "quantile_levels": [0.99, 0.9999],
        "layers": [{"site": site, "layer": n, **layer} for site in ("attn_in", "mlp_in") for n in range(LAYERS)],
        "massive": None,
        "massive_count": None,
        "massive_by_token": None,
        "massive_by_token_count": None,
        "massive_undecided": None,
        "sweep": {"magnitudes": LADDER, "counts": {"block": {"pooled": [9, 2, 1], "union": [9, 2, 1]}}}
        | {"counts_without_first_tokens": {"block": {"pooled": [8, 1, 1], "union": [9, 2, 1]}}},
        "histogram": {"attn_in": {"lower_edges": [0.5, 1.0, 2.0], "counts": [900, 80, 4]}},
        "notes": [],
    }


def tokens(study_id: str = STUDY_ID) -> dict[str, Any]:
    """tokens.json, with text."""
    place = {"sequence": 1, "position": 0, "layer": 3, "site": "mlp_in", "value": -33.75}
    return {
        "schema_version": 1,
        "study_id": study_id,
        "site": "block",
        "text": True,
        "features": [
            {
                "feature": 7,
                "tokens": 64,
                "first_token_share": 0.03125,
                "delimiter_share": None,
                "positions": {"bin_tokens": 32, "counts": [40, 10, 8, 6]},
                "top": [{**place, "token": "The", "before": "", "after": " url is data:text/plain,hi"}],
            }
        ],
        "massive": [],
        "massive_features": [
            {
                "feature": 5,
                "tokens": 2,
                "first_token_share": 1.0,
                "delimiter_share": 0.5,
                "positions": {"bin_tokens": 32, "counts": [2, 0, 0, 0]},
            }
        ],
    }


def features(seed: int = 0) -> pa.Table:
    """features.parquet: five features in every layer of both sites and of block."""
    places = [(site, n, j) for site in ("attn_in", "mlp_in", "block") for n in range(LAYERS) for j in range(5)]
    values = np.random.default_rng(seed).uniform(6, 40, len(places)).astype(np.float32)
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES_SCHEMA.names}
    for (site, n, j), value in zip(places, values, strict=True):
        moments = [None] * 3 if site == "block" else [0.1, 1.0 + seed, 40.0]
        row = [site, n, j, TOKENS, 20, [60, 20, 3], 1, -1.0, float(value), float(value), *moments, 31.5]
        for name, cell in zip(columns, row, strict=True):
            columns[name].append(cell)
    return pa.table(columns, schema=FEATURES_SCHEMA)


def make_results(
    folder: Path, *, seed: int = 0, log: bool = False, study_id: str = STUDY_ID, manifest: bool = True
) -> Path:
    """Writes the study into `folder` and returns it; `log` adds run.log to what is published."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary(seed, study_id)))
    (folder / "tokens.json").write_text(json.dumps(tokens(study_id)))
    pq.write_table(features(seed), folder / "features.parquet", compression="zstd")
    (folder / "run.log").write_text("12:00:00 read 256 tokens\n\x1b[32mdone\x1b[0m\n")
    if manifest:
        finish(folder, log=log)
    return folder


def finish(folder: Path, *, log: bool = False) -> dict[str, Any]:
    """Renders the study of the numbers in a folder, and writes the manifest that fits it as it now is."""
    made = make_publishable(
        read_numbers(folder),
        spec={"model": {"id": "Qwen/Qwen3-0.6B"}},
        provenance={"seconds": 1.5},
        log=read_log(folder) if log else None,
    )
    write_publishable(folder, made)
    return made.manifest
