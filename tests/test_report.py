"""The report from a results folder that is built here, by brute force, from planted activations."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from outliers.errors import BadInput, WorkspaceError
from outliers.plots import log_bins
from outliers.report import PLOT_TEXTS, clip, ranges, visible, write_report

LADDER = [3.0, 4.5, 6.0, 8.0, 12.0, 20.0, 50.0, 100.0]
QUANTILES = [0.9, 0.99, 0.999, 0.9999]
DRAWS = 10
READINGS = ("pooled", "union", "per_layer", "affected")
EVIL = "<script>alert(1)</script>"
PROVENANCE = {"versions": {"torch": "2.9.1", "zarr": "3.1.5"}, "devices": ["cpu"], "stages": [{"name": "extract"}]}
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
            "delimiter_share": 0.25,
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
    return summary


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


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def read(folder: Path) -> tuple[str, Page]:
    html = (folder / "report.html").read_text("utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    write_results(folder, example())
    write_report(folder, PROVENANCE)
    return folder


def test_the_answer_comes_first(results: Path) -> None:
    html, page = read(results)
    assert html.startswith("<!doctype html>")
    assert (
        "SmolLM2 has 1 systematic outlier feature by the reading pooled at block: "
        "abs(x) ≥ 6 in at least 25% of 6 layers and 6% of 128 tokens."
    ) in page.text
    assert page.text.index("has 1 systematic") < page.text.index("Every reading, every site")
    assert "-33.75" in page.text
    assert "0-5" in page.text  # the layers of feature 3
    assert "torch" in page.text and "stages.0.name" in page.text
    assert "--sites attn_in,mlp_in,resid" in page.text


def test_images_are_the_plots(results: Path) -> None:
    """Each <img> has an alternative text and the bytes of a file in plots/; each file is on the page."""
    _, page = read(results)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    inside = {base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,")) for image in images}
    files = {path.name: path.read_bytes() for path in (results / "plots").iterdir()}
    assert set(files) == set(PLOT_TEXTS) - {"massive_positions.png"}  # resid was not captured
    assert inside == set(files.values())
    assert all(image["alt"] for image in images)
    for png in files.values():
        with Image.open(io.BytesIO(png)) as image:
            image.load()
            assert set(image.info) <= {"dpi"}  # no date, no program
        assert len(png) < 150_000


def test_the_page_loads_nothing(results: Path) -> None:
    html, page = read(results)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)
    assert not re.search(r"url\(|@import|https?://", html)
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        folders = [tmp_path / str(index) for index in range(3)]
        for folder in folders:
            write_results(folder, example())
        written = list(pool.map(lambda folder: write_report(folder, PROVENANCE), folders))
    digests = [[(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths] for paths in written]
    assert digests[0] == digests[1] == digests[2]
    drawn_plots = [name for name in PLOT_TEXTS if name != "massive_positions.png"]  # resid was not captured
    assert [name for name, _ in digests[0]] == [*drawn_plots, "report.html"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_text_is_escaped_wherever_it_comes_from(tmp_path: Path) -> None:
    summary = write_results(tmp_path, example() | planted(("resid",), 6, 2, 64, 16), model=f"{EVIL}$\\frac")
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    nasty = {"token": EVIL, "before": f"a\n{EVIL}\u202e", "after": f'" onload="x\ud800{EVIL}'}
    for row in tokens["features"][0]["top"]:
        row.update(nasty)
    summary["corpus"]["source"] = summary["model"]["architecture"] = summary["notes"][0] = EVIL
    at = {"layer": 1, "sequence": 0, "position": 5, "feature": 2, "value": 900.0}
    summary["massive"], summary["massive_count"] = [{**at, "token": EVIL, "ratio": None}], 1
    tokens["massive"] = [{**at, **nasty}]
    rewrite(tmp_path, summary, tokens)
    write_report(tmp_path, {EVIL: {EVIL: EVIL}})
    html, page = read(tmp_path)
    assert "<script" not in html
    assert "\u202e" not in html
    assert not any(tag == "script" or any(name.startswith("on") for name in attrs) for tag, attrs in page.tags)
    # model (h1, answer), architecture, corpus, note, provenance (twice as the name, once as the value), 3 a context
    assert page.text.count(EVIL) >= 8 + 3 * (len(tokens["features"][0]["top"]) + 1)
    assert "a⏎" in page.text
    assert [attrs for tag, attrs in page.tags if tag == "mark"]


@pytest.mark.parametrize(
    ("plant", "words", "plots"),
    [
        # nothing above 3: the largest magnitude is named, and there is no heat map
        (lambda x: None, "No value reached abs(x) ≥ 6; the largest magnitude is 2.9, at attn_in", 3),
        # 1 of 6 layers is 16.7% (25% needed), 128 of 768 pairs are 16.7% (6% needed)
        (lambda x: x["attn_in"][0, :, :, 5].fill(7), "feature 5 (up to 7) with 16.7% of layers and 16.7% of tokens", 4),
    ],
)
def test_no_systematic_feature(tmp_path: Path, plant: Any, words: str, plots: int) -> None:
    acts = planted(("attn_in", "mlp_in"), 6, 2, 64, 16)
    plant(acts)
    write_results(tmp_path, acts)
    paths = write_report(tmp_path, {})
    _, page = read(tmp_path)
    assert "has no systematic outlier features by the reading pooled" in page.text
    assert words in page.text
    assert len(paths) == plots + 1


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        ("pooled", "feature 4 (up to -8) with 50% of layers and 5.47% of tokens"),  # 3 * 14 / 768
        ("affected", "feature 4 (up to -8) with 50% of layers and 10.9% of tokens"),  # 14 / 128
        ("union", "feature 4 (up to -8) with 50% of layers and at least 10.9% of tokens"),
        ("per_layer", "feature 4 (up to -8) with 50% of layers; feature 2"),
    ],
)
def test_what_nearly_passed(tmp_path: Path, reading: str, words: str) -> None:
    """Feature 4 is hit at tokens 0..6 of both sequences in 3 of 6 layers; feature 2 at one token is further off."""
    acts = planted(("attn_in", "mlp_in"), 6, 2, 64, 16)
    acts["mlp_in"][2:5, :, :7, 4] = -8
    acts["attn_in"][0, 0, 0, 2] = 50
    summary = write_results(tmp_path, acts, reading=reading)
    summary["systematic"] = []  # where the reading passes it, as if the rule had been a little stricter
    rewrite(tmp_path, summary, json.loads((tmp_path / "tokens.json").read_text()) | {"features": []})
    write_report(tmp_path, {})
    assert f"Nearest to it: {words}" in read(tmp_path)[1].text


@pytest.mark.parametrize(
    ("sites", "layers"), [(("resid",), 6), (("resid",), 1), (("attn_in", "mlp_in"), 56), (("o_in",), 1)]
)
def test_other_shapes(tmp_path: Path, sites: tuple[str, ...], layers: int) -> None:
    acts = planted(sites, layers, 2, 32, 12)
    acts[sites[0]][:, :, ::2, 1] = 2000.0
    write_results(tmp_path, acts)
    paths = write_report(tmp_path, {})
    html, page = read(tmp_path)
    assert f"in at least 25% of {layers} layer{'' if layers == 1 else 's'} and 6% of 64 tokens" in page.text
    massive = bool(json.loads((tmp_path / "summary.json").read_text())["massive"])
    assert len(paths) == len(PLOT_TEXTS) + massive
    assert ("feature-sequence pairs" in page.text) == ("attn_in" in sites)
    assert ("× median" in page.text) == ("resid" in sites)
    assert ("was not captured" in page.text) == ("resid" not in sites)
    assert len(re.sub(r'base64,[^"]*', "", html)) < 300_000


def test_nonfinite_values_are_shown_at_the_top(tmp_path: Path) -> None:
    summary = write_results(tmp_path, example())
    assert "non-finite" not in render_text(tmp_path)
    summary["layers"][2] |= {"nonfinite": 17, "kurtosis": None, "max_magnitude": None, "median_magnitude": None}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = render_text(tmp_path)
    assert "17 non-finite values (NaN or infinite)" in text
    assert "attn_in of layer 2: 17." in text
    assert text.index("17 non-finite") < text.index("Every reading, every site")


def render_text(folder: Path) -> str:
    write_report(folder, {})
    return read(folder)[1].text


def test_text_that_is_not_published_is_not_there(tmp_path: Path) -> None:
    summary = write_results(tmp_path, example())
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    tokens["text"] = False
    for row in tokens["features"][0]["top"]:
        row.update(token=None, before=None, after=None)
    rewrite(tmp_path, summary, tokens)
    text = render_text(tmp_path)
    assert "positions only" in text
    assert "token in its text" not in text


def test_hundreds_of_features_stay_small(tmp_path: Path) -> None:
    """400 systematic features with long contexts: the page says what it leaves out and stays below 300 KB."""
    summary = write_results(tmp_path, example(layers=48, width=16, length=32))
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    one, context = summary["systematic"][0], tokens["features"][0]
    one["layers"] = list(range(0, 48, 2))
    summary["systematic"] = [{**copy.deepcopy(one), "feature": j} for j in range(400)]
    for row in context["top"]:
        row.update(token="t" * 5000, before="b" * 5000, after="a" * 5000)
    tokens["features"] = [{**context, "feature": j} for j in range(400)]
    rewrite(tmp_path, summary, tokens)
    write_report(tmp_path, {"spec": {str(index): "x" * 5000 for index in range(900)}})
    html, page = read(tmp_path)
    assert "The 100 largest of 400" in page.text
    assert "more in manifest.json" in page.text
    assert len(re.sub(r'base64,[^"]*', "", html)) < 300_000
    assert all(path.stat().st_size < 150_000 for path in (tmp_path / "plots").iterdir())


def test_plots_of_an_earlier_report_go(tmp_path: Path) -> None:
    write_results(tmp_path, example())
    write_report(tmp_path, {})
    (tmp_path / "plots" / "mine.png").write_bytes(b"kept: not ours")
    write_results(tmp_path, planted(("attn_in", "mlp_in"), 6, 2, 64, 16))
    write_report(tmp_path, {})
    left = {path.name for path in (tmp_path / "plots").iterdir()}
    assert left == {"layer_curves.png", "magnitudes.png", "sweep.png", "mine.png"}


def test_unusable_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"summary\.json does not exist"):
        write_report(tmp_path, {})
    summary = write_results(tmp_path, example())
    (tmp_path / "features.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(BadInput, match="not a readable table"):
        write_report(tmp_path, {})
    (tmp_path / "summary.json").write_text(json.dumps(summary)[:-5])
    with pytest.raises(BadInput, match="not readable JSON"):
        write_report(tmp_path, {})
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"schema_version": 2}))
    with pytest.raises(WorkspaceError, match="schema_version 2"):
        write_report(tmp_path, {})
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("lower", "counts", "shown", "edges"),
    [
        # zeros and what is below 2**-10 share the first bin
        ([0.0, 1e-9, 2.0**-10, 1.0], [5, 2, 3, 4], [7, 3, 4], [2.0**-11, 2.0**-10, 1.0, 1.25]),
        # nothing small, empty ends: only the filled part
        ([2.0, 3.0, 4.0, 6.0], [0, 1, 9, 0], [1, 9], [3.0, 4.0, 6.0]),
        # zeros alone, and one bin alone
        ([0.0], [8], [8], [2.0**-11, 2.0**-10]),
        ([8.0], [2], [2], [8.0, 10.0]),
    ],
)
def test_bins_of_the_histogram(lower: list[float], counts: list[int], shown: list[int], edges: list[float]) -> None:
    got_counts, got_edges = log_bins(np.array(counts), np.array(lower))
    assert got_counts.tolist() == shown
    assert got_edges.tolist() == edges


def test_small_words() -> None:
    assert ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9-10"
    assert ranges([]) == ""
    assert visible("a\r\nb\tc\x00\u202e") == "a⏎b⇥c\ufffd\ufffd"
    assert (clip("abcdef", 4), clip("abcdef", 4, keep_end=True), clip("abc", 3)) == ("abc…", "…def", "abc")
