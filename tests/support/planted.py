"""A results folder that is built here, by brute force, from planted activations: what a report is made from.

Nothing of its numbers comes from the counting that it stands in for. Used by `test_report` and `test_browser`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from outliers.report.plots import Plot
from outliers.report.report import make_page

LADDER = [3.0, 4.5, 6.0, 8.0, 12.0, 20.0, 50.0, 100.0]
QUANTILES = [0.9, 0.99, 0.999, 0.9999]
DRAWS = 10
READINGS = ("pooled", "union", "per_layer", "affected")
TEXT = ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog.\nIt", "was,", "they", "said,", "a", "day"]

Acts = dict[str, np.ndarray]  # site -> (layer, sequence, position, feature) float32


def planted(sites: tuple[str, ...], layers: int, sequences: int, length: int, width: int) -> Acts:
    """Noise of which no value reaches 3, to be planted in."""
    random = np.random.default_rng(7)
    shape = (layers, sequences, length, width)
    return {site: np.clip(random.normal(0, 0.8, shape), -2.9, 2.9).astype(np.float32) for site in sites}


def passes(hit: np.ndarray, reading: str) -> list[int]:
    """Features that pass `reading` by its definition; `hit` is (layer, token, feature) bool."""
    n_layers, n_tokens, width = hit.shape
    found = []
    for j in range(width):
        own = hit[:, :, j]
        touched = own.any(axis=1)
        layers, tokens = touched.sum() / n_layers, own.sum() / (n_layers * n_tokens)
        if reading == "union":
            tokens = own.any(axis=0).sum() / n_tokens
        if reading == "affected":
            tokens = own.sum() / max(touched.sum(), 1) / n_tokens
        if reading == "per_layer":
            layers, tokens = (own.mean(axis=1) >= 0.06).sum() / n_layers, 1.0
        if layers >= 0.25 and tokens >= 0.06:
            found.append(j)
    return found


def drawn(hit: np.ndarray, sequences: int) -> list[np.ndarray]:
    """Corpora made of whole sequences drawn again, none where there is one only; `hit` is (layer, token, feature)."""
    random, length = np.random.RandomState(1), hit.shape[1] // sequences
    chosen = [random.randint(0, sequences, sequences) for _ in range(DRAWS if sequences > 1 else 0)]
    return [np.concatenate([hit[:, s * length : (s + 1) * length] for s in some], axis=1) for some in chosen]


def between(values: list[Any]) -> list[Any]:
    return [min(values), max(values)]


def without_first(hit: np.ndarray, sequences: int) -> np.ndarray:
    """`hit` without the first token of each sequence."""
    return hit[:, np.arange(hit.shape[1]) % (hit.shape[1] // sequences) > 0]


def interval_of(hit: np.ndarray, j: int, sequences: int, reading: str) -> dict[str, Any] | None:
    again = [corpus[:, :, j : j + 1] for corpus in drawn(hit, sequences)]
    return (again and {
        "layer_fraction": between([float(corpus.any(axis=1).mean()) for corpus in again]),
        "position_fraction": None if reading == "per_layer" else between([float(corpus.mean()) for corpus in again]),
        "passes": sum(bool(passes(corpus, reading)) for corpus in again) / len(again),
    }) or None  # fmt: skip


def feature_entry(values: np.ndarray, hit: np.ndarray, j: int, sequences: int, reading: str) -> dict[str, Any]:
    """FEATURE; `values` and `hit` are (layer, token, feature)."""
    own, length = hit[:, :, j], hit.shape[1] // sequences
    layers = np.flatnonzero(own.any(axis=1)).tolist()
    alone = [passes(hit[:, s * length : (s + 1) * length, j : j + 1], reading) for s in range(sequences)]
    return {
        "feature": j, "layer_fraction": len(layers) / hit.shape[0], "layers": layers, "hits": int(own.sum()),
        "position_fraction": None if reading == "per_layer" else float(own.mean()),
        "max_magnitude": float(np.abs(values[:, :, j]).max()), "min": float(values[:, :, j].min()),
        "max": float(values[:, :, j].max()), "sequences": sum(bool(found) for found in alone),
        "of_sequences": sequences, "first_token_hits": int(own[:, ::length].sum()),
        "interval": interval_of(hit, j, sequences, reading),
    }  # fmt: skip


def parquet_rows(site: str, values: np.ndarray, hit: np.ndarray, ladder: list[float], length: int) -> list[dict]:
    rows = []
    for layer, j in np.argwhere(hit.any(axis=1)).tolist():
        x = values[layer, :, j].astype(np.float64)
        rows.append({
            "site": site, "layer": layer, "feature": j, "tokens": len(x), "hits": int(hit[layer, :, j].sum()),
            "ladder_hits": [int((np.abs(x) >= step).sum()) for step in ladder],
            "first_token_hits": int(hit[layer, ::length, j].sum()), "min": x.min(), "max": x.max(),
            "max_magnitude": np.abs(x).max(), "mean": x.mean(), "std": x.std(),
            "kurtosis": ((x - x.mean()) ** 4).mean() / max(x.var() ** 2, 1e-12),
        })  # fmt: skip
    return rows


def layer_row(site: str, layer: int, x: np.ndarray, hits: int) -> dict[str, Any]:
    x = x.astype(np.float64).ravel()
    return {
        "site": site, "layer": layer, "max_magnitude": float(np.abs(x).max()), "hits": hits, "nonfinite": 0,
        "kurtosis": float(((x - x.mean()) ** 4).mean() / x.var() ** 2), "median_magnitude": float(np.median(np.abs(x))),
        "quantiles": np.quantile(np.abs(x), QUANTILES).tolist(), "mean_inf_norm": float(np.abs(x).max()),
    }  # fmt: skip


def token_entry(site: str, values: np.ndarray, hit: np.ndarray, j: int, length: int) -> dict[str, Any]:
    union = hit[:, :, j].any(axis=0)
    where = np.flatnonzero(union)
    order = sorted(np.argwhere(hit[:, :, j]).tolist(), key=lambda at: -abs(float(values[at[0], at[1], j])))
    return {
        "feature": j, "tokens": len(where), "first_token_share": float((where % length == 0).mean()),
        "delimiter_share": 0.25,
        "positions": {"bin_tokens": max(length // 32, 1),
                      "counts": np.bincount(where % length // max(length // 32, 1), minlength=32).tolist()},
        "top": [{"sequence": t // length, "position": t % length, "layer": layer, "site": site,
                 "value": float(values[layer, t, j]), **around(t)} for layer, t in order[:6]],
    }  # fmt: skip


def around(t: int) -> dict[str, str]:
    words = [TEXT[(t + k) % len(TEXT)] + " " for k in range(-6, 7)]
    return {"token": words[6], "before": "".join(words[:6]), "after": "".join(words[7:])}


def histogram(x: np.ndarray) -> dict[str, Any]:
    edges = [0.0, *np.geomspace(0.01, 2000, 80).tolist()]
    return {"lower_edges": edges, "counts": np.histogram(np.abs(x), [*edges, 1e9])[0].tolist()}


def sweep_of(x: np.ndarray, sequences: int, first: bool = True) -> dict[str, list[int]]:
    steps = [np.abs(x) >= step if first else without_first(np.abs(x) >= step, sequences) for step in LADDER]
    return {how: [len(passes(hit, how)) for hit in steps] for how in READINGS}


def massive_of(resid: np.ndarray, length: int) -> tuple[list[dict], list[dict]]:
    found, texts = [], []
    for layer in range(resid.shape[0]):
        median = float(np.median(np.abs(resid[layer])))
        for t, j in np.argwhere(np.abs(resid[layer]) > max(100, 1000 * median)).tolist():
            at = {"layer": layer, "sequence": t // length, "position": t % length, "feature": j}
            at["value"] = float(resid[layer, t, j])
            own = float(np.median(np.abs(resid[layer, t])))
            ratios = {"ratio": abs(at["value"]) / median, "token_median": own, "token_ratio": abs(at["value"]) / own}
            found.append({**at, "token": around(t)["token"], **ratios})
            texts.append({**at, **around(t)})
    found.sort(key=lambda row: -abs(row["value"]))
    return found, texts


def massive_features(found: list[dict], length: int) -> list[dict[str, Any]]:
    """Where the massive activations of each feature sit."""
    rows = []
    for feature in dict.fromkeys(row["feature"] for row in found):
        places = {(row["sequence"], row["position"]) for row in found if row["feature"] == feature}
        positions = np.array([position for _, position in places])
        rows.append({
            "feature": feature, "tokens": len(places), "first_token_share": float((positions == 0).mean()),
            "delimiter_share": 0.25, "special_share": 0.125,
            "positions": {"bin_tokens": 1, "counts": np.bincount(positions, minlength=length).tolist()},
        })  # fmt: skip
    return rows


def header(model: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Ids, model and corpus of a summary; `shape` is (layer, sequence, position, feature)."""
    layers, sequences, length, width = shape
    return {
        "schema_version": 1, "study_id": "5" * 64, "capture_id": "c" * 64,
        "model": {"id": model, "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac", "dtype": "bfloat16",
                  "architecture": "LlamaForCausalLM",
                  "total_parameters": 134_515_008, "active_parameters": 134_515_008, "num_layers": layers,
                  "hidden_size": width, "num_experts": None, "quantization": None},
        "corpus": {"source": "builtin:python-docs", "num_sequences": sequences, "sequence_length": length,
                   "num_tokens": sequences * length, "token_sha256": "a" * 64, "num_documents": 9},
    }  # fmt: skip


def write_results(folder: Path, acts: Acts, model: str = "SmolLM2", reading: str = "pooled") -> dict[str, Any]:
    """The three files that `write_report` reads, counted from `acts`; gives the summary."""
    sites = tuple(acts)
    sequences, length = acts[sites[0]].shape[1:3]
    flat = {site: x.reshape(x.shape[0], -1, x.shape[-1]) for site, x in acts.items()}  # (layer, token, feature)
    if {"attn_in", "mlp_in"} <= set(sites):
        pair = np.stack([flat["attn_in"], flat["mlp_in"]])
        flat["block"] = np.take_along_axis(pair, np.abs(pair).argmax(axis=0)[None], axis=0)[0]
    deciding, hits = "block" if "block" in flat else sites[0], {site: np.abs(x) >= 6 for site, x in flat.items()}

    def listed(site: str, how: str) -> list[dict[str, Any]]:
        found = [feature_entry(flat[site], hits[site], j, sequences, how) for j in passes(hits[site], how)]
        return sorted(found, key=lambda row: (-row["max_magnitude"], row["feature"]))

    readings: dict[str, Any] = {site: {how: listed(site, how) for how in READINGS} for site in flat}
    if "block" in flat:
        pooled = readings["block"]["pooled"]
        readings["block"]["legacy"] = {"feature_sequence_pairs": 2 * len(pooled), "features": pooled}
    counts = {site: {how: len(rows if how != "legacy" else rows["features"]) for how, rows in own.items()}
              for site, own in readings.items()}  # fmt: skip
    again = {site: drawn(hit, sequences) for site, hit in hits.items()}
    ranges_of = {site: {how: between([len(passes(hit, how)) for hit in corpora]) for how in READINGS}
                 for site, corpora in again.items() if corpora}  # fmt: skip
    found, texts = massive_of(flat["resid"], length) if "resid" in flat else (None, [])
    by_token = None if found is None else [row for row in found if row["token_ratio"] >= 1000]
    criteria = {"magnitude": 6.0, "layer_fraction": 0.25, "position_fraction": 0.06, "reading": reading,
                "site": deciding, "sites": list(sites), "ladder": LADDER}  # fmt: skip
    summary = {
        **header(model, acts[sites[0]].shape), "criteria": criteria,
        "readings": readings, "systematic": readings[deciding][reading], "reading_counts": counts,
        "without_first_tokens": {site: {how: passes(without_first(hit, sequences), how) for how in READINGS}
                                 for site, hit in hits.items()},
        "intervals": {"level": 0.95, "resamples": DRAWS, "seed": 0, "counts": ranges_of} if ranges_of else None,
        "quantile_levels": QUANTILES,
        "massive_by_token": by_token, "massive_by_token_count": None if by_token is None else len(by_token),
        "layers": [layer_row(site, layer, flat[site][layer], int(hits[site][layer].sum()))
                   for site in sites for layer in range(len(flat[site]))],
        "massive_count": None if found is None else len(found), "massive": found,
        "sweep": {"magnitudes": LADDER, "counts": {site: sweep_of(x, sequences) for site, x in flat.items()},
                  "counts_without_first_tokens": {site: sweep_of(x, sequences, False) for site, x in flat.items()}},
        "histogram": {site: histogram(flat[site]) for site in sites},
        "notes": ["A norm that serves both sites is stored once."],
    }  # fmt: skip
    chosen = [row["feature"] for row in summary["systematic"]]
    tokens = {
        "schema_version": 1, "study_id": "5" * 64, "site": deciding, "text": True, "massive": texts,
        "massive_features": massive_features(found or [], length),
        "features": [token_entry(deciding, flat[deciding], hits[deciding], j, length) for j in chosen],
    }  # fmt: skip
    rows = [row for site in flat for row in parquet_rows(site, flat[site], hits[site], LADDER, length)]
    folder.mkdir(parents=True, exist_ok=True)
    rewrite(folder, summary, tokens)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "features.parquet")
    (folder / "pictures.json").write_text(json.dumps(pictures_of(flat, deciding, chosen, sequences * length)))
    return summary


KINDS = ("word_start", "delimiter", "digit")


def pictures_of(flat: Acts, deciding: str, chosen: list[int], tokens: int) -> dict[str, Any]:
    """pictures.json; the kind of token t is KINDS[t % 4], and none where there is no such one."""

    def extreme(x: np.ndarray) -> float:
        return float(max(x.tolist(), key=lambda value: (abs(value), value)))

    def by_kind(where: np.ndarray) -> dict[str, int]:
        return {kind: int((where % 4 == index).sum()) for index, kind in enumerate(KINDS)}

    own, width = flat[deciding], flat[deciding].shape[-1]
    reach = np.abs(own).max(axis=(0, 1))
    others = sorted(range(width), key=lambda j: (-reach[j], j))
    listed = list(dict.fromkeys([*chosen, *others]))[:24]
    hits = np.abs(own) >= 6
    where = {j: np.flatnonzero(hits[:, :, j].any(axis=0)) for j in chosen}
    return {
        "schema_version": 1, "study_id": "5" * 64,
        "layers": [{"site": site, "layer": layer, "largest": sorted(
                       ({"feature": j, "value": extreme(x[layer, :, j])} for j in range(width)),
                       key=lambda row: (-abs(row["value"]), row["feature"]))[:3]}
                   for site, x in flat.items() if site != "block" for layer in range(len(x))],
        "features": [{"feature": j, "values": {site: [extreme(x[layer, :, j]) for layer in range(len(x))]
                                               for site, x in flat.items()}} for j in listed],
        "kinds": {"tokens": tokens, "kinds": by_kind(np.arange(tokens)),
                  "features": [{"feature": j, "tokens": len(at), "kinds": by_kind(at)} for j, at in where.items()][:24]},
    }  # fmt: skip


SCHEMA = pa.schema(
    [
        ("site", pa.string()),
        ("layer", pa.int32()),
        ("feature", pa.int32()),
        ("tokens", pa.int64()),
        ("hits", pa.int64()),
    ]
    + [("ladder_hits", pa.list_(pa.int64())), ("first_token_hits", pa.int64())]
    + [(name, pa.float32()) for name in ("min", "max", "max_magnitude", "mean", "std", "kurtosis")]
)


def rewrite(folder: Path, summary: dict[str, Any], tokens: dict[str, Any]) -> None:
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "tokens.json").write_text(json.dumps(tokens))


def example(layers: int = 6, width: int = 16, length: int = 64) -> Acts:
    """Feature 3 is systematic (negative, both sites), 5 in one layer only, 9 at few tokens of all layers."""
    acts = planted(("attn_in", "mlp_in"), layers, 2, length, width)
    acts["attn_in"][: layers // 2 + 1, :, ::3, 3] = -33.75
    acts["mlp_in"][1:, :, ::4, 3] = -9.5
    acts["attn_in"][0, :, :, 5] = 7
    acts["mlp_in"][:, 0, 0, 9] = 120
    return acts


def page_of(folder: Path, provenance: Mapping[str, object] | None = None, plots: Sequence[Plot] = ()) -> bytes:
    """report.html of the numbers in a folder, with these pictures: what `write_report` writes but for drawing them."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".parquet")}
    return make_page(files, plots, provenance or {})
