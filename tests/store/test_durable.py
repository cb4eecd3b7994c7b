"""Files that the disk must have before anything names them: whole, waited for, and errors raised where they are waited for."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from outliers.capture.forward import Batch
from outliers.errors import CaptureError
from outliers.files.atomic import CAN_SYNC_ALL, sync_all
from outliers.store.chunks import ChunkFiles
from outliers.store.durable import Unsynced, drop_leftovers, write_durably, write_soon
from outliers.store.journal import Journal
from outliers.study.layout import Layout

WAYS = [False, pytest.param(True, marks=pytest.mark.skipif(not CAN_SYNC_ALL, reason="this kernel can't tell"))]


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("whole", WAYS)
def test_files_are_whole_and_no_handle_is_left(tmp_path, whole):
    before = open_files()
    unsynced = Unsynced(tmp_path, whole=whole, most=4)

    def write(first):
        for number in range(first, 40, 2):
            write_soon(f"{tmp_path}/c.{number}.0.0.0", bytes([number]) * 1000, unsynced)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert open_files() <= before + 1 + 4
    unsynced.sync()
    assert open_files() == before
    assert {p.name for p in tmp_path.iterdir()} == {f"c.{n}.0.0.0" for n in range(40)}
    assert all((tmp_path / f"c.{n}.0.0.0").read_bytes() == bytes([n]) * 1000 for n in range(40))


@pytest.mark.parametrize("whole", WAYS)
def test_a_batch_that_is_given_up_closes_its_files(tmp_path, whole):
    before = open_files()
    unsynced = Unsynced(tmp_path, whole=whole)
    for number in range(3):
        write_soon(f"{tmp_path}/{number}", b"x", unsynced)
    del unsynced
    assert open_files() == before


def test_an_error_of_the_disk_is_told_and_names_the_file(tmp_path):
    unsynced = Unsynced(tmp_path, whole=False)
    reader, writer = os.pipe()  # which no disk can take: fsync says so
    before = open_files()
    unsynced.add(str(tmp_path / "c.0.0.0.0"), writer)
    with pytest.raises(CaptureError, match=r"c\.0\.0\.0\.0 can't be written \(Invalid argument\)"):
        unsynced.sync()
    assert open_files() == before - 1
    os.close(reader)


@pytest.mark.skipif(not CAN_SYNC_ALL, reason="this kernel can't tell")
def test_an_error_of_the_whole_disk_has_its_number():
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        sync_all(99_999)
    assert caught.value.errno == errno.EBADF


class Broken:
    """A disk that fails when it is waited for."""

    def sync(self):
        raise CaptureError("the disk is gone")


def test_nothing_is_journaled_before_the_disk_has_it(tmp_path):
    layout = Layout(widths={"attn_in": 2}, layers=(0,), num_sequences=1, positions=2, dtype="float32", codec="none")
    journal = Journal(tmp_path / "journal.jsonl")
    batch = Batch(range(1), (2,), 1, journal, ChunkFiles(tmp_path, layout), _unsynced=Broken())
    assert batch.add("attn_in", 0, 0, [(1, 16)])
    with pytest.raises(CaptureError, match="the disk is gone"):
        batch.finish()
    assert journal.done == {}
    assert not journal.path.exists()


def test_a_write_that_fails_leaves_no_part_of_it(tmp_path):
    (tmp_path / "c.0.0.0.0").mkdir()
    unsynced = Unsynced(tmp_path)
    before = open_files()
    for write in (
        lambda: write_durably(tmp_path / "c.0.0.0.0", b"x"),
        lambda: write_soon(f"{tmp_path}/c.0.0.0.0", b"x", unsynced),
    ):
        with pytest.raises(CaptureError, match="Is a directory"):
            write()
        assert open_files() == before
        assert [path.name for path in tmp_path.iterdir()] == ["c.0.0.0.0"]


def test_leftovers_are_those_of_this_program_alone(tmp_path):
    arrays = tmp_path / "activations.zarr" / "mlp_in"
    arrays.mkdir(parents=True)
    ours = [".c.0.1.0.0.tmp", ".zarr.json.tmp", ".0.tmp"]
    others = ["c.0.1.0.0", "notes.tmp", ".c.1.tmp", ".mine.tmp"]
    for name in (*ours, *others):
        (arrays / name).write_bytes(b"x")
    (tmp_path / ".capture.json.0123456789abcdef.part").write_bytes(b"x")
    drop_leftovers(tmp_path, "activations.zarr")
    assert sorted(path.name for path in arrays.iterdir()) == sorted(others)
    assert not list(tmp_path.glob(".*"))
