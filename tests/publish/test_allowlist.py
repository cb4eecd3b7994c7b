"""What may leave: numbers of an exact form under three names, and a log; an activation does not, whatever it is called."""

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

from outliers.errors import ForbiddenFile, PublishRefused
from outliers.publish.allowlist import NUMBERS, allowed_name, check_listing, read_log, read_numbers
from tests.support.refusals import refused, results

__all__ = ["results"]  # the fixture, found by name

ACTIVATIONS = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)


def test_what_is_allowed(results: Path) -> None:
    (results / "manifest.json").write_text("{}")
    (results / "plots").mkdir()
    (results / "plots" / "sweep.png").write_bytes(b"whatever: it is never read")
    check_listing(results)
    assert tuple(read_numbers(results).files) == NUMBERS
    assert read_log(results) == (results / "run.log").read_bytes()


@pytest.mark.parametrize("name", NUMBERS)
def test_what_a_study_must_have(results: Path, name: str) -> None:
    (results / name).unlink()
    with pytest.raises(PublishRefused, match=name):
        read_numbers(results)


def test_without_a_log(results: Path) -> None:
    (results / "run.log").unlink()
    assert read_log(results) is None


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
@pytest.mark.parametrize("name", [*NUMBERS, "run.log"])
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
    (results / "plots").mkdir()
    (results / name).write_bytes(torch_file(tmp_path))
    refused(results, name, "allow-list")


@pytest.mark.parametrize("folder", ["activations.zarr", "plots/activations.zarr", ".zarr", "empty"])
def test_folders(results: Path, folder: str) -> None:
    (results / folder / "c" / "0").mkdir(parents=True)
    refused(results, folder, "is a folder")


@pytest.mark.parametrize("name", ["plots/extra.png", "run.log", "report.html", "tokens.json"])
def test_symbolic_links(results: Path, tmp_path: Path, name: str) -> None:
    original = tmp_path / "original"
    original.write_bytes((results / "tokens.json").read_bytes())
    (results / "plots").mkdir()
    (results / name).unlink(missing_ok=True)
    (results / name).symlink_to(original)
    refused(results, name, "symbolic link")


@pytest.mark.parametrize("read", [read_numbers, read_log])
def test_no_link_is_followed(results: Path, tmp_path: Path, read: Callable[[Path], object]) -> None:
    for name in ("tokens.json", "run.log"):
        (results / name).rename(tmp_path / name)
        (results / name).symlink_to(tmp_path / name)
    with pytest.raises(PublishRefused, match="can't be read"):
        read(results)


def test_linked_plots_folder(results: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (results / "plots").symlink_to(tmp_path / "elsewhere")
    refused(results, "plots", "symbolic link")


@pytest.mark.parametrize("name", ["summary.json", "run.log"])
def test_a_pipe_does_not_hang(results: Path, name: str) -> None:
    (results / name).unlink()
    os.mkfifo(results / name)
    refused(results, name, "regular file")


@pytest.mark.parametrize("name", NUMBERS)
def test_too_large_a_file(results: Path, name: str) -> None:
    with (results / name).open("ab") as file:
        file.truncate(8_000_001)
    refused(results, name, "8,000,000")


def test_of_a_log_that_is_too_long_the_end_alone_may_pass(results: Path) -> None:
    (results / "run.log").write_text("0.125 " * 200_000)
    assert 900_000 < len(read_log(results) or b"") <= 1_000_000


def test_a_refusal_names_a_remedy(results: Path) -> None:
    (results / "summary.json").write_text("{}")
    with pytest.raises(ForbiddenFile, match="write the study's results again"):
        read_numbers(results)
