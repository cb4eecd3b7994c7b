"""A capture on a disk that lies: torn, cut, flipped.

Each ends in an error or a right resume, never in a wrong capture.
"""

from __future__ import annotations

import json
import os
import random

import pytest

from outliers.capture.extract import extract
from outliers.counting.analyze import analyze
from outliers.errors import CaptureError, CorruptCapture
from outliers.steps import capture_exists, run_verify
from outliers.store.chunks import Journal
from outliers.store.verify import verify
from tests.capture.test_faults import assert_identical
from tests.support.commands import run_command
from tests.support.damaged import copy, flip, whole
from tests.support.synthetic import Silent

__all__ = ["copy", "whole"]  # fixtures, found by name


def whole_entry(whole, sequence):
    """The journal's entry of a sequence of the undamaged capture."""
    workspace, study = whole
    return Journal.open(workspace.capture(study.capture_id) / "journal.jsonl").done[sequence]


def _other(content):
    """Some values of a file changed: numbers of a description, or bytes."""
    return content.translate(bytes.maketrans(b"3\x00", b"4\x01"))


# Cut and torn: what a crash or a power cut leaves. The journal alone says what is done, so a resume is right.


@pytest.mark.parametrize("seed", range(6))
def test_a_journal_cut_at_any_byte_is_continued(whole, copy, seed):
    workspace, study, folder = copy
    journal = folder / "journal.jsonl"
    content = journal.read_bytes()
    cut = random.Random(seed).randrange(len(content)) if seed else content.rfind(b"\n", 0, -1) + 1
    journal.write_bytes(content[:cut])
    left = {json.loads(line)["sequence"] for line in content[:cut].split(b"\n")[:-1]}
    assert not capture_exists(study, workspace)
    assert set(Journal.open(journal).done) == left
    # whole batches: two sequences each
    whole_batches = [run for run in ({0, 1}, {2, 3}) if run <= left]
    assert extract(study, workspace, Silent())["sequences"] == 4 - 2 * len(whole_batches)
    assert_identical(whole[0], workspace, study)


def test_chunks_that_are_missing_short_or_torn_are_computed_again(whole, copy):
    workspace, study, folder = copy
    arrays = folder / "activations.zarr"
    (arrays / "mlp_in" / "c.2.1.0.0").unlink()
    short = arrays / "attn_in" / "c.0.0.0.0"
    short.write_bytes(short.read_bytes()[:-4])
    (arrays / "attn_in" / ".c.0.3.0.0.tmp").write_bytes(b"torn")
    (arrays / "resid" / ".zarr.json.tmp").write_bytes(b"{")
    assert extract(study, workspace, Silent())["sequences"] == 2
    assert_identical(whole[0], workspace, study)
    assert not list(arrays.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["mlp_in/zarr.json", "zarr.json", "token_ids/c/0/0", "mask/zarr.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "other"])
def test_metadata_that_is_gone_or_changed_is_found_and_written_again(whole, copy, name, how):
    workspace, study, folder = copy
    path = folder / "activations.zarr" / name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if how == "empty" else _other(path.read_bytes()))
    found = verify(folder, Silent())
    assert not found.sound
    assert name.split("/")[0] in found.message()
    # what is marked makes the same study run, and any run writes them again
    assert verify(folder, Silent(), repair=True).repaired
    assert extract(study, workspace, Silent())["sequences"] == 2
    assert verify(folder, Silent()).sound
    assert_identical(whole[0], workspace, study)


def test_metadata_that_others_added_to_do_no_harm(copy):
    """zarr's own tools write attributes and consolidated metadata; neither changes a value."""
    import zarr

    workspace, study, folder = copy
    group = zarr.open_group(folder / "activations.zarr", mode="r+")
    group["mlp_in"].attrs["seen_by"] = "somebody"
    with pytest.warns(UserWarning, match="Consolidated metadata"):
        zarr.consolidate_metadata(folder / "activations.zarr")
    assert verify(folder, Silent()).sound
    assert extract(study, workspace, Silent())["sequences"] == 0


# Flipped: what a disk does years later.


def test_a_flipped_bit_in_a_chunk_is_found_named_and_computed_again_alone(whole, copy):
    workspace, study, folder = copy
    flip(folder / "activations.zarr" / "mlp_in" / "c.1.2.0.0", 100)
    with pytest.raises(CorruptCapture, match=r"c\.1\.2\.0\.0 has checksum .* \(sequence 2, layer 1, mlp_in\)"):
        run_verify(study, workspace, Silent())
    with pytest.raises(CorruptCapture, match=r"c\.1\.2\.0\.0 has checksum .*--repair"):
        analyze(study, workspace, Silent())
    with pytest.raises(
        CorruptCapture, match="What is damaged is marked: the same study then computes 2 of 4 sequences"
    ):
        run_verify(study, workspace, Silent(), repair=True)
    Journal.open(folder / "journal.jsonl").append([whole_entry(whole, 2)])  # as if nothing had been marked
    # its size is right, so that only its checksum tells: it is marked, and that batch alone is computed again
    found = verify(folder, Silent(), repair=True)
    assert (found.marked, found.left, found.repaired) == ((2,), 2, True)
    assert extract(study, workspace, Silent())["sequences"] == 2
    assert verify(folder, Silent()).sound
    assert_identical(whole[0], workspace, study)


@pytest.mark.parametrize("seed", range(24))
def test_any_flipped_bit_ends_in_an_error_or_in_the_same_capture(whole, copy, seed):
    """One bit anywhere: in a chunk, the journal, the description, the metadata, the ids."""
    workspace, study, folder = copy
    chance = random.Random(seed)
    kinds = ("journal.jsonl", "capture.json", "activations.zarr/**/zarr.json", "activations.zarr/**/c*")
    files = sorted(path for path in folder.glob(kinds[seed % 4]) if path.is_file())
    path = chance.choice(files)
    flip(path, chance.randrange(path.stat().st_size), 1 << chance.randrange(8))
    found = verify(folder, Silent())
    if found.sound:
        # a description may be written in many ways; what it says is the same, and the rest is untouched
        assert path.name == "zarr.json", path
        assert extract(study, workspace, Silent())["sequences"] == 0
        return
    assert path.name.split(".")[0] in found.message() or str(path.relative_to(folder)) in found.message()
    if path.name == "capture.json":
        with pytest.raises(CaptureError, match=r"capture\.json|has format"):
            extract(study, workspace, Silent())
        return
    verify(folder, Silent(), repair=True)
    extract(study, workspace, Silent())
    assert verify(folder, Silent()).sound
    assert_identical(whole[0], workspace, study)


def test_a_damaged_line_of_the_journal_is_an_error_and_repair_keeps_the_others(whole, copy):
    workspace, study, folder = copy
    journal = folder / "journal.jsonl"
    number = 1 + [json.loads(line)["sequence"] for line in journal.read_bytes().splitlines()].index(1)
    journal.write_bytes(journal.read_bytes().replace(b'"sequence": 1', b'"sequence": 9'))
    with pytest.raises(CorruptCapture, match=rf"line {number} of .* is damaged: .*--repair"):
        extract(study, workspace, Silent())
    assert verify(folder, Silent(), repair=True).left == 2
    assert extract(study, workspace, Silent())["sequences"] == 2
    assert_identical(whole[0], workspace, study)


def test_a_description_that_changed_is_refused(copy):
    """A number of threads that was changed by hand would be obeyed: its own checksum tells."""
    workspace, study, folder = copy
    path = folder / "capture.json"
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 3'))
    with pytest.raises(CorruptCapture, match=r"capture\.json has changed"):
        extract(study, workspace, Silent())
    found = verify(folder, Silent())
    assert not found.sound
    assert f"outliers captures rm {study.capture_id}" in found.message()


def test_a_description_that_is_gone_is_refused_where_something_was_done(copy):
    workspace, study, folder = copy
    (folder / "capture.json").unlink()
    with pytest.raises(CorruptCapture, match="put it back"):
        extract(study, workspace, Silent())
    assert (folder / "journal.jsonl").stat().st_size
    (folder / "journal.jsonl").write_bytes(b"")
    assert extract(study, workspace, Silent())["sequences"] == 4


def test_the_command_checks_repairs_and_says_what_to_do(copy):
    workspace, study, folder = copy

    def outliers(*arguments):
        return run_command(folder.parent, *arguments, "--workspace", workspace.root, environment=os.environ)

    sound = outliers("verify", study.capture_id)
    assert sound.returncode == 0, sound.stderr
    assert "36 chunks" in sound.stdout
    assert "every checksum is right" in sound.stdout
    flip(folder / "activations.zarr" / "resid" / "c.2.3.0.0", 7)
    damaged = outliers("verify", str(folder), "--json")
    assert damaged.returncode == 1
    found = json.loads(damaged.stdout)
    assert (found["sound"], found["marked"], found["repaired"]) == (False, [3], False)
    assert found["damage"][0]["file"] == "activations.zarr/resid/c.2.3.0.0"
    repaired = outliers("verify", study.capture_id, "--repair")
    assert repaired.returncode == 1
    assert "the same study then computes 2 of 4 sequences" in repaired.stdout
    assert outliers("verify", "nothing").returncode == 2
