"""What may leave the machine: every allowed file passes, and an activation does not, whatever it is called."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from safetensors.numpy import save as save_safetensors

from outliers.allowlist import allowed_name, check_results
from outliers.errors import PublishRefused
from tests.refusals import refused, results
from tests.results_folder import png

__all__ = ["results"]  # the fixture, found by name

ALLOWED = ("summary.json", "tokens.json", "features.parquet", "report.html", "run.log", "plots/plot_000.png")
ACTIVATIONS = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)


def test_what_is_allowed(results: Path) -> None:
    (results / "manifest.json").write_text("{}")
    paths = [file.path for file in check_results(results, include_log=True)]
    assert paths == sorted([*ALLOWED, "plots/plot_001.png", "plots/plot_002.png"])
    assert [file.path for file in check_results(results)] == [path for path in paths if path != "run.log"]


def test_without_plots_and_report(results: Path) -> None:
    for path in [*(results / "plots").iterdir(), results / "report.html"]:
        path.unlink()
    (results / "plots").rmdir()
    assert [file.path for file in check_results(results)] == ["features.parquet", "summary.json", "tokens.json"]


@pytest.mark.parametrize("name", ["summary.json", "tokens.json", "features.parquet"])
def test_what_a_study_must_have(results: Path, name: str) -> None:
    (results / name).unlink()
    with pytest.raises(PublishRefused, match=name):
        check_results(results)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/summary.json",
        "plots",
        "plots/",
        "plots/A.png",
        "plots/a/b.png",
        "plots/../summary.json",
        "plots/.png",
        "plots/a.png\n",
        "plots/a.jpg",
        "Summary.json",
        "summary.json.gz",
        "activations.zarr",
        "../summary.json",
    ],
)
def test_names_that_are_not_allowed(name: str) -> None:
    assert not allowed_name(name)


# Activations, as the tools that hold them write them.


def zarr_chunk(tmp_path: Path) -> bytes:
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=ACTIVATIONS.shape, chunks=ACTIVATIONS.shape, dtype="float32", compressors=None
    )
    array[:] = ACTIVATIONS
    return (tmp_path / "a.zarr" / "c" / "0" / "0").read_bytes()


def torch_file(tmp_path: Path) -> bytes:
    torch.save(torch.from_numpy(ACTIVATIONS), tmp_path / "a.pt")
    return (tmp_path / "a.pt").read_bytes()


def safetensors_file(tmp_path: Path) -> bytes:
    return save_safetensors({"activations": ACTIVATIONS})


def zero_safetensors(tmp_path: Path) -> bytes:
    # all ASCII and NUL: valid UTF-8
    return save_safetensors({"activations": np.zeros((4, 64), np.float32)})


def parquet_file(tmp_path: Path) -> bytes:
    pq.write_table(pa.table({str(n): row for n, row in enumerate(ACTIVATIONS)}), tmp_path / "a.parquet")
    return (tmp_path / "a.parquet").read_bytes()


def json_file(tmp_path: Path) -> bytes:
    return json.dumps({"schema_version": 1, "activations": ACTIVATIONS.tolist()}).encode()


def base64_file(tmp_path: Path) -> bytes:
    return base64.b64encode(np.tile(ACTIVATIONS, (16, 1)).tobytes())


HOLDERS = [zarr_chunk, torch_file, safetensors_file, zero_safetensors, parquet_file, json_file, base64_file]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("name", [*ALLOWED, "plots/innocent.png"])
def test_activations_under_an_allowed_name(
    results: Path, tmp_path: Path, holder: Callable[[Path], bytes], name: str
) -> None:
    if (holder, name) == (json_file, "run.log"):
        pytest.skip("256 numbers as text in a log are a log")
    (results / name).write_bytes(holder(tmp_path))
    refused(results, name)


@pytest.mark.parametrize(
    "name",
    [
        "weights.pt",
        "model.safetensors",
        "c0",
        ".hidden",
        "plots/a.pt",
        "plots/c.0.0",
        "zarr.json",
        "features.parquet.bak",
    ],
)
def test_activations_under_their_own_name(results: Path, tmp_path: Path, name: str) -> None:
    (results / name).write_bytes(torch_file(tmp_path))
    refused(results, name, "allow-list")


@pytest.mark.parametrize("folder", ["activations.zarr", "plots/activations.zarr", ".zarr", "empty"])
def test_folders(results: Path, folder: str) -> None:
    (results / folder / "c" / "0").mkdir(parents=True)
    refused(results, folder, "is a folder")


@pytest.mark.parametrize("name", ["plots/extra.png", "run.log", "report.html"])
def test_symbolic_links(results: Path, tmp_path: Path, name: str) -> None:
    original = tmp_path / "original"
    original.write_bytes((results / "plots/plot_000.png").read_bytes())
    (results / name).unlink(missing_ok=True)
    (results / name).symlink_to(original)
    refused(results, name, "symbolic link", include_log=False)


def test_linked_plots_folder(results: Path, tmp_path: Path) -> None:
    (results / "plots").rename(tmp_path / "elsewhere")
    (results / "plots").symlink_to(tmp_path / "elsewhere")
    refused(results, "plots", "symbolic link")


def test_a_pipe_does_not_hang(results: Path) -> None:
    os.mkfifo(results / "plots" / "pipe.png")
    refused(results, "plots/pipe.png", "regular file")


def test_too_large_a_file(results: Path) -> None:
    (results / "plots" / "large.png").write_bytes(png(width=1_700, height=1_600))
    refused(results, "plots/large.png", "8,000,000")


def test_too_large_a_study(results: Path) -> None:
    for n in range(3):
        (results / "plots" / f"large{n}.png").write_bytes(png(n, width=1_500, height=1_250))
    refused(results, "16,000,000", "large")


def test_of_a_log_that_is_too_long_the_end_alone_may_pass(results: Path) -> None:
    (results / "run.log").write_text("0.125 " * 200_000)
    (log,) = (file for file in check_results(results, include_log=True) if file.path == "run.log")
    assert 900_000 < log.size <= 1_000_000
    assert "run.log" not in [file.path for file in check_results(results, include_log=False)]
