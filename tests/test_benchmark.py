"""The benchmark of capturing, small: every variant runs, the figures hang together, nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.servers
def test_every_variant_runs_and_the_figures_hang_together(tmp_path, smollm2_workspace):
    figures, scratch = tmp_path / "figures.json", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "benchmarks.capture", "--sequences", "1", "--length", "64", "--rounds", "1"]
    where = ["--workspace", str(smollm2_workspace.root), "--scratch", str(scratch), "--json", str(figures)]
    done = subprocess.run(
        [*command, *where, "--no-memory"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["bytes"] == 30 * 2 * 64 * 576 * 2
    assert set(found["seconds"]) == set("abcdef")
    assert found["ratios"]["f/d"] == pytest.approx(found["seconds"]["f"] / found["seconds"]["d"])
    assert set(found["write_rate_of_raw"]) == {"ours", "ring", "zstd", "zarr"}
    assert "| d | hooks + copy + Zarr |" in done.stdout
    assert list(scratch.iterdir()) == [], "the benchmark left files"
    peak = subprocess.run(
        [*command, *where[:4], "--peak", "d"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    assert 200e6 < int(peak.stdout) < 3e9
