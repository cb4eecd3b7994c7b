"""Provider `ssh` with a real sshd: keys and hosts that do not answer, short commands, files, sockets."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from outliers import errors
from outliers.files.atomic import sha256_file
from outliers.machines import connection, remote
from outliers.machines.archive import Limits, unpack
from outliers.machines.base import MachineRequest
from outliers.machines.connection import Connection
from outliers.machines.ssh import Host, access
from tests.support.one_host import box, machine, running, shared, source, until, workspace
from tests.support.remote import needs_sshd

__all__ = ["box", "machine", "shared", "source", "workspace"]

pytestmark = [needs_sshd, pytest.mark.servers]

# Keys, and hosts that do not answer


def test_another_host_key_is_refused_and_nothing_is_sent(source, box):
    box.change_host_key()
    before = box.log.read_text().count("Accepted publickey")
    with pytest.raises(errors.HostRefused, match=r"ssh-keygen -R .*log in once: ssh box"):
        source.ensure("m1", MachineRequest(host="lab1"), "run-1", "a study")
    assert box.log.read_text().count("Accepted publickey") == before
    assert list(box.home.iterdir()) == []
    assert source.list() == ()
    box.restore_host_key()
    assert access(Host("lab1", "box")).probe()


def test_an_unknown_host_is_refused_whatever_the_configuration_says(box):
    known = box.folder / "known_hosts"
    kept = known.read_text()
    known.write_text("")
    box.config.write_text(box.config.read_text().replace("StrictHostKeyChecking yes", "StrictHostKeyChecking no"))
    with pytest.raises(errors.HostRefused, match="compare the fingerprint and accept it: ssh box"):
        Connection("box").call("true")
    assert known.read_text() == ""
    known.write_text(kept)
    assert Connection("box").call("true").returncode == 0


def test_a_refused_key_says_what_to_do(box):
    box.refuse_keys()
    with pytest.raises(errors.HostRefused, match=r"box refuses our key .*ssh-copy-id"):
        Connection("box").call("true")


def test_a_host_that_stays_silent_is_lost_after_patience(machine, shared, monkeypatch, caplog):
    monkeypatch.setenv(remote.PATIENCE_VARIABLE, "1.5")
    shared.stop()
    began = time.monotonic()
    with pytest.raises(
        errors.MachineLost, match=r"machine m1 \(box\) has not answered for .* in 1[45] minutes"
    ) as caught:
        machine.facts()
    assert time.monotonic() - began > 1.5
    assert "Retry" in str(caught.value)
    assert [record.levelname for record in caplog.records if "tried again" in record.message] == ["WARNING"]
    shared.start_sshd()
    assert machine.facts()


def test_a_host_that_comes_back_in_time_is_not_lost(machine, shared):
    shared.stop()
    later = threading.Timer(1.0, shared.start_sshd)
    later.start()
    assert machine.run(["echo", "here again"], 10).stdout == "here again\n"
    later.join()


def test_a_killed_master_connection_is_made_again(machine):
    (master,) = masters(machine.connection._socket)
    master.kill()
    # one that a busy computer lets time out is made again too
    until(lambda: machine.run(["true"], 10).returncode == 0 and machine.connection._has_master())


# Short commands


def test_a_command_its_words_outputs_and_end(machine):
    words = ["a b", "it's", 'say "x"', "$HOME", "*", "two\nlines", ""]
    code = "import sys; print(sys.argv[1:]); print('oops', file=sys.stderr); sys.exit(7)"
    done = machine.run([sys.executable, "-c", code, *words], 20)
    assert (done.returncode, done.stdout, done.stderr) == (7, f"{words}\n", "oops\n")
    assert machine.run(["sh", "-c", "kill -9 $$"], 20).returncode == -9
    assert machine.run(["sh", "-c", "exit 200"], 20).returncode == 200
    # ssh's own word for a broken connection: it must not be asked again for two minutes
    assert machine.run(["sh", "-c", "exit 255"], 20).returncode == 254
    with pytest.raises(errors.JobFailed, match="/no/such/program can't be run on m1"):
        machine.run(["/no/such/program"], 20)


def test_a_command_that_takes_too_long_is_ended_there_too(machine, shared):
    with pytest.raises(errors.JobFailed, match="sh took longer than 1 s on m1"):
        machine.run(["sh", "-c", "sleep 97 & sleep 98"], 1)
    until(lambda: not running(shared, "sleep 9"), 5)


def test_an_ssh_that_is_killed_is_a_lost_connection_and_asked_again(machine, shared, caplog):
    """Out of memory on this side, say: nothing is wrong with the command."""

    def kill(text):
        def clients():
            found = psutil.process_iter(["cmdline"])
            return [p for p in found if (p.info["cmdline"] or [""])[0] == "ssh" and text in " ".join(p.info["cmdline"])]

        until(clients)[0].kill()

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill, "sleep 1.7")
        assert machine.run(["sh", "-c", "sleep 1.7; echo over"], 20).stdout == "over\n"
        killer.result()
    assert "the ssh to box was ended by signal 9; it is tried again" in caplog.text


# Files


def test_an_upload_goes_on_where_it_broke_off(machine, shared, tmp_path, caplog):
    caplog.set_level(logging.INFO, "outliers")
    big = tmp_path / "weights.bin"
    big.write_bytes(os.urandom(48 << 20))
    place = Path(machine.workspace, "uploads/w.bin")
    part = place.with_name(f".w.bin.{sha256_file(big)[:16]}.part")

    def cut():
        until(lambda: part.exists() and part.stat().st_size > 1 << 20)
        shared.kill_sessions()

    cutter = threading.Thread(target=cut)
    cutter.start()
    machine.upload(big, "uploads/w.bin")
    cutter.join()
    assert re.search(r"sending weights.bin to m1, from \d+\.\d MB on", caplog.text)
    assert sha256_file(place) == sha256_file(big)
    assert [path.name for path in place.parent.iterdir()] == ["w.bin"]
    sent = machine.connection.sent
    machine.upload(big, "uploads/w.bin")
    assert machine.connection.sent - sent < 5_000  # it is there


def test_other_bytes_than_were_sent_do_not_become_the_file_and_are_sent_again(machine, tmp_path, caplog):
    (tmp_path / "a.bin").write_bytes(b"right" * 1000)
    place = Path(machine.workspace, "a.bin")
    part = place.with_name(f".a.bin.{sha256_file(tmp_path / 'a.bin')[:16]}.part")
    part.write_bytes(b"wrong" * 10)
    machine.upload(tmp_path / "a.bin", "a.bin")
    assert "arrived with other bytes than were sent" in caplog.text
    assert not part.exists()
    assert place.read_bytes() == b"right" * 1000


def test_folders_go_there_and_come_back(machine, tmp_path):
    files = {"a.txt": b"1", "deep/er/b c.bin": bytes(range(256)), ".hidden": b"", "é'\"\n": b"x"}
    for name, data in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(data)
    machine.upload(tmp_path / "out", "some/folder")
    Path(machine.workspace, "some/folder/link").symlink_to("/etc/passwd")
    machine.download("some/folder", tmp_path / "in")
    got = {str(path.relative_to(tmp_path / "in")): path for path in (tmp_path / "in").rglob("*") if not path.is_dir()}
    assert {name: path.read_bytes() for name, path in got.items()} == files
    machine.download("some/folder/a.txt", tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == b"1"
    with pytest.raises(errors.BadInput, match="nothing at not/there on m1"):
        machine.download("not/there", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_capture_can_not_come_back_for_results(machine, tmp_path):
    Path(machine.workspace, "captured.bin").write_bytes(bytes(200_000))
    with pytest.raises(
        errors.JobFailed, match=r"captured\.bin on m1 .*more than 100,000 bytes, too much to be results"
    ):
        machine.download("captured.bin", tmp_path / "in", max_bytes=100_000)
    assert not (tmp_path / "in").exists()


def agent(machine, *words, input=b""):
    return subprocess.run(
        [*machine.python, "-m", "outliers.machines.agent", machine.workspace, *words],
        input=input,
        capture_output=True,
        timeout=30,
    )


def test_an_upload_goes_only_behind_what_is_there_and_one_at_a_time(machine):
    sha256 = hashlib.sha256(b"one two").hexdigest()
    append = ("append", "appended.bin", sha256)
    assert agent(machine, *append, "0", input=b"one ").returncode == 0
    for begin in ("0", "3", "5"):
        assert agent(machine, *append, begin, input=b"two").returncode == remote.BUSY
    part = Path(machine.workspace, f".appended.bin.{sha256[:16]}.part")
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert agent(machine, *append, "4", input=b"two").returncode == remote.BUSY
    assert part.read_bytes() == b"one "
    assert agent(machine, *append, "4", input=b"two").returncode == 0
    machine.ask("settle", path="appended.bin", sha256=sha256)
    assert Path(machine.workspace, "appended.bin").read_bytes() == b"one two"
    with pytest.raises(errors.BadInput, match=r"'/\.\./\.\./evil' is not a sha256"):
        machine.ask("size", path="appended.bin", sha256="/../../evil")


def masters(socket):
    """The connections of a socket that were started to be kept."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if f"ControlPath={socket}" in words and "-M" in words and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_many_that_connect_at_once_keep_one_connection_and_it_can_be_ended(box):
    """An ssh that lost the race for the socket would stay for good: it is not used, and nothing ends it."""
    connections = [Connection("box") for _ in range(6)]
    connections[0].close()
    until(lambda: not masters(connections[0]._socket))
    together = threading.Barrier(len(connections))

    def connect(one):
        together.wait(30)
        return one.call("true").returncode

    with ThreadPoolExecutor(len(connections)) as pool:
        assert list(pool.map(connect, connections)) == [0] * len(connections)
    assert len(masters(connections[0]._socket)) == 1
    connections[0].close()
    until(lambda: not masters(connections[0]._socket))


# The folder of sockets


def test_a_folder_of_sockets_is_known_by_its_owner_and_mode_and_by_no_name(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # a short name: see below
        monkeypatch.setattr(tempfile, "tempdir", place)
        folder = connection._socket_folder()
        assert folder.parent == Path(place)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert connection._socket_folder() == folder
        folder.chmod(0o770)  # open to others: nothing of ours is put there any more
        other = connection._socket_folder()
        assert other != folder
        assert other.stat().st_mode & 0o777 == 0o700


def test_a_long_folder_for_temporary_files_leaves_room_for_a_socket(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 90)))
    assert len(str(Connection("box")._socket)) < 104


@pytest.mark.parametrize(
    "name", ["folder/../evil", "folder/a/../../evil", "folder//tmp/evil", "../evil", "/evil", "x/evil"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    with pytest.raises(errors.JobFailed, match="which was not asked for"):
        unpack(archive(tarfile.TarInfo(name)), tmp_path / "in", Limits(), "results")
    assert not list(tmp_path.rglob("*evil*"))
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_what_is_no_plain_file_does_not_come(tmp_path, kind):
    member = tarfile.TarInfo("folder/x")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(errors.JobFailed, match="not a plain file"):
        unpack(archive(member), tmp_path / "in", Limits(), "results")
    assert list(tmp_path.iterdir()) == []


def archive(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as file:
        for member in members:
            member.size = 4 if member.type == tarfile.REGTYPE else 0
            file.addfile(member, io.BytesIO(b"evil"))
    buffer.seek(0)
    return buffer
