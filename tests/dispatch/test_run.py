"""How a step is followed: a retry goes on where it was, and what a cancel ends is known until it has ended."""

from __future__ import annotations

import json

import pytest

from outliers.dispatch.run import INTERRUPT_SECONDS, run_step
from outliers.dispatch.study_run import END_SECONDS, StudyCancelled
from outliers.errors import MachineGone, MachineLost
from outliers.events.event import Event
from outliers.jobs.jobs import JobHandle
from outliers.workspace import open_workspace
from tests.support.runs import quiet_run
from tests.tasks.test_shards import prepared_of

LINES = [Event(0.0, "log", message=f"line {number}", end=10 * number) for number in range(1, 5)]


class Scripted:
    """This computer, with one job that prints LINES; `breaks`: raised by the first tries, each after two lines."""

    provider, name, python, instance_id = "local", "here", ("python",), "disk"

    def __init__(self, folder, *breaks):
        self.workspace = self.shared = str(folder)
        self.breaks, self.ends = list(breaks), []
        self.on_cancel = lambda: None
        self.lost = None

    def upload(self, local, remote):
        """Nothing: the workspace is the same."""

    def start(self, job):
        return JobHandle(job.name, 1, f"jobs/{job.name}/0001")

    def follow(self, handle, offset=0):
        left = [event for event in LINES if event.end > offset]
        if self.breaks:
            yield from left[:2]
            raise self.breaks.pop(0)
        yield from left

    def cancel(self, handle, grace_seconds=10.0):
        self.ends.append(grace_seconds)
        self.on_cancel()

    def result(self, handle):
        if self.lost:
            raise self.lost

    def download(self, remote, local, **_):
        local.write_text(json.dumps({"sequences": 1, "tokens": 1}))


@pytest.fixture
def run(tmp_path):
    return quiet_run(prepared_of(4, 1), open_workspace(tmp_path))


def step(run, machine):
    return run_step(run, machine, "analyze", "analyze-x", run.reporter)


def heard_by(run):
    lines = []
    run.listen(lambda step, event: lines.append(event.message))
    return lines


def test_a_retry_joins_the_job_at_the_byte_where_the_connection_broke(run, tmp_path):
    machine, lines = Scripted(tmp_path, MachineGone("no answer")), heard_by(run)
    with pytest.raises(MachineGone):
        step(run, machine)
    step(run, machine)
    assert lines == [event.message for event in LINES], "each line once, in order"
    assert machine.ends == [], "a broken connection leaves the job alone"
    written = (run.workspace.study(run.prepared.study_id) / "run.log").read_text().splitlines()
    assert [line.rpartition(": ")[2] for line in written] == lines


def test_a_job_that_is_lost_is_followed_from_its_beginning_again(run, tmp_path):
    machine, lines = Scripted(tmp_path), heard_by(run)
    machine.lost = MachineLost("gone")
    with pytest.raises(MachineLost):
        step(run, machine)
    machine.lost = None
    step(run, machine)
    assert lines == [event.message for event in LINES] * 2


@pytest.mark.parametrize(("error", "grace"), [(KeyboardInterrupt, INTERRUPT_SECONDS), (SystemExit, 10.0)])
def test_a_cancel_takes_the_job_along_and_the_end_of_the_process_finds_it_until_then(run, tmp_path, error, grace):
    machine = Scripted(tmp_path, error())

    def ends_meanwhile():
        machine.on_cancel = lambda: None
        run.end_local_jobs()  # the process ends while the job still takes its time

    machine.on_cancel = ends_meanwhile
    with pytest.raises(error):
        step(run, machine)
    assert machine.ends == [grace, END_SECONDS]
    run.end_local_jobs()
    assert machine.ends == [grace, END_SECONDS], "it is not followed any more"


def test_a_run_that_was_cancelled_ends_its_job_with_the_next_event(run, tmp_path):
    machine = Scripted(tmp_path)
    lines = heard_by(run)
    run.listen(lambda step, event: run.cancel() if event.message == "line 2" else None)
    with pytest.raises(StudyCancelled):
        step(run, machine)
    assert (lines, len(machine.ends)) == (["line 1", "line 2"], 1)
