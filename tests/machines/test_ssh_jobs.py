"""Jobs over ssh with a real sshd: they outlive the connection, end as they did there, and keep their secrets."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import sys
import threading
from pathlib import Path

import psutil
import pytest

from outliers import errors
from outliers.jobs.jobs import JobSpec
from outliers.machines.base import MachineRequest
from outliers.machines.ssh import SshProvider
from tests.support.one_host import machine, running, shared
from tests.support.remote import needs_sshd

__all__ = ["machine", "shared"]

pytestmark = [needs_sshd, pytest.mark.servers]

NUMBERS = itertools.count(1)


def python(code, **env):
    return JobSpec(f"step-{next(NUMBERS)}", (sys.executable, "-c", code), env)


def said(events):
    return [event.message for event in events if event.kind == "log"]


def test_no_line_is_lost_or_doubled_when_the_connection_breaks(machine, shared, caplog):
    code = "import time\nfor i in range(300):\n    print('line', i)\n    time.sleep(0.01 if i > 50 else 0)"
    handle = machine.start(python(code))
    seen = []
    for event in machine.follow(handle):
        if event.kind == "log":
            seen.append(event)
            if len(seen) in (70, 150):
                shared.kill_sessions()
    assert [event.message for event in seen] == [f"line {i}" for i in range(300)]
    assert "tried again" in caplog.text
    assert said(machine.follow(handle, seen[199].end)) == [f"line {i}" for i in range(200, 300)]
    assert machine.status(handle) == "done"
    machine.result(handle)


def test_a_second_start_of_the_name_joins_until_it_has_ended(machine, shared):
    job = python("import pathlib, time\nwhile not pathlib.Path('go').exists(): time.sleep(0.02)")
    first = machine.start(job)
    assert machine.start(job) == first
    # as a control process that was killed and comes again
    workspace = shared.folder.parent / "work space"
    again = SshProvider(workspace).ensure("m1", MachineRequest(lease_seconds=900), "run-1", "a study")
    assert again.instance_id == machine.instance_id
    assert again.start(job) == first
    assert again.status(first) == "running"
    machine.cancel(first, 1)
    second = machine.start(job)
    assert (second.name, second.attempt) == (first.name, 2)
    machine.cancel(second, 1)


def test_the_error_of_a_job_arrives_as_what_it_was(machine):
    code = (
        "from outliers import errors; from outliers.jobs import jobs\n"
        "try: raise errors.PlanRefused('needs 9 GB, has 1 GB')\n"
        "except errors.OutliersError as error: jobs.record_error(error); raise SystemExit(1)"
    )
    ours = machine.start(JobSpec("ours", (*machine.python, "-c", code)))
    with pytest.raises(errors.PlanRefused, match=r"^needs 9 GB, has 1 GB$"):
        machine.result(ours)
    # a disk is named with its machine: there are several of them
    full = machine.start(JobSpec("full", (*machine.python, "-c", code.replace("PlanRefused", "DiskFull"))))
    with pytest.raises(errors.DiskFull, match=r"^m1 \(box\): needs 9 GB, has 1 GB$"):
        machine.result(full)
    other = machine.start(python("print('so far'); 1 / 0"))
    with pytest.raises(errors.JobFailed, match=r"(?s)exit code 1.*so far.*ZeroDivisionError"):
        machine.result(other)
    assert machine.status(other) == "failed"


def test_a_cancel_ends_all_of_it_and_may_be_repeated(machine, shared):
    code = "import subprocess, time; subprocess.Popen(['sleep', '96']); print('up'); time.sleep(95)"
    handle = machine.start(python(code))
    stream = machine.follow(handle)
    assert next(event.message for event in stream if event.kind == "log") == "up"
    assert running(shared, "sleep 96")
    assert machine.cancel(handle, 1) == machine.cancel(handle, 1) == "cancelled"
    assert not running(shared, "sleep 9")
    assert said(stream) == []  # it ends, rather than waiting for more
    with pytest.raises(errors.JobCancelled, match="was cancelled by another run"):
        machine.result(handle)


def test_a_secret_is_in_the_environment_of_its_job_and_nowhere_else(machine, shared, caplog):
    caplog.set_level(logging.DEBUG)
    canary = "hf_canary_" + os.urandom(8).hex()
    code = (
        "import hashlib, os, pathlib, time; print(hashlib.sha256(os.environ['HF_TOKEN'].encode()).hexdigest())\n"
        "while not pathlib.Path(os.environ['OUTLIERS_JOB'], 'go').exists(): time.sleep(0.02)"
    )
    seen, over = [], threading.Event()

    def look():
        while not over.is_set():
            seen.extend(" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))

    looking = threading.Thread(target=look)
    looking.start()
    job = python(code, HF_TOKEN=canary)
    handle = machine.start(job)
    stream = machine.follow(handle)
    assert next(e.message for e in stream if e.kind == "log") == hashlib.sha256(canary.encode()).hexdigest()
    seen += [command for _, command in shared.processes()]
    Path(handle.folder, "go").touch()
    assert said(stream) == []
    machine.result(handle)
    over.set()
    looking.join()
    assert any("outliers.machines.agent" in command for command in seen)
    assert not [command for command in seen if canary in command]
    places = [path for path in shared.folder.parent.rglob("*") if path.is_file()]
    assert handle.folder / "job.json" in places
    assert not [path for path in places if canary.encode() in path.read_bytes()]
    assert canary not in caplog.text + repr(job) + repr(handle) + repr(machine.provenance)


def test_a_job_whose_files_went_with_a_lease_is_lost_and_may_be_started_again(machine):
    handle = machine.start(python("pass"))
    machine.result(handle)
    shutil.rmtree(handle.folder.parent)
    for ask in (machine.status, machine.result):
        with pytest.raises(errors.MachineLost, match="its lease ended and its files were removed; start it again"):
            ask(handle)
    assert list(machine.follow(handle)) == []
