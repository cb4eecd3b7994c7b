"""An archive that a host sends is plain files within limits, or it is refused and nothing of it stays."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from outliers import errors
from outliers.machines.archive import Limits, unpack
from tests.security.hostile import ACTS, archive, member


def patched(data, begin, value):
    """An archive whose first header is changed, with a right checksum."""
    changed = bytearray(data)
    changed[begin : begin + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed[:512])
    return bytes(changed)


def sparse(folder, version):
    """A sparse file of 3 MB in a few KB, as GNU tar writes it."""
    with (folder / "big").open("wb") as file:
        file.truncate(3_000_000)
        file.seek(1_000_000)
        file.write(b"x")
    form = ["--format=pax", f"--sparse-version={version}"] if version else ["--format=gnu"]
    command = ["tar", "-C", folder, "-S", *form, "--transform=s,big,folder/big,", "-cf", folder / "a.tar", "big"]
    subprocess.run(command, check=True)
    data = (folder / "a.tar").read_bytes()
    assert len(data) < 50_000
    (folder / "big").unlink()
    (folder / "a.tar").unlink()
    return data


ARCHIVES = {
    "symbolic link": archive(member(kind=tarfile.SYMTYPE, link="/etc/passwd")),
    "hard link": archive(member("folder/a"), member("folder/b", kind=tarfile.LNKTYPE, link="folder/a")),
    "FIFO": archive(member(kind=tarfile.FIFOTYPE)),
    "device": archive(member(kind=tarfile.CHRTYPE)),
    "block device": archive(member(kind=tarfile.BLKTYPE)),
    "folder": archive(member(kind=tarfile.DIRTYPE)),
    "contiguous": archive(member(kind=tarfile.CONTTYPE)),
    "upwards": archive(member("folder/../../evil")),
    "full path": archive(member("/tmp/evil")),
    "full path below": archive(member("folder//tmp/evil")),
    "of no kind of ours": archive(member("evil")),
    "a point": archive(member("folder/./evil")),
    "pax path upwards": archive(member(pax={"path": "folder/../evil"})),
    "pax link": archive(member(pax={"linkpath": "/etc/passwd"})),
    "pax size": archive(member(pax={"size": "99999999999"})),
    "pax GNU name": archive(member(pax={"GNU.sparse.name": "folder/evil"})),
    "pax global": archive(member(kind=tarfile.XGLTYPE)),
    "pax long": archive(member(pax={"comment": "c" * 100_000})),
    "GNU long name": archive(member("folder/" + "n" * 200), form=tarfile.GNU_FORMAT),
    "twice": archive(member(), member()),
    "below a file": archive(member("folder/a"), member("folder/a/b")),
    "over a folder": archive(member("folder/a/b"), member("folder/a")),
    "file and folder": archive(member("file"), member("folder/a")),
    "deep": archive(member("folder/" + "d/" * 40 + "x")),
    "long name": archive(member("folder/" + "n" * 300)),
    "escapes in a name": archive(member("folder/\x1b[31mred")),
    "name not UTF-8": patched(archive(member(form_name := "folder/ab")), len(form_name) - 1, b"\xff"),
    "many": archive(*(member(f"folder/{number}") for number in range(12))),
    "large": archive(member(data=b"x" * 300_000)),
    "large in all": archive(*(member(f"folder/{number}", data=b"x" * 30_000) for number in range(9))),
    "size of 2^70": patched(archive(member()), 124, b"\x80\0\0\x40" + b"\0" * 8),
    "size negative": patched(archive(member()), 124, b"\xff" * 12),
    "size more than comes": patched(archive(member()), 124, b"00000100000\0"),
    "torn": archive(member(data=b"x" * 5000))[:3000],
    "no archive": b"<html>" * 1000,
    "gzip": b"\x1f\x8b" + bytes(2000),
    "empty": b"",
    "checksum": archive(member())[:148] + b"0000000\0" + archive(member())[156:],
}


@pytest.mark.parametrize("data", ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_is_not_plain_is_refused_and_nothing_of_it_stays(tmp_path, data):
    limits = Limits(max_bytes=200_000, max_files=10)
    _refused(tmp_path, data, limits)


@pytest.mark.parametrize("version", ["", "0.0", "0.1", "1.0"])
def test_a_sparse_file_is_refused(tmp_path, version):
    _refused(tmp_path, sparse(tmp_path, version), Limits(max_bytes=200_000))


def test_files_that_were_not_asked_for_are_refused(tmp_path):
    _refused(tmp_path, archive(member(), member("folder/evil")), Limits(names={"a.txt"}))


def _refused(folder, data, limits):
    home = folder / "home"
    (home / "results").mkdir(parents=True)
    (home / "results" / "a.txt").write_text("before")
    began = {str(path): path.lstat().st_ino for path in folder.rglob("*")}
    with pytest.raises(
        errors.JobFailed, match=r"results of box can't be brought home: .*Nothing of it was kept"
    ) as caught:
        unpack(io.BytesIO(data), home / "results", limits, "results of box")
    assert not ACTS.search(str(caught.value)) and len(str(caught.value)) < 1000
    assert {str(path): path.lstat().st_ino for path in folder.rglob("*")} == began
    assert (home / "results" / "a.txt").read_text() == "before"
    assert not Path("/tmp/evil").exists()


def test_plain_files_come(tmp_path):
    names = ["folder/a.txt", "folder/deep/" + "n" * 150, "folder/ünï", "folder/empty"]
    data = archive(*(member(name, data=name.encode() * 300 if name != "folder/empty" else b"") for name in names))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "kept").write_text("kept")
    unpack(io.BytesIO(data), tmp_path / "in", Limits(), "results")
    for name in names[:3]:
        assert (tmp_path / "in" / name.removeprefix("folder/")).read_bytes() == name.encode() * 300
    assert (tmp_path / "in" / "empty").read_bytes() == b"" and (tmp_path / "in" / "kept").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
