"""A capture that was begun under other conditions, or that somebody else holds or has put files into.

Each ends in an error or a right resume, never in a wrong capture.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from outliers.capture import extract
from outliers.captures import find_capture, list_captures, remove_capture
from outliers.errors import BadInput, Busy, CaptureError, CaptureMismatch
from outliers.fingerprint import read_fingerprint, write_fingerprint
from outliers.store import Journal, hold
from outliers.verify import verify
from tests.damaged import copy, whole
from tests.synthetic import Silent
from tests.test_faults import assert_identical

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
