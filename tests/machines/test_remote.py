"""The SSH machines that other tests rely on do what they say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.remote import NetnsMachine, Sshd, needs_root, needs_sshd, remove_leftovers

ROOT = Path(__file__).resolve().parents[2]
DETACHED = "setsid sleep {} < /dev/null > /dev/null 2>&1 & echo $!"

pytestmark = needs_sshd


@pytest.fixture
def box(tmp_path):
    with Sshd(tmp_path / "a box") as machine:
        yield machine


@pytest.fixture
def rented(tmp_path):
    with NetnsMachine(tmp_path / "a machine") as machine:
        yield machine


def detached(machine: Sshd | NetnsMachine, seconds: int, before: str = "true") -> int:
    """The pid, in the machine, of a `sleep` that its session left behind."""
    job = int(machine.ssh(f"{before}; {DETACHED.format(seconds)}").stdout)
    deadline = time.monotonic() + 10
    while (job, f"sleep {seconds}") not in machine.processes():  # it is still setsid, or the shell
        assert time.monotonic() < deadline, machine.processes()
        time.sleep(0.02)
    return job


def run_and_die(kind: str, folder: Path) -> list[int]:
    """A process that makes a machine with a detached job and is killed; the pids of what it had started."""
    script = f"""
import os, pathlib, sys
from tests.support.remote import {kind}
machine = {kind}(pathlib.Path(sys.argv[1]))
machine.boot()
machine.ssh({DETACHED.format(98)!r})
lasting = [pid for pid, command in machine.processes() if "sleep 98" in command or "listener" in command]
print(os.getpid(), *[machine.host_pid(pid) for pid in lasting], flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script, folder], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return [int(word) for word in done.stdout.split()]


def ended(pids: list[int], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_session_has_its_own_home_path_and_environment_and_none_of_the_tests(box, monkeypatch):
    monkeypatch.setenv("CANARY", "of the test")
    box.sessions(path="/bin:/usr/bin:/nowhere", environment={"UV_CACHE_DIR": "/a b/it's"})
    done = box.ssh("echo $HOME; echo ~; pwd; echo $PATH; echo $UV_CACHE_DIR; echo $CANARY.")
    home = str(box.home)
    assert done.stdout.splitlines() == [home, home, home, "/bin:/usr/bin:/nowhere", "/a b/it's", "."]
    assert done.stderr == ""


def test_standard_input_both_outputs_and_the_exit_code_come_through(box):
    done = box.ssh("""cat; echo "it's  me" >&2; exit 7""", input=b"one\ntwo")
    assert (done.stdout, done.stderr, done.returncode) == ("one\ntwo", "it's  me\n", 7)
    done = subprocess.run(box.ssh_command(command="wc -c"), input=bytes(range(256)) * 4096, capture_output=True)
    assert done.stdout.strip() == b"1048576"


def test_files_are_copied_into_the_machines_home(box, tmp_path):
    (tmp_path / "file").write_text("content")
    subprocess.run(["scp", "-q", "-F", box.config, tmp_path / "file", f"{box.alias}:copy"], check=True)
    assert (box.home / "copy").read_text() == "content"


def test_a_program_that_is_not_in_the_path_is_missing(box):
    box.sessions(path=str(box.folder / "empty"))
    assert box.ssh("python3 --version").returncode == 127


def test_another_host_key_is_refused_until_the_old_one_is_back(box):
    box.change_host_key()
    done = box.ssh("echo in")
    assert done.returncode == 255 and "Host key verification failed" in done.stderr and "in" not in done.stdout.split()
    box.restore_host_key()
    assert box.ssh("echo in").stdout == "in\n"


def test_a_key_is_refused_until_it_is_accepted_again(box):
    box.refuse_keys()
    done = box.ssh("echo in")
    assert done.returncode == 255 and "Permission denied" in done.stderr
    box.accept_keys()
    assert box.ssh("echo in").stdout == "in\n"


def test_a_detached_job_outlives_a_restart_of_sshd_and_ends_with_the_machine(box):
    job = detached(box, 97)
    with subprocess.Popen(
        box.ssh_command(command="echo up; sleep 99"), stdout=-1, stderr=subprocess.DEVNULL
    ) as session:
        assert session.stdout.readline() == b"up\n"
        box.restart_sshd()
        assert session.poll() is None
        box.stop()
        assert session.wait(10) == 255
    assert "Connection refused" in box.ssh("true").stderr
    box.start()
    assert (job, "sleep 97") in box.processes()
    assert box.ssh("echo in").stdout == "in\n"
    everything = [pid for pid, _ in box.processes()]
    box.kill()
    assert box.processes() == [] and ended(everything)
    box.boot()
    assert box.ssh("echo in").stdout == "in\n"


def test_a_killed_test_leaves_no_processes(tmp_path):
    _, *started = run_and_die("Sshd", tmp_path)
    assert len(started) == 2 and ended(started)


@needs_root
def test_a_machine_has_its_own_name_network_and_processes(rented):
    here, there = Path("/proc/self/ns/net").readlink(), Path(rented.ssh("readlink /proc/self/ns/net").stdout.strip())
    assert here != there
    assert rented.ssh("hostname").stdout == "rented\n" != os.uname().nodename
    assert rented.ssh("echo ~root").stdout.strip() == str(rented.home)
    assert rented.ssh("ip route").stdout.count("\n") == 1, "it has a route to somewhere else"
    job = detached(rented, 96)
    assert (job, "sleep 96") in rented.processes()
    assert Path(f"/proc/{rented.host_pid(job)}/cmdline").read_bytes() == b"sleep\x0096\0"


@needs_root
def test_a_cut_is_noticed_and_jobs_live_through_it(rented):
    job = detached(rented, 95)
    options = ("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=3")
    session = subprocess.Popen(rented.ssh_command(*options, command="echo up; sleep 99"), stdout=-1, stderr=-1)
    assert session.stdout.readline() == b"up\n"
    rented.cut()
    _, error = session.communicate(timeout=15)
    assert session.returncode == 255 and b"not responding" in error
    assert "timed out" in rented.ssh("true", "-o", "ConnectTimeout=1").stderr
    rented.join()
    assert rented.ssh("echo in", "-o", "ConnectTimeout=20").stdout == "in\n"
    rented.restart_sshd(end_sessions=True)
    assert (job, "sleep 95") in rented.processes()


@needs_root
def test_an_open_connection_goes_on_after_a_short_cut(rented):
    session = subprocess.Popen(rented.ssh_command(command="echo up; cat"), stdin=-1, stdout=-1, text=True)
    assert session.stdout.readline() == "up\n"
    rented.cut()
    session.stdin.write("sent into the cut\n")
    session.stdin.flush()
    time.sleep(0.3)
    rented.join()
    assert session.communicate(timeout=20)[0] == "sent into the cut\n"


@needs_root
@pytest.mark.parametrize("silently", [False, True])
def test_a_killed_machine_ends_all_it_ran_and_boots_with_its_disk_and_key(rented, silently):
    detached(rented, 94, before="echo kept > file")
    # not the session's: it may end between these two calls
    pids = [rented.host_pid(pid) for pid, command in rented.processes() if re.search("sleep 94$|listener", command)]
    rented.kill(silently=silently)
    assert len(pids) == 2 and ended(pids, 0)
    error = rented.ssh("true", "-o", f"ConnectTimeout={1 if silently else 10}").stderr
    assert ("timed out" if silently else "refused") in error
    rented.boot()
    assert rented.ssh("cat file", "-o", "ConnectTimeout=20").stdout == "kept\n"
    assert not [command for _, command in rented.processes() if command.startswith("sleep")]


@needs_root
def test_a_small_disk_is_full_and_keeps_its_files_through_a_preemption(tmp_path):
    with NetnsMachine(tmp_path, disk_mb=4) as machine:
        assert machine.ssh("echo kept > file").returncode == 0
        done = machine.ssh("head -c 8M /dev/zero > big")
        assert done.returncode and "No space left on device" in done.stderr
        machine.kill()
        machine.boot()
        assert machine.ssh("cat file; stat -c %s big").stdout.split()[0] == "kept"
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@needs_root
def test_two_machines_at_once_do_not_meet(tmp_path):
    with NetnsMachine(tmp_path / "a", "one") as one, NetnsMachine(tmp_path / "b", "two") as two:
        assert [machine.ssh("hostname").stdout for machine in (one, two)] == ["one\n", "two\n"]
        assert one.address != two.address
    assert not Path("/run/netns", f"outliers-{os.getpid()}-0").exists()


@needs_root
def test_what_a_killed_test_leaves_is_removed_by_the_next(tmp_path):
    pid, *started = run_and_die("NetnsMachine", tmp_path)
    assert len(started) == 2 and ended(started)
    left = Path("/run/netns", f"outliers-{pid}-0")
    remove_leftovers()
    assert not left.exists() and not Path(f"/sys/class/net/ov{pid}-0").exists()
