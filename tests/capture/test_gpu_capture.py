"""The benchmark for a GPU, tried without one: a real model, the real pieces, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu_capture", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.studies
def test_the_benchmark_for_a_gpu_runs(tmp_path, split):
    """Its own code, on the CPU; with two parts also the hooks that move tensors from one device to the other."""
    figures, shape = tmp_path / "figures.json", ("--hidden", 64, "--layers", 2, "--length", 16, "--sequences", 2)
    asked = ("--device", "cpu", "--rounds", 1, "--split", split, "--parts", "costs,waits,kernels")
    done = benchmark(*asked, *shape, "--scratch", tmp_path, "--json", figures)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("every tensor equal") == 2
    found = json.loads(figures.read_text())
    (run,) = found["runs"]
    assert (run["equal"], run["within_bound"], run["tensors"], run["tokens"]) == (True, True, 6, 32)
    assert len(run["devices"]) == split
    assert set(run["seconds"]) == {"bare", "hooks", "copy", "full"}
    assert all(seconds > 0 for seconds in run["seconds"].values())
    assert list(tmp_path.iterdir()) == [figures], "the benchmark left files"
    assert found["waits"] == {"bare": None, "captured": None, "layers": 2}, "without a GPU nothing is known of them"
    assert found["kernels"].get("equal", True) is True
    assert found["left_out"] == []
    said = {what: holds for holds, what in found["decisions"]}
    on = " + ".join(["cpu"] * split)
    assert said[f"{on}: every tensor on disk is the model's own: captures on such a GPU can be believed"] is True
    assert all(holds is not False for holds in said.values())
    assert "holds   cpu" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_benchmark_says_what_it_needs():
    done = benchmark()
    assert done.returncode == 2
    assert "needs a machine with an NVIDIA GPU" in done.stderr
    assert not done.stdout


@pytest.mark.long
def test_the_study_on_a_gpu_runs(tmp_path):
    """Its own code, on the CPU: a capture twice, killed and resumed, in batches."""
    figures, shape = tmp_path / "figures.json", ("--hidden", 64, "--layers", 2, "--length", 64, "--study-sequences", 9)
    asked = ("--device", "cpu", "--parts", "study", "--seconds", 600, "--scratch", tmp_path, "--json", figures)
    done = benchmark(*asked, *shape)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())["study"]
    assert "holds   the same capture twice has the same bits" in done.stdout
    assert (found["twice_equal"], found["killed_equal"], found["counts_equal"]) == (True, True, True)
    assert 0 < found["killed_after"] < 9, "it was killed before it began, or after its end"
    assert set(found["batches"]) == {"1", "4", "8"}
    assert list(tmp_path.iterdir()) == [figures], "the benchmark left files"
