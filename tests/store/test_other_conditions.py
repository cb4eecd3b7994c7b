"""A capture that was begun under other conditions, or that another process holds or has put files into.

Each ends in an error or a right resume, never in a wrong capture.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
import torch

from outliers.capture.extract import extract
from outliers.capture.libraries import LOOKED_FOR, cublas_version, libraries
from outliers.errors import BadInput, Busy, CaptureError, CaptureMismatch
from outliers.store.captures import find_capture, list_captures, remove_capture
from outliers.store.chunks import Journal, hold
from outliers.store.fingerprint import read_fingerprint, write_fingerprint
from outliers.store.verify import verify
from tests.capture.test_faults import assert_identical
from tests.support.damaged import copy, whole
from tests.support.synthetic import Silent

__all__ = ["copy", "whole"]  # fixtures, found by name


def rewrite(folder, change):
    """capture.json as it would have been written under another condition, checksum and all."""
    found = read_fingerprint(folder)
    change(found)
    found.pop("crc32")
    write_fingerprint(folder, found)


@pytest.mark.parametrize(
    "name",
    [
        "torch",
        "transformers",
        "numpy",
        "zarr",
        "token_sha256",
        "lengths_sha256",
        "revision",
        "device",
        "instructions",
        "dtype",
    ],
)
def test_other_conditions_are_refused_with_both_values(copy, name):
    workspace, study, folder = copy
    before = read_fingerprint(folder)["fixed"][name]
    rewrite(folder, lambda found: found["fixed"].update({name: "0.0.1"}))
    with pytest.raises(CaptureMismatch) as refused:
        extract(study, workspace, Silent())
    assert f"was begun with {name} 0.0.1, now it is {before}" in str(refused.value)
    assert f"outliers captures rm {study.capture_id}" in str(refused.value)


def install(place, name, version):
    """A package as `importlib.metadata` finds it, and nothing to import."""
    folder = place / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("kernels", "kernels"),
        ("fla-core", "fla"),
        ("flash-linear-attention", "fla"),
        ("causal-conv1d", "causal_conv1d"),
    ],
)
def test_libraries_that_transformers_takes_by_itself_are_conditions(copy, tmp_path, monkeypatch, package, name):
    workspace, study, folder = copy
    Journal.open(folder / "journal.jsonl").redo([0])
    site = tmp_path / "site"
    install(site, package, "0.16.2")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(site)
        with pytest.raises(
            CaptureMismatch, match=rf"was begun without {name}, now it is 0\.16\.2: go on under the old one"
        ):
            extract(study, workspace, Silent())
        # the first captures did not look for any: they go on as they always did
        rewrite(folder, lambda found: found.pop("looked_for"))
        assert extract(study, workspace, Silent())["sequences"] == 2
    assert name not in read_fingerprint(folder)["fixed"]


@pytest.mark.parametrize("name", ["cuda", "cublas", "triton", "kernels", "fla", "causal_conv1d"])
def test_libraries_that_are_gone_are_missed(copy, name):
    workspace, study, folder = copy
    rewrite(folder, lambda found: found["fixed"].update({name: "0.0.1"}))
    with pytest.raises(CaptureMismatch, match=rf"was begun with {name} 0\.0\.1, now it is not here"):
        extract(study, workspace, Silent())


def test_what_belongs_to_gpus_is_asked_where_they_compute(tmp_path, monkeypatch):
    install(tmp_path, "triton", "3.5.1")
    install(tmp_path, "kernels", "0.16.2")
    monkeypatch.syspath_prepend(tmp_path)
    assert libraries(gpu=False) == {"kernels": "0.16.2"}
    found = libraries(gpu=True)
    assert found.items() >= {"kernels": "0.16.2", "triton": "3.5.1"}.items()
    assert ("cuda" in found) == (torch.version.cuda is not None)
    assert set(found) <= set(LOOKED_FOR)


def test_cublas_tells_its_own_version(tmp_path, monkeypatch):
    """Asked of the library that is loaded, here one of three lines; of its package where none is."""
    assert cublas_version(None) is None
    assert cublas_version("98.2") is None
    install(tmp_path / "site", "nvidia-cublas-cu98", "98.7.1")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert cublas_version("98.2") == "98.7.1"
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    source, library = tmp_path / "cublas.c", tmp_path / "libcublas-of-torch.so"
    source.write_text(
        "int cublasGetProperty(int what, int *value) { *value = what == 0 ? 97 : what == 1 ? 3 : 12; return 0; }"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcublas.so.97", "-o", library, source], check=True)
    loaded = ctypes.CDLL(str(library))
    assert cublas_version("97.1") == "97.3.12"
    assert loaded is not None


def test_it_goes_on_with_the_number_of_threads_it_was_begun_with(copy):
    """Others sum in another order: half of a capture would have other last bits."""
    workspace, study, folder = copy
    before = torch.get_num_threads()
    rewrite(folder, lambda found: found.update(threads=before + 1))
    Journal.open(folder / "journal.jsonl").redo([0])
    try:
        assert extract(study, workspace, Silent())["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_newer_format_is_refused(copy):
    workspace, study, folder = copy
    rewrite(folder, lambda found: found["fixed"].update(format=99))
    with pytest.raises(CaptureMismatch, match="has format 99, this version reads up to 1: upgrade"):
        extract(study, workspace, Silent())


def test_foreign_files_are_named_and_left_alone(whole, copy):
    workspace, study, folder = copy
    strangers = ("notes.txt", "mlp_in/c.99.0.0.0.bak", "resid/.nfs0001", "other/zarr.json")
    for name in strangers:
        path = folder / "activations.zarr" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    found = verify(folder, Silent())
    assert found.sound
    assert found.foreign == tuple(sorted(f"activations.zarr/{name}" for name in strangers))
    Journal.open(folder / "journal.jsonl").redo([0, 3])
    assert extract(study, workspace, Silent())["sequences"] == 4
    for name in strangers:
        path = folder / "activations.zarr" / name
        assert path.read_text() == "mine"
        path.unlink()
    (folder / "activations.zarr" / "other").rmdir()
    assert_identical(whole[0], workspace, study)


def test_something_in_the_way_is_an_error_that_names_it(copy):
    workspace, study, folder = copy
    site = folder / "activations.zarr" / "mlp_in"
    (site / "c.0.1.0.0").unlink()
    (site / "c.0.1.0.0").mkdir()
    with pytest.raises(CaptureError, match=r"c\.0\.1\.0\.0 can't be written \(Is a directory\)"):
        extract(study, workspace, Silent())
    # its whole batch is to be computed again, and is not done until then; the other one is
    assert sorted(Journal.open(folder / "journal.jsonl").done) == [2, 3]
    shutil.rmtree(site)
    site.write_text("in the way")
    with pytest.raises(CaptureError, match="mlp_in is in the way of a folder of the capture"):
        extract(study, workspace, Silent())


def test_a_capture_in_use_is_neither_written_repaired_nor_removed(copy):
    workspace, study, folder = copy
    Journal.open(folder / "journal.jsonl").redo([0])
    with hold(folder):
        for action in (
            lambda: extract(study, workspace, Silent()),
            lambda: verify(folder, Silent(), repair=True),
            lambda: remove_capture(workspace, study.capture_id),
        ):
            with pytest.raises(Busy, match="another process is writing"):
                action()
        assert verify(folder, Silent()).sound  # looking is allowed
    assert extract(study, workspace, Silent())["sequences"] == 2


def test_a_capture_is_found_by_id_or_folder_and_removed_whole(copy):
    workspace, study, folder = copy
    assert find_capture(workspace, study.capture_id) == find_capture(workspace, str(folder)) == folder
    for name in ("nothing", "..", ".", "../ws/captures", str(workspace.root)):
        with pytest.raises(BadInput, match="there is no capture"):
            find_capture(workspace, name)
    (held,) = list_captures(workspace)
    assert (held.done, held.of_sequences) == (4, 4)
    assert remove_capture(workspace, study.capture_id) == held.bytes
    assert list_captures(workspace) == ()
