"""A capture on a disk that lies: torn, cut, flipped, filled, read-only, begun elsewhere.

Each ends in an error or a right resume, never in a wrong capture.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from outliers.analyze import analyze
from outliers.capture import extract
from outliers.captures import find_capture, list_captures, remove_capture
from outliers.errors import BadInput, Busy, CaptureError, CaptureMismatch, CorruptCapture
from outliers.steps import capture_exists, run_verify
from outliers.store import Journal, hold, read_fingerprint, write_fingerprint
from outliers.verify import verify
from outliers.workspace import open_workspace
from tests.captured import prepared
from tests.synthetic import Silent
from tests.test_faults import assert_identical
from tests.zygote import Zygote

SITES = ("attn_in", "mlp_in", "resid")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, llama, text):
    """A finished capture of 4 sequences, 3 layers and 3 sites, in batches of 2: (workspace, study)."""
    workspace = open_workspace(tmp_path_factory.mktemp("whole") / "ws")
    study = prepared(workspace, llama, text, capture={"sites": SITES, "batch_sequences": 2})
    extract(study, workspace, Silent())
    return workspace, study


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it to damage: (workspace, study, folder)."""
    workspace, study = whole
    shutil.copytree(workspace.root, tmp_path / "ws")
    other = open_workspace(tmp_path / "ws")
    return other, study, other.capture(study.capture_id)


def whole_entry(whole, sequence):
    """The journal's entry of a sequence of the undamaged capture."""
    workspace, study = whole
    return Journal.open(workspace.capture(study.capture_id) / "journal.jsonl").done[sequence]


def flip(path, at, bit=4):
    raw = bytearray(path.read_bytes())
    raw[at] ^= bit
    path.write_bytes(raw)


def _other(content):
    """Some values of a file changed: numbers of a description, or bytes."""
    return content.translate(bytes.maketrans(b"3\x00", b"4\x01"))


def rewrite(folder, change):
    """capture.json as it would have been written under another condition, checksum and all."""
    found = read_fingerprint(folder)
    change(found)
    found.pop("crc32")
    write_fingerprint(folder, found)


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


# Begun under other conditions, or by somebody else.


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


# A disk that takes no more, or nothing at all.


def in_namespace():
    """Whether this user may make a mount that only a test's own processes see."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    )
    return tried.returncode == 0


@pytest.mark.skipif(not in_namespace(), reason="a mount of one's own needs root")
def test_a_disk_that_fills_at_any_point_costs_nothing_that_was_journaled(tmp_path, llama, text):
    """A small tmpfs, which is gone with its processes. Filled up to here, then with room again; never a wrong byte."""
    calm = open_workspace(tmp_path / "calm")
    study = prepared(calm, llama, text, sequences=12, length=340, capture={"sites": SITES})
    extract(study, calm, Silent())
    size = sum(path.stat().st_size for path in calm.capture(study.capture_id).rglob("*") if path.is_file())
    disk, spec, log = tmp_path / "disk", tmp_path / "prepared.json", tmp_path / "log"
    disk.mkdir()
    spec.write_text(study.model_dump_json())
    mount = f'mount -t tmpfs -o size={2 * size} tmpfs {disk} && exec "$@"'
    with Zygote("unshare", "--mount", "sh", "-c", mount, "sh") as zygote:
        inside = Path(f"/proc/{zygote.process.pid}/root") / disk.relative_to("/")
        zygote.ready()
        shutil.copytree(calm.corpora, inside / "ws" / "corpora")
        done: list[int] = []
        for share in (0.02, 0.2, 0.45, 0.8):
            free = shutil.disk_usage(inside).free
            held = sum(path.stat().st_size for path in (inside / "ws").rglob("*") if path.is_file())
            (inside / "ballast").write_bytes(bytes(max(0, int(free - (share * size - min(held, share * size))))))
            zygote.extract(spec, disk / "ws", log)
            assert zygote.wait() == 1
            assert "No space left on device" in log.read_text().rsplit("start\n", 1)[1]
            (inside / "ballast").unlink()
            folder = inside / "ws" / "captures" / study.capture_id
            if (folder / "capture.json").exists():
                assert verify(folder, Silent()).sound
                done.append(verify(folder, Silent()).done)
        assert done == sorted(done)
        assert 0 < done[-1] < 12, "the disk filled too early or too late to show anything"
        zygote.extract(spec, disk / "ws", log)
        assert zygote.wait() == 0, log.read_text()
        assert_identical(calm, open_workspace(inside / "ws"), study)


@pytest.mark.skipif(not in_namespace(), reason="a mount of one's own needs root")
def test_a_read_only_workspace_is_one_clear_error(copy, tmp_path):
    workspace, study, folder = copy
    Journal.open(folder / "journal.jsonl").redo([0])
    spec = tmp_path / "prepared.json"
    spec.write_text(study.model_dump_json())
    where = f'mount --bind -o ro {workspace.root} {workspace.root} && exec "$@"'
    command = [sys.executable, "-m", "outliers", "extract", str(spec), "--workspace", str(workspace.root)]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", where, "sh", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode in (1, 2)
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert extract(study, workspace, Silent())["sequences"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_one_clear_error(copy):
    workspace, study, folder = copy
    Journal.open(folder / "journal.jsonl").redo([0])
    site = folder / "activations.zarr" / "mlp_in"
    site.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(CaptureError, match="can't be written"):
            extract(study, workspace, Silent())
    finally:
        site.chmod(stat.S_IRWXU)


def test_the_command_checks_repairs_and_says_what_to_do(copy):
    workspace, study, folder = copy

    def outliers(*arguments):
        command = [str(Path(sys.executable).parent / "outliers"), *arguments, "--workspace", str(workspace.root)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    sound = outliers("verify", study.capture_id)
    assert sound.returncode == 0, sound.stderr
    assert "36 chunks" in sound.stderr
    assert "every checksum is right" in sound.stderr
    flip(folder / "activations.zarr" / "resid" / "c.2.3.0.0", 7)
    damaged = outliers("verify", str(folder), "--json")
    assert damaged.returncode == 1
    found = json.loads(damaged.stdout)
    assert (found["sound"], found["marked"], found["repaired"]) == (False, [3], False)
    assert found["damage"][0]["file"] == "activations.zarr/resid/c.2.3.0.0"
    repaired = outliers("verify", study.capture_id, "--repair")
    assert repaired.returncode == 1
    assert "the same study then computes 2 of 4 sequences" in repaired.stderr
    assert outliers("verify", "nothing").returncode == 2
