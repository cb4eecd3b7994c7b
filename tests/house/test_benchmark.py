"""The benchmarks of capturing and of analysis, small: every variant runs, the figures hang together, nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.servers
@pytest.mark.studies
def test_every_variant_runs_and_the_figures_hang_together(tmp_path, smollm2_workspace):
    figures, scratch = tmp_path / "figures.json", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "benchmarks.capture", "--sequences", "1", "--length", "16", "--rounds", "1"]
    where = ["--workspace", str(smollm2_workspace.root), "--scratch", str(scratch), "--json", str(figures)]
    done = subprocess.run(
        [*command, *where, "--no-memory"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["bytes"] == 30 * 2 * 16 * 576 * 2
    assert set(found["seconds"]) == set("abcdef")
    assert found["ratios"]["f/d"] == pytest.approx(found["seconds"]["f"] / found["seconds"]["d"])
    assert set(found["write_rate_of_raw"]) == {"ours", "ring", "zstd", "zarr"}
    assert "| d | hooks + copy + Zarr |" in done.stdout
    assert list(scratch.iterdir()) == [], "the benchmark left files"
    peak = subprocess.run(
        [*command, *where[:4], "--peak", "d"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    assert 200e6 < int(peak.stdout) < 3e9


@pytest.mark.servers
@pytest.mark.studies
def test_the_benchmark_of_analysis_runs_and_counts_the_same(tmp_path, smollm2_workspace):
    figures, scratch = tmp_path / "figures.json", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "benchmarks.analysis", "--small", "--rounds", "1", "--json", str(figures)]
    where = ["--workspace", str(smollm2_workspace.root), "--scratch", str(scratch)]
    done = subprocess.run([*command, *where], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["data"].keys() == {"smollm2", "qwen3", "dense"}
    for data in found["data"].values():
        assert data["one over"]["absmax"] == pytest.approx(data["seconds"]["absmax"] / data["seconds"]["one"])
        assert data["all over"].keys() == {"one", "earlier"}
    assert found["kernels"].keys() == {"numpy", "torch", "numba", "numpy, abs().max() alone"}
    assert found["memory"]["smollm2"].keys() == {"1", "2"}
    assert "| all statistics, one thread, in memory | GB/s |" in done.stdout
    assert list(scratch.iterdir()) == [], "the benchmark left files"


@pytest.mark.servers
@pytest.mark.studies
def test_the_benchmark_of_layers_compares_the_same_captures(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.layers", "--layers", "3", "--sequences", "1", "--length", "16"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--json", str(figures)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found.keys() == {"dense", "experts"}
    for kind in found.values():
        assert (kind["same"], kind["fits"]) == (True, True)
        assert kind["allowed_bytes"] == 2 * kind["layer_bytes"] + kind["around_bytes"] + 150_000_000
        assert kind["ratio"] == pytest.approx(kind["seconds"]["layers"] / kind["seconds"]["whole"])


def test_the_ways_that_are_compared_count_the_same():
    """numpy, torch, the earlier pipeline's loop and the project's own loops on the same values."""
    import numpy as np
    import torch

    from benchmarks import counting
    from outliers.counting.accumulate import Span, Tally
    from outliers.counting.summary import Frame

    rng = np.random.default_rng(0)
    one, other = (
        (rng.standard_t(3, (130, 64)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for _ in range(2)
    )
    peaks, floats = np.zeros((3, 130, 64), np.uint16), torch.zeros((3, 130, 64))
    mine, theirs = counting.by_numpy(one, other, peaks), counting.by_torch(one, other, floats)
    frame = Frame("x", "bfloat16", (("attn_in", 64), ("mlp_in", 64)), 1, 130, 6.0, counting.LADDER, "block")
    tally = Tally(frame)
    tiles = lambda layer: iter([{"attn_in": one.copy(), "mlp_in": other.copy()}])  # noqa: E731
    tally.count(Span(0, 0, 130, np.zeros((5, 130), np.bool_)), range(1), tiles, 130)
    for number, site in enumerate(("attn_in", "mlp_in", "block")):
        totals = tally.summary.sites[site]
        np.testing.assert_array_equal(mine["hits"][number], totals.hits[:, 0])
        np.testing.assert_array_equal(theirs["hits"][number].numpy(), totals.hits[:, 0])
        if site != "block":
            for name in ("max", "min"):
                np.testing.assert_array_equal(mine[name][number], getattr(totals, name)[0])
                np.testing.assert_array_equal(theirs[name][number].numpy(), getattr(totals, name)[0])
            for found in (mine["histogram"][number], theirs["histogram"][number].numpy()):
                np.testing.assert_array_equal(found, totals.histogram[0])
    ((features,),) = counting.earlier([[(0, one), (1, other)]]).values()
    assert sum(entry["count"] for entry in features.values()) == sum(
        int(tally.summary.sites[site].hits[frame.deciding_step].sum()) for site in ("attn_in", "mlp_in")
    )


@pytest.mark.servers
@pytest.mark.studies
def test_the_benchmark_of_the_pass_runs_and_its_summaries_are_equal(tmp_path, smollm2_workspace):
    figures, scratch = tmp_path / "figures.json", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "benchmarks.in_pass", "--sequences", "2", "--length", "16", "--rounds", "1"]
    where = ["--workspace", str(smollm2_workspace.root), "--scratch", str(scratch), "--json", str(figures)]
    done = subprocess.run([*command, *where], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert set(found["seconds"]) == set(found["processor_seconds"]) == {"bare", "stored", "pass"}
    assert found["pass over stored"] == pytest.approx(found["seconds"]["pass"] / found["seconds"]["stored"])
    assert "| pass |" in done.stdout
    assert list(scratch.iterdir()) == [], "the benchmark left files"


@pytest.mark.servers
@pytest.mark.studies
def test_peers_read_what_a_study_reads(tmp_path):
    """Those that need no package: plain hooks, output_hidden_states, and this project, on a tiny model."""
    model, figures, scratch = tiny.make_model(tmp_path / "model", "Llama"), tmp_path / "figures.json", tmp_path / "disk"
    scratch.mkdir()
    command = [sys.executable, "-m", "benchmarks.peers", "--peers", "hooks,hidden,ours", "--model", model]
    command += ["--sequences", "2", "--length", "16", "--rounds", "2", "--json", str(figures)]
    command += ["--workspace", str(tmp_path / "work"), "--scratch", str(scratch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["bytes"] == 3 * 2 * 16 * 32 * 2
    assert {name: one["unlike"] for name, one in found["equality"].items()} == {"hooks": [], "hidden": [2], "ours": []}
    assert list(found["ways"]) == ["bare", "hooks", "hidden", "ours"]
    assert found["ways"]["bare"]["of_bare"] == found["ways"]["bare"]["processor_of_bare"] == 1
    assert "output_hidden_states, torch.save" in done.stdout
    assert "hidden: 2 of 3 layers are those of plain hooks bit for bit; the largest difference is" in done.stdout
    assert list(scratch.iterdir()) == [], "the benchmark left files"
    wrong = subprocess.run([*command, "--peers", "sae"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (wrong.returncode, "sae is not known; known are bare, hooks" in wrong.stderr) == (2, True)
