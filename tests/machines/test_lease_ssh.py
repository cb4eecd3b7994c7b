"""The lease with real watchdogs, over ssh: on the host, and in the records of this side. `test_lease` has it on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from outliers import errors
from outliers.jobs.jobs import JobSpec
from outliers.machines import lease
from outliers.machines.base import MachineRequest
from outliers.machines.connection import CONFIG_VARIABLE
from outliers.machines.deploy import deploy
from outliers.machines.ssh import Host, Hosts, SshProvider
from tests.support.one_host import until
from tests.support.remote import Sshd, needs_sshd

ROOT = Path(__file__).resolve().parents[2]
FAST = {lease.POLL_VARIABLE: "0.1"}


@pytest.fixture
def box(tmp_path, monkeypatch):
    with Sshd(tmp_path / "a box", environment=FAST) as machine:
        monkeypatch.setenv(CONFIG_VARIABLE, str(machine.config))
        Hosts(tmp_path / "control").add(Host("lab1", "box", python=sys.executable, price_per_hour=3600.0))
        machine.source = SshProvider(tmp_path / "control")
        yield machine


@needs_sshd
@pytest.mark.servers
def test_a_lease_that_nobody_renews_ends_the_job_on_the_host(box):
    machine = box.source.ensure("m1", MachineRequest(lease_seconds=5), "run-1", "a study")
    handle = machine.start(JobSpec("step", ("sleep", "94")))
    held = time.monotonic()
    box.source.hold("m1", "run-1", "a study", 8)
    time.sleep(max(0.0, held + 5.2 - time.monotonic()))
    assert machine.status(handle) == "running"
    began = time.monotonic()
    # at once, and in the words of the job: this is not a connection that may come back
    with pytest.raises(errors.MachineLost, match=r"^job 'step' .*the lease of its machine was not renewed"):
        machine.result(handle)
    assert time.monotonic() - began < 10
    until(
        lambda: not any("outliers.machines.lease" in command or "sleep 94" in command for _, command in box.processes())
    )


@needs_sshd
@pytest.mark.servers
def test_a_machine_is_released_with_its_last_holder(box, tmp_path):
    source = box.source
    machine = source.ensure("m1", MachineRequest(lease_seconds=120), "run-1", "one")
    source.ensure("m1", MachineRequest(lease_seconds=120), "run-2", "two")
    handle = machine.start(JobSpec("step", ("sleep", "93")))
    assert source.leave("m1", "run-1") == "m1 is still held by 1 other runs"
    assert source.leave("m1", "run-2", keep_seconds=600) == "m1 is kept for 10 minutes more"
    assert 590 < source.list()[0].lease_until - time.time() < 601
    assert 590 < lease.read(Path(machine.workspace)).left() < 601
    assert machine.status(handle) == "running"
    assert source.leave("m1", "run-2") == "m1 is released"
    assert machine.status(handle) == "cancelled"
    assert source.list() == ()
    assert source.find("m1") is None
    assert source.leave("m1", "run-2") == "m1 is released"
    assert "nothing to release" in source.release("m1")
    (line,) = (tmp_path / "control/machines/history.jsonl").read_text().splitlines()
    assert json.loads(line)["how"] == "released"
    assert 0.1 < json.loads(line)["spent"] < 60  # a dollar a second


@needs_sshd
@pytest.mark.servers
def test_the_record_is_there_before_the_host_is_asked(box, monkeypatch):
    """Whatever ends this side while the host is opened, the machine is listed and past its lease some day."""
    monkeypatch.setattr("outliers.machines.ssh_leases.deploy", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        box.source.ensure("m1", MachineRequest(lease_seconds=120), "run-1", "one")
    (rental,) = box.source.list()
    assert (rental.state, rental.place, list(rental.holders)) == ("launching", "lab1", ["run-1"])
    assert 100 < rental.lease_until - time.time() <= 120


@needs_sshd
@pytest.mark.servers
def test_a_run_that_was_killed_holds_no_machine_once_another_has_come(box, tmp_path):
    code = (
        "import sys; from pathlib import Path; from outliers.machines.base import MachineRequest\n"
        "from outliers.machines.ssh import SshProvider\n"
        "SshProvider(Path(sys.argv[1])).ensure('m1', MachineRequest(lease_seconds=600), 'study.killed', 't')"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "control"], cwd=ROOT, check=True, timeout=60)
    machine = box.source.ensure("m1", MachineRequest(lease_seconds=60), "study.again", "t")
    assert set(box.source.list()[0].holders) == set(lease.read(Path(machine.workspace)).holders) == {"study.again"}
    assert box.source.leave("m1", "study.again") == "m1 is released"


@needs_sshd
@pytest.mark.servers
def test_what_is_installed_longer_than_a_lease_lasts_is_nothing_forgotten(box, monkeypatch):
    seen = []

    def slow(*words, **options):
        for _ in range(15):
            seen.append([rental.is_over(time.time()) for rental in box.source.list()])
            time.sleep(0.1)
        return deploy(*words, **options)

    monkeypatch.setattr("outliers.machines.ssh_leases.deploy", slow)
    box.source.ensure("m1", MachineRequest(lease_seconds=1), "run-1", "one")
    assert seen == [[False]] * 15
    threads = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith("record-") for name in threads)


@needs_sshd
@pytest.mark.servers
@pytest.mark.parametrize("how", ["release", "leave"])
def test_where_nothing_was_begun_nothing_is_installed_to_end_it(box, monkeypatch, how):
    with monkeypatch.context() as patch:
        patch.setattr("outliers.machines.ssh_leases.deploy", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        for holder in ("run-1", "run-2"):
            with pytest.raises(KeyboardInterrupt):
                box.source.ensure("m1", MachineRequest(lease_seconds=120), holder, "one")
    if how == "release":
        assert box.source.release("m1") == "m1 on lab1 is released, its jobs are ended"
    else:
        assert box.source.leave("m1", "run-1") == "m1 is still held by 1 other runs"
        assert set(box.source.list()[0].holders) == {"run-2"}
        assert box.source.leave("m1", "run-2") == "m1 is released"
    assert box.source.list() == ()
    assert list(box.home.iterdir()) == []


@needs_sshd
@pytest.mark.servers
def test_no_job_begins_where_nobody_holds_the_machine(box):
    """Released from elsewhere while a study runs: its next try must not leave a job that no watchdog ends."""
    machine = box.source.ensure("m1", MachineRequest(lease_seconds=120), "run-1", "a study")
    SshProvider(box.folder.parent / "control").release("m1")
    with pytest.raises(errors.MachineLost, match="nobody holds the machine any more"):
        machine.start(JobSpec("step", ("sleep", "92")))
    with pytest.raises(errors.MachineLost, match="the record of m1 is gone: it was released meanwhile"):
        box.source.hold("m1", "run-1", "a study", 120)
    until(lambda: not any("outliers.machines.lease" in command for _, command in box.processes()))
    assert not any("sleep 92" in command for _, command in box.processes())
