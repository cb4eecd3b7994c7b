"""More faults of `fault_suite`: of runs that have not begun, and of whoever else is at the same study.

Before it: `fault_suite`. After it: `fault_table`.
"""

from __future__ import annotations

import signal
import time

from tests.support.fault_case import Case
from tests.support.fault_home import until
from tests.support.fault_suite import kill_with_worker, reaped, retry_joins, strike
from tests.support.fault_world import GRACE_SECONDS


@strike("both killed before it begins")
def killed_before_it_began(case: Case, step: str) -> None:
    """Pending, which no lock tells of: it is left alone while its process lives, though its worker is gone."""
    process = case.home.flow_process(case.run)
    case.home.kill_worker()
    time.sleep(GRACE_SECONDS + 1.0)
    assert case.look_for_stale_runs() == [], "a run was ended whose process lives"
    process.kill()
    case.drop()
    assert case.look_for_stale_runs(grace_seconds=600.0) == [], "a run was ended that may just be beginning"
    assert case.home.state(case.run)["type"] == "PENDING"
    case.home.start_worker()
    assert f"({case.run}) had no process any more; crashed" in case.home.reap()
    state = case.home.state(case.run)
    assert state["name"] == "Crashed"
    assert state["message"].startswith("No process of this run has begun")
    case.note("both killed before it begins", step, state, "waits for reap (25 min), or runs it; Retry")
    case.retry()


@strike("both killed before it has its lock")
def killed_without_a_lock(case: Case, step: str) -> None:
    """The run says Running, and its process dies without a lock: something is in the way of that."""
    obstacle = case.workspace.root / "runs"
    obstacle.write_text("in the way")
    case.begin()
    case.hold(step)
    assert case.look_for_stale_runs(grace_seconds=0.0) == [], "a run was ended whose process lives"
    kill_with_worker(case, case.run)
    time.sleep(GRACE_SECONDS + 1.0)
    state = reaped(case, case.run)
    obstacle.unlink()
    case.note("both killed before it has its lock", step, state, "waits for reap (25 min), or runs it; Retry")
    retry_joins(case, step, state["timestamp"])


@strike("second run")
def second_run(case: Case, step: str) -> None:
    """Two runs of one study at once: both are at the step, and one job works."""
    first, second = case.runs
    for run in (first, second):
        case.until(lambda run=run: case.tasks.get(step, step) in case.home.task_runs(run), f"{step} in both runs")
    time.sleep(1.0)
    if step in ("extract", "analyze"):
        assert case.attempts(step) == 1, "two jobs at one study"
    case.note("second run", step, case.home.state(second), "nothing: both follow one job, and end alike")
    case.release(step)


@strike("extraction by hand")
def by_hand(case: Case, step: str) -> None:
    """Another process starts the extraction of the same capture during the run: it is refused, and the run goes on."""
    said = case.extract_by_hand().communicate(timeout=120)[0]
    assert said.rstrip().endswith("wait for it, or end it"), said
    assert case.home.state(case.run)["name"] == "Running"
    case.note(
        "extraction by hand",
        step,
        {"name": "Running", "message": said.splitlines()[-1]},
        "waits for the run, or ends it",
    )
    case.release(step)


@strike("extraction by hand before it")
def by_hand_before(case: Case, step: str) -> None:
    """Somebody extracts the same capture by hand when the run begins: the run is refused; afterwards it finds it done."""
    process = case.extract_by_hand()
    until(lambda: case.journaled() > 0, "a journaled sequence", 0.002)
    process.send_signal(signal.SIGSTOP)
    try:
        case.begin()
        state = case.wait("Failed")
        assert "another process is writing" in state["message"]
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(120) == 0, process.communicate()[0]
    case.note("extraction by hand before it", step, state, "waits for the other, or ends it; Retry")
    case.retry()


BEGUN_BY_STRIKE = {
    ("S3 server down", "beginning"),
    ("both killed before it has its lock", "extract"),
    ("extraction by hand before it", "extract"),
}
"""Faults that are there before the run is."""
