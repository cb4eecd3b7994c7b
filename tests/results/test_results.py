"""What is written: features.parquet against raw arrays, layers by their own numbers, a process that never loads torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from outliers.counting.analyze import analyze
from outliers.publish.runlog import scrub
from outliers.results.write import write_results
from outliers.steps import run_report
from tests.counting.test_counting import BLOCK, random_acts
from tests.support import oracle, synthetic

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def written(workspace):
    """A study of layers 2, 5, 7 and 11, some values not finite; (folder, private folder, exact arrays)."""
    acts, exact = random_acts(21, "bfloat16", shape=(4, 3, 25))
    acts["attn_in"][1, :, :, 3] = 0x7FC0  # a feature that is NaN everywhere in one layer
    exact["attn_in"][1, :, :, 3] = np.nan
    prepared = synthetic.prepared_for(acts, "bfloat16", layers=(2, 5, 7, 11))
    synthetic.write_capture(prepared, workspace, acts)
    private = analyze(prepared, workspace, synthetic.Silent())
    return write_results(prepared, workspace), private, exact


def test_features_parquet_equals_the_oracle(written):
    folder, private, exact = written
    full = pq.read_table(private / "features.parquet").to_pylist()
    assert len(full) == 3 * 4 * 6
    masks = oracle.hit_masks(exact, 6.0)
    for row in full:
        layer = (2, 5, 7, 11).index(row["layer"])
        mask = masks[row["site"]][layer, :, :, row["feature"]]
        assert row["hits"] == int(mask.sum())
        assert row["first_token_hits"] == int(mask[:, 0].sum())
        if row["site"] == "block":
            assert row["mean"] is row["std"] is row["kurtosis"] is None
            continue
        values = exact[row["site"]][layer, :, :, row["feature"]].ravel()
        finite = values[np.isfinite(values)]
        assert row["tokens"] == finite.size
        if not finite.size:
            assert row["max"] is row["min"] is row["max_magnitude"] is None
            continue
        assert (row["max"], row["min"], row["max_magnitude"]) == (finite.max(), finite.min(), np.abs(finite).max())
        assert row["mean"] == pytest.approx(finite.mean(), rel=1e-6, abs=1e-6)
        assert row["std"] == pytest.approx(finite.std(), rel=1e-6)
        assert row["kurtosis"] == pytest.approx(oracle.pearson_kurtosis(finite), rel=1e-5)
        ladder = [int((np.abs(finite) >= m).sum()) for m in (3.0, 4.5, 6.0, 8.0, 12.0, 20.0, 50.0, 100.0)]
        assert row["ladder_hits"] == ladder
    published = pq.read_table(folder / "features.parquet").to_pylist()
    assert published == [row for row in full if row["hits"]]


def test_layers_bear_their_own_numbers(written):
    folder, _, _ = written
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["layer"] for row in summary["layers"] if row["site"] == "mlp_in"] == [2, 5, 7, 11]
    named = {layer for feature in summary["readings"]["block"]["union"] for layer in feature["layers"]}
    assert named <= {2, 5, 7, 11}
    assert named
    tokens = json.loads((folder / "tokens.json").read_text())
    assert {top["layer"] for feature in tokens["features"] for top in feature["top"]} <= {2, 5, 7, 11}


def test_float_numbers_are_json(written):
    folder, _, _ = written
    for name in ("summary.json", "tokens.json"):
        assert "NaN" not in (folder / name).read_text()
        assert "Infinity" not in (folder / name).read_text()


def test_analysis_never_loads_torch(workspace):
    acts, _ = random_acts(2, "bfloat16", sites=BLOCK)
    prepared = synthetic.prepared_for(acts, "bfloat16")
    synthetic.write_capture(prepared, workspace, acts)
    spec = workspace.root / "spec.json"
    spec.write_text(prepared.model_dump_json())
    script = (
        "import sys; from outliers.__main__ import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'transformers', 'distributed'} & set(sys.modules)))"
    )
    for verb in ("analyze", "report"):
        done = subprocess.run(
            [sys.executable, "-c", script, verb, str(spec), "--workspace", str(workspace.root)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.parametrize("sites", [BLOCK, pytest.param((*BLOCK, "resid"), marks=pytest.mark.studies)])
def test_a_large_model_is_published_in_four_megabytes(workspace, sites):
    """48 layers of 2,048 features, as Qwen3-30B-A3B has; with resid every feature of every layer is over every magnitude.

    Sizes depend on layers and features and hardly on tokens: 4 sequences of 64 fill every bin of every histogram.
    """
    rng = np.random.default_rng(0)
    acts = {}
    for site in sites:
        values = rng.standard_normal((48, 4, 64, 2048), np.float32)
        values *= 25 if site == "resid" else 0.8
        values[16:, :, :, rng.choice(2048, 40, replace=False)] *= 12
        values[2:, :, 0, 7] = 12_000
        acts[site] = (values.view(np.uint32) >> 16).astype(np.uint16)
    prepared = synthetic.prepared_for(acts, "bfloat16", {"site": "block"})
    synthetic.write_capture(prepared, workspace, acts)
    analyze(prepared, workspace, synthetic.Silent())
    run_report(prepared, workspace, synthetic.Silent())
    folder = workspace.study(prepared.study_id)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert {"summary.json", "features.parquet", "report.html", "manifest.json"} <= sizes.keys()
    assert sum(sizes.values()) < 4_000_000, sizes
    content = json.loads((folder / "summary.json").read_text())
    assert len(content["systematic"]) >= 40
    rows = pq.read_table(folder / "features.parquet")
    cut = [note for note in content["notes"] if "features.parquet holds" in note]
    assert len(cut) == ("resid" in sites)
    if cut:
        assert f"{rows.num_rows:,} of" in cut[0]
        # the systematic features' rows are all there
        full = pq.read_table(workspace.summary(prepared.capture_id, prepared.study_id) / "features.parquet")
        numbers = pa.array([item["feature"] for item in content["systematic"]], pa.int32())
        wanted = [
            table.filter(pc.and_(pc.equal(table["site"], "block"), pc.is_in(table["feature"], numbers)))
            for table in (full.filter(pc.greater(full["hits"], 0)), rows)
        ]
        assert wanted[0].num_rows == wanted[1].num_rows > 0


def test_the_table_loads_in_pandas_polars_and_duckdb(written, monkeypatch):
    """The lines of docs/usage.md, in a results folder."""
    folder, _, _ = written
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "usage.md").read_text(), re.DOTALL)
    known = {name: pytest.importorskip(name) for name in ("pandas", "polars", "duckdb")}
    found = [eval(line, known) for line in block.splitlines()]
    largest = max(pq.read_table("features.parquet").to_pylist(), key=lambda row: row["max_magnitude"])
    frames = [found[0].to_dict("records"), found[1].to_dicts(), found[2].fetchdf().to_dict("records")]
    assert [frame[0]["max_magnitude"] for frame in frames] == [largest["max_magnitude"]] * 3
    assert [list(frame[0]) for frame in frames] == [list(largest)] * 3


def test_the_log_that_leaves_names_no_place(tmp_path):
    import getpass
    import socket

    text = f"reading {tmp_path}/x.txt and {Path.home()}/.cache and /opt/models/big as on {socket.gethostname()}; 3/4 done, s3://b/c"
    cleaned = scrub(text, tmp_path)
    for secret in (str(tmp_path), str(Path.home()), "/opt/models", socket.gethostname()):
        assert secret not in cleaned
    assert "3/4 done, s3://b/c" in cleaned
    assert getpass.getuser() not in scrub(f"user {getpass.getuser()}", tmp_path).split()
