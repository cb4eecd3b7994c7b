"""Studies over ssh when things break: the line, the machine, its disk, this side; and what is left, which is nothing.

The machines have a network of their own. A job is held in the middle by SIGSTOP, so that no test counts on its speed.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from outliers.events.stream import JsonReporter
from tests.support.remote import NetnsMachine, Sshd, needs_root, needs_sshd
from tests.support.ssh_studies import (
    SESSION,
    Control,
    attempts,
    control,
    freeze,
    gone,
    ours,
    remote,
    sequences_done,
    settled,
    thaw,
    world,
)

__all__ = ["control", "world"]  # fixtures, found by name

pytestmark = [pytest.mark.servers, needs_sshd, needs_root]

SEQUENCES = 120
LAYERS = ("--layers", "0,11")
"""Of twelve: the model computes all of them, and the capture stays small."""
CUT_SECONDS = 20.0
LEASE_SECONDS = 10.0


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The machine that most tests share: its program is sent and compiled once."""
    with NetnsMachine(tmp_path_factory.mktemp("host"), "host", environment=SESSION) as machine:
        yield machine


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, world):
    """The digest of the study that all tests run."""
    return world.digest(tmp_path_factory.mktemp("undisturbed"), SEQUENCES, layers=[0, 11])


def whole_study(world, control, *more, machine="m1"):
    return world.study(SEQUENCES, *LAYERS, *control.over(*more, machine=machine))


def run_logs(prefect, before):
    """All messages of the flow runs that were not there before."""
    (made,) = {run["id"] for run in prefect.flow_runs()} - before
    found = []
    while True:
        body = {"logs": {"flow_run_id": {"any_": [made]}}, "sort": "TIMESTAMP_ASC", "limit": 200, "offset": len(found)}
        rows = prefect.post("/logs/filter", body)
        found += [row["message"] for row in rows]
        if not rows:
            return found


class Chatter:
    """Says a numbered line in the stream of a job, several times a second, until told to stop."""

    def __init__(self, stream: Path) -> None:
        self.said: list[str] = []
        self._reporter = JsonReporter(stream)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()

    def _talk(self) -> None:
        while not self._over.wait(0.25):
            self.said.append(f"this is line {len(self.said)}")
            self._reporter.log("info", self.said[-1])

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self._reporter.close()


@pytest.mark.studies
def test_the_cable_is_cut_and_sshd_restarted_in_the_middle(world, host, control, undisturbed):
    before = {run["id"] for run in world.prefect.flow_runs()}
    # a lease that is longer than the cut: else a lease that is not renewed would end
    command = control.start(*whole_study(world, control, "--lease-seconds", "300"))
    frozen = freeze(command, host)
    (folder,) = attempts(host, "extract")
    chatter = Chatter(folder / "events.jsonl")
    command.until(lambda: "this is line 2" in command.said, "the first lines")

    host.cut()
    thaw(frozen)
    cut = time.monotonic()
    frozen = freeze(command, host, at=SEQUENCES // 3)  # it continues unobserved
    command.until(lambda: time.monotonic() - cut > CUT_SECONDS, "the end of the cut", 0.5)
    silent = len(chatter.said) - 1
    assert f"this is line {silent}" not in command.said
    host.join()
    command.until(lambda: f"this is line {silent} " in command.said, "what was said during the cut")
    assert "it is tried again for 120 s" in command.said
    assert "m1 answers again" in command.said

    host.restart_sshd(end_sessions=True)
    later = len(chatter.said) + 2
    command.until(lambda: f"this is line {later} " in command.said, "lines after sshd was restarted")
    assert sequences_done(host) < SEQUENCES, "it had ended before it was disturbed"
    chatter.stop()
    thaw(frozen)

    study = command.answer()["study_id"]
    assert control.manifest(study)["results_digest"] == undisturbed
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    said = [event["message"] for event in events if event["kind"] == "log"]
    assert set(chatter.said) < set(said)
    shown = [line.removeprefix("  extract: ") for line in command.lines if line.startswith("  extract: ")]
    kept = (control.workspace / "results" / study / "run.log").read_text().splitlines()
    kept = [line.partition(" extract: ")[2] for line in kept if " extract: " in line]
    logged = [message for message in run_logs(world.prefect, before) if message in set(said)]
    assert shown == kept == logged == said
    assert len(attempts(host, "extract")) == 1
    assert control.records() == []
    assert gone(host), ours(host)


@pytest.mark.long
def test_this_side_is_killed_and_started_again(world, host, control, undisturbed):
    words = whole_study(world, control, "--lease-seconds", "300", machine="again")
    first = control.start(*words)
    frozen = freeze(first, host, "again")
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    second = control.start(*words)
    # joined: it hears what was said before it came
    second.until(lambda: "one pass over" in second.said, "the stream of the running job")
    assert sequences_done(host, "again") < SEQUENCES
    thaw(frozen)
    assert control.manifest(second.answer()["study_id"])["results_digest"] == undisturbed
    assert [path.name for path in attempts(host, "extract", "again")] == ["0001"]
    # the run that was killed holds nothing any more: its process is gone
    assert "again is released" in second.said
    assert control.records() == []
    assert gone(host), ours(host)


def strike(control: Control, words: list[str], condition, what: str) -> float:
    """Kill a command at the moment of a condition; when that was."""
    command = control.start(*words)
    command.until(condition, what, 0.003)
    command.signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    return time.monotonic()


@pytest.mark.long
def test_this_side_is_killed_at_every_step_and_nothing_stays_past_its_lease(world, host, control):
    fresh = ["--python", sys.executable, "--folder", ".fresh"]
    assert control.run("machines", "add", "fresh", host.alias, *fresh).wait() == 0

    def holders(machine):
        return json.loads((remote(host, machine) / "lease.json").read_text())["holders"]

    def kill(machine, condition, what, *more):
        struck = strike(control, whole_study(world, control, *more, machine=machine), condition, what)
        left = LEASE_SECONDS + 15 - (time.monotonic() - struck)
        assert gone(host, machine, left), (what, ours(host, machine))

    def kill_extraction():
        command = control.start(*whole_study(world, control, machine="k-extract"))
        frozen = freeze(command, host, "k-extract")
        command.signal(signal.SIGKILL)
        # only the watchdog of the machine is left to end it
        cancelled = attempts(host, "extract", "k-extract")[0] / "cancel.json"
        assert settled(cancelled.exists, LEASE_SECONDS + 15)
        thaw(frozen)
        assert json.loads(cancelled.read_text())["reason"] == "lease"
        assert gone(host, "k-extract", 15), ours(host, "k-extract")
        assert sequences_done(host, "k-extract") < SEQUENCES

    def early():
        record, lease = control.record("k-record"), remote(host, "k-hold") / "lease.json"
        kill("k-record", record.exists, "the record")
        assert not remote(host, "k-record").exists()
        kill("k-deploy", (host.home / ".fresh/deploy/code").exists, "deployment", "--host", "fresh")
        kill("k-hold", lease.exists, "the lease")
        kill_extraction()

    def late():
        # one after the other: each goes on from what the one before it had finished
        kill("k-late", lambda: attempts(host, "analyze", "k-late"), "analysis")
        kill("k-late", lambda: attempts(host, "report", "k-late"), "the report")
        (control.workspace / "results").mkdir(exist_ok=True)
        kill("k-late", lambda: list(control.workspace.glob("results/*/manifest.json")), "the results")
        shutil.rmtree(control.workspace / "results")
        kill("k-late", lambda: attempts(host, "report", "k-late") and not holders("k-late"), "release")

    with ThreadPoolExecutor(2) as pool:
        for part in [pool.submit(early), pool.submit(late)]:
            part.result()
    assert gone(host), ours(host)
    assert set(control.records()) >= {"k-record", "k-deploy", "k-hold", "k-extract"}
    assert settled(lambda: all(over(control, name) for name in control.records()), LEASE_SECONDS + 5)
    reaped = control.run("machines", "reap", "--json")
    assert reaped.wait() == 0, reaped.said
    assert len(json.loads(reaped.out.read_text())["done"]) >= 4
    assert control.records() == []
    assert gone(host), ours(host)


def over(control: Control, machine: str) -> bool:
    return json.loads(control.record(machine).read_text())["lease_until"] < time.time()


@pytest.mark.long
def test_a_cancel_releases_at_once(world, host, control):
    """Ctrl-C, and the SIGTERM of a service manager."""
    codes = {}
    for number, machine in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")):
        command = control.start(*whole_study(world, control, "--lease-seconds", "3600", machine=machine))
        frozen = freeze(command, host, machine)
        command.signal(number)
        # a process that is stopped can't end itself
        command.until(lambda c=command: "cancelled" in c.said or c.process.poll() is not None, "the cancel")
        thaw(frozen)
        codes[machine] = command.wait()
        assert f"{machine} is released" in command.said, command.said
        assert "Traceback" not in command.said, command.said
        assert control.records() == []
        assert gone(host, machine, 5), ours(host, machine)
        assert 0 < sequences_done(host, machine) < SEQUENCES
    assert codes == {"interrupted": 130, "terminated": 130}


@pytest.mark.long
def test_a_full_disk_there_is_named(tmp_path, world):
    with (
        NetnsMachine(tmp_path / "host", "small", environment=SESSION, disk_mb=48) as machine,
        Control(tmp_path / "control", machine, world.prefect) as side,
    ):
        side.add()
        command = side.start(*world.study(SEQUENCES, *LAYERS, *side.over("--lease-seconds", "3600")))
        frozen = freeze(command, machine)
        with (machine.home / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(bytes(1 << 12)):
                    pass
            except OSError:
                pass
        thaw(frozen)
        assert command.wait() == 1, command.said
        assert f"m1 (small): the disk of {remote(machine)} takes no more (No space left on device" in command.said, (
            command.said
        )
        assert "Traceback" not in command.said, command.said
        assert gone(machine), ours(machine)
        assert side.records() == [], command.said
        # what is journaled stays
        assert 0 < sequences_done(machine) < SEQUENCES


@pytest.mark.studies
def test_hosts_that_can_not_be_used(tmp_path, world):
    """Each is refused in words that say what to do, and keeps nothing of ours."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cat", "df", "dirname", "env", "mkdir", "nproc", "sed", "sh", "timeout", "uname"):
        (tools / name).symlink_to(shutil.which(name))
    hanging = tmp_path / "hanging"
    hanging.mkdir()
    (hanging / "nvidia-smi").write_text("#!/bin/sh\ntrap '' TERM\nwhile :; do sleep 1; done\n")
    (hanging / "nvidia-smi").chmod(0o755)

    def study(name, machine):
        side = Control(tmp_path / name, machine, world.prefect)
        with side:
            command = side.run(*world.study(4, *side.over()))
            assert "Traceback" not in command.said, command.said
            assert side.records() == []
        assert gone(machine), ours(machine)
        assert not (machine.home / ".outliers").exists()
        return command.wait(), command.said

    with (
        Sshd(tmp_path / "bare", "bare", path=str(tools)) as bare,
        Sshd(tmp_path / "other", "other") as other,
        Sshd(tmp_path / "hung", "hung", path=f"{hanging}:/usr/bin:/bin") as hung,
        Control(tmp_path / "waiting", hung, world.prefect) as waiting,
    ):
        asked = waiting.start("machines", "add", "hung", "hung", "--json")
        code, said = study("no python", bare)
        assert (code, "bare has no Python 3.11 or newer, and no uv to bring one" in said) == (1, True), said
        other.change_host_key()
        code, said = study("wrong host key", other)
        assert (code, "the host key of other is not the one that known_hosts has" in said) == (2, True), said
        other.restore_host_key()
        other.refuse_keys()
        code, said = study("refused key", other)
        assert (code, "other refuses our key" in said) == (2, True), said
        # a driver that hangs is a machine without a GPU, after a while
        assert asked.wait(60) == 0, asked.said
        assert json.loads(asked.out.read_text())["facts"]["gpus"] == []
        assert gone(hung), ours(hung)


@pytest.mark.long
def test_a_machine_that_dies_is_named_and_the_same_command_goes_on_when_it_is_back(tmp_path, world, host, undisturbed):
    with (
        NetnsMachine(tmp_path / "host", "mayfly", environment=SESSION) as machine,
        Control(tmp_path / "control", machine, world.prefect, OUTLIERS_PATIENCE_SECONDS="2") as side,
    ):
        side.add()
        # one program for both machines, so that it is compiled once
        (host.home / ".outliers/deploy").mkdir(parents=True, exist_ok=True)
        (machine.home / ".outliers").mkdir()
        (machine.home / ".outliers/deploy").symlink_to(host.home / ".outliers/deploy")
        words = world.study(SEQUENCES, *LAYERS, *side.over("--lease-seconds", "600"))
        command = side.start(*words)
        freeze(command, machine)
        done = sequences_done(machine)
        machine.kill()
        assert command.wait() == 1, command.said
        assert "machine m1 (mayfly) has not answered for" in command.said, command.said
        assert re.search(r"Its lease ends by itself in (9|10) minutes", command.said)
        assert "m1 could not be released" in command.said
        assert "Traceback" not in command.said, command.said
        assert side.records() == ["m1"]

        machine.boot()
        assert sequences_done(machine) == done < SEQUENCES
        again = side.run(*words)
        assert side.manifest(again.answer()["study_id"])["results_digest"] == undisturbed
        assert f"going on after {done} of {SEQUENCES} sequences" in again.said
        assert side.run("machines", "release", "--all").wait() == 0
        assert side.records() == []
        assert gone(machine), ours(machine)
