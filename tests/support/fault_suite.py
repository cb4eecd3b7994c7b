"""Faults at the steps of a study: what each does, what Prefect then says, and what a user does.

Each is a function that STRIKES names: it finds a step held, strikes, reads the state, does what a user would do, and leaves
the run going on. Before it: `fault_world`, where the faults are made, and `fault_case`. After it: `fault_table`.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.fault_case import Case
from tests.support.fault_home import until

Strike = Callable[[Case, str], None]
STRIKES: dict[str, Strike] = {}
DOWN_SECONDS = 30.0
"""How long the S3 server is down."""


def strike(name: str) -> Callable[[Strike], Strike]:
    """Gives a fault its name in the table. It finds the step held, and leaves the run going on."""

    def named(function: Strike) -> Strike:
        STRIKES[name] = function
        return function

    return named


@strike("raises once")
def raises_once(case: Case, step: str) -> None:
    """The job vanishes with its supervisor, the store is busy, the host is away: the task tries again by itself."""
    if step == "sync":
        case.world.gate.answer("busy")
    elif step != "provision":
        case.kill_job(step, supervisor=True)
    state = await_retry(case, step)
    case.note("raises once", step, state, "nothing: the task is tried again after 2, 10 and 30 s")
    case.release(step)


def await_retry(case: Case, step: str) -> dict[str, str]:
    """Return once the task of a step waits for its next try; its state, and what the log says of it."""
    told = {"provision": "", "sync": "s3://"}.get(step, f"job '{case.job_name(step)}'")
    said = re.compile(rf"Task run failed with exception: (.*{told}.* - Retry \d/3 will start.*)")
    found = case.until(lambda: said.search(case.home.logs(case.run)), f"another try of {step}")
    return {"name": "AwaitingRetry", "message": found[1]}


@strike("raises for good")
def raises_for_good(case: Case, step: str) -> None:
    """A host key that changed, a file system with a limit, a file in the way of the report, a store that refuses the keys."""
    obstacle = case.workspace.study(case.study.study_id) / "plots"
    if step == "provision":
        case.host.change_host_key()
    elif step == "extract":
        case.forbid_writing()
    elif step == "sync":
        case.world.gate.answer("refuse")
    else:
        obstacle.parent.mkdir(parents=True, exist_ok=True)
        obstacle.write_text("in the way")
    if step != "sync":
        case.release(step)
    state = case.wait("Failed")
    assert re.search(CAUSES[step], state["message"]), f"the cause is not named: {state['message']}"
    # what Prefect's server tells of tasks comes a moment later than of flows
    failed = until(lambda: case.failed_task(step), f"the end of {step}", explain=case.log)
    if step != "provision":  # which was held by a host that is away: that is tried again
        assert failed["run_count"] == 1, "a permanent error is not tried again"
    case.note("raises for good", step, state, "removes the cause the message names; Retry")
    if step == "extract":
        case.killed_at = case.unrecorded()
        case.ended("extract")
    elif step == "provision":
        case.host.restore_host_key()
    elif step == "sync":
        case.world.gate.open()
    else:
        obstacle.unlink()
    # the numbers of an analysis are there: a Retry renders them, and starts neither of its jobs again
    case.retry()


CAUSES = {
    "provision": "the host key of box is not the one",
    "extract": "File too large",
    "analyze": r"^report: \[Errno \d+\] .*plots.*run the same again",
    "merge": r"\[Errno \d+\] .*plots",
    "sync": "AccessDenied",
}
"""What the state of the run says of why a step failed for good."""


@strike("job killed")
def job_killed(case: Case, step: str) -> None:
    """SIGKILL of the process that does the step, as the kernel does where memory ends; its supervisor says how it ended."""
    case.kill_job(step, supervisor=False)
    state = case.wait("Failed")
    assert "signal 9" in state["message"]
    case.note("job killed", step, state, "gives it more memory, if that was it; Retry")
    case.retry()


@strike("flow killed")
def flow_killed(case: Case, step: str) -> None:
    """SIGKILL of the flow's process: the worker sees it. The job lives on, and Retry joins it."""
    case.kill_flow()
    state = case.crashed()
    case.note("flow killed", step, state, "Retry: it joins the job that runs, or does what is missing")
    retry_joins(case, step, state["timestamp"])


def retry_joins(case: Case, step: str, since: str) -> None:
    """Retry while the step is still held: no second job is started. `since`: when the run crashed."""
    case.retry()
    if step in ("provision", "merge", "sync"):
        case.release(step)
        return
    began = case.attempts(step)
    until(lambda: case.back_at(step, since), f"{step} again", explain=case.log)
    time.sleep(1.0)  # were it to start another job, it would have
    case.release(step)
    assert case.attempts(step) == began, "a second job was started while the first runs"


@strike("worker killed")
def worker_killed(case: Case, step: str) -> None:
    """SIGKILL of the worker alone: the flow is a process of its own, and goes on."""
    case.home.kill_worker()
    case.release(step)
    case.home.start_worker()
    case.note("worker killed", step, case.home.state(case.run), "starts a worker again; the run needs nothing")


def kill_with_worker(case: Case, *runs: str) -> None:
    """SIGKILL of a worker and of the processes of runs; another worker is started."""
    processes = [case.home.flow_process(run) for run in runs]
    case.home.kill_worker()
    for process in processes:
        process.kill()
    case.home.start_worker()


def reaped(case: Case, *runs: str) -> dict[str, str]:
    """The state of a run that is Running for ever, once `reap` has looked; the last of `runs`, which died all."""
    assert [case.home.state(run)["name"] for run in runs] == ["Running"] * len(runs)
    said = case.home.reap()
    for run in runs:
        assert f"({run}) had no process any more; crashed" in said, said
        state = case.home.state(run)
        assert state["name"] == "Crashed"
        assert "Retry goes on where it was" in state["message"]
    return state


@strike("flow and worker killed")
def both_killed(case: Case, step: str) -> None:
    """Nobody is left to tell Prefect: the state stays Running until `reap` looks."""
    kill_with_worker(case, case.run)
    state = reaped(case, case.run)
    case.note("flow and worker killed", step, state, "waits for reap (15 min), or runs it; Retry")
    retry_joins(case, step, state["timestamp"])


@strike("sweep and worker killed")
def sweep_killed(case: Case, step: str) -> None:
    """The sweep's flow dies with the worker, its study lives on: Retry of the sweep joins that."""
    (child,) = case.home.children(case.run)
    kill_with_worker(case, case.run)
    state = reaped(case, case.run)
    assert case.home.state(child)["name"] == "Running", "a study that lives was ended"
    case.note("sweep and worker killed", step, state, "waits for reap (15 min), or runs it; Retry of the sweep")
    retry_joins(case, step, state["timestamp"])
    assert case.home.children(case.run) == [child], "a second run of the same study was started"


@strike("sweep, study and worker killed")
def sweep_and_study_killed(case: Case, step: str) -> None:
    """Only the job is left: Retry of the sweep gives the study another run, which joins it."""
    (child,) = case.home.children(case.run)
    kill_with_worker(case, case.run, child)
    state = reaped(case, child, case.run)
    case.note("sweep, study and worker killed", step, state, "waits for reap (15 min), or runs it; Retry of the sweep")
    case.retry()
    (again,) = until(lambda: set(case.home.children(case.run)) - {child}, "another run of the study", explain=case.log)
    began = case.attempts(step)
    until(lambda: step in case.home.task_runs(again), f"{step} again", explain=case.log)
    time.sleep(1.0)  # were it to start another job, it would have
    case.release(step)
    assert case.attempts(step) == began, "a second job was started while the first runs"


@strike("sweep killed, then cancelled")
def sweep_cancelled(case: Case, step: str) -> None:
    """Flow and worker of a sweep are killed and the sweep is cancelled: `reap` cancels its study, which lives."""
    (child,) = case.home.children(case.run)
    kill_with_worker(case, case.run)
    case.home.cancel(case.run)
    said = case.home.reap()
    assert f"({case.run}) had no process any more; it had been cancelled" in said, said
    state = case.wait("Cancelled")
    case.home.wait(child, "Cancelled")
    case.drop()
    case.check_nothing_is_left()
    case.ended(step)
    case.killed_at = case.unrecorded()
    case.note("sweep killed, then cancelled", step, state, "waits for reap, or runs it; Retry or the same sweep again")
    case.retry()


@strike("cancelled")
def cancelled(case: Case, step: str) -> None:
    """Cancel in the UI: the job ends with the run, and what is journaled stays."""
    case.home.cancel(case.run)
    if step in ("extract", "analyze"):
        case.until(lambda: case.cancel_asked(step), f"a cancel of {step}")
        case.release(step)
    state = case.wait("Cancelled")
    case.check_nothing_is_left()
    case.ended(step)
    assert not [path for path in case.published() if path.endswith("manifest.json")]
    case.note("cancelled", step, state, "nothing; Retry or the same study again goes on where it was")
    if step in ("provision", "sync"):
        case.release(step)
    elif step == "extract":
        case.killed_at = case.unrecorded()
    case.retry()


def cancelled_for_good(case: Case, step: str) -> dict[str, Any]:
    """The state of a run once it is cancelled; nothing runs any more, and what its job had done is remembered."""
    state = case.wait("Cancelled")
    case.drop()
    case.check_nothing_is_left()
    case.ended(step)
    if step == "extract":
        case.killed_at = case.unrecorded()
    return state


@strike("killed, then cancelled")
def killed_and_cancelled(case: Case, step: str) -> None:
    """Flow and worker are killed, the run is cancelled before anybody has looked: `reap` ends it, and its job."""
    process = case.home.flow_process(case.run)
    case.home.kill_worker()
    process.kill()
    case.home.cancel(case.run)
    assert case.home.state(case.run)["name"] == "Cancelling"
    case.home.start_worker()
    said = case.home.reap()
    assert f"({case.run}) had no process any more; it had been cancelled" in said, said
    state = cancelled_for_good(case, step)
    case.note("killed, then cancelled", step, state, "waits for reap, or runs it; Retry or the same study again")
    case.release(step)
    case.retry()


@strike("worker killed, then cancelled")
def cancelled_without_its_worker(case: Case, step: str) -> None:
    """The flow lives, the worker that began it is another one now: the run is cancelled all the same."""
    case.home.kill_worker()
    case.home.start_worker()
    case.home.cancel(case.run)
    if step in ("extract", "analyze"):
        case.until(lambda: case.cancel_asked(step), f"a cancel of {step}")
    case.release(step)
    state = cancelled_for_good(case, step)
    case.note("worker killed, then cancelled", step, state, "nothing; Retry or the same study again")
    case.retry()


@strike("server restarted")
def server_restarted(case: Case, step: str) -> None:
    """SIGKILL of the Prefect server in the middle of the step; the step goes on while it is away."""
    case.home.kill_server()
    if step != "sync":
        case.thaw()
    time.sleep(3.0)
    case.home.start_server()
    case.release(step)
    case.note("server restarted", step, case.home.state(case.run), "nothing")


@strike("result storage gone")
def storage_gone(case: Case, step: str) -> None:
    """What Prefect kept of finished tasks is removed, and the flow with it: Retry asks the world what is done."""
    shutil.rmtree(Path(case.home.environment["PREFECT_HOME"]) / "storage", ignore_errors=True)
    case.kill_flow()
    state = case.crashed()
    case.note("result storage gone", step, state, "Retry: steps run again and find their work done")
    retry_joins(case, step, state["timestamp"])


@strike("S3 server down")
def store_down(case: Case, step: str) -> None:
    """The store dies, and comes back after half a minute; only a study that begins or publishes needs it."""
    case.world.s3.kill()
    back = time.monotonic() + DOWN_SECONDS
    then = "nothing: the step does not need it"
    try:
        if step == "beginning":
            case.begin()
            state, then = case.wait("Failed"), "Retry, once the store is back"
        elif step == "sync":
            case.release(step)
            state, then = await_retry(case, step), "nothing, if it is back within 40 s; Retry after that"
        elif step == "provision":
            case.release(step)  # a host can't be away for so long
            case.hold("extract")
        time.sleep(max(0.0, back - time.monotonic()))
        if step not in ("beginning", "sync"):
            state = case.home.state(case.run)
    finally:
        case.world.s3.start()
    case.note("S3 server down", step, state, then)
    if step == "beginning":
        case.retry()
    else:
        case.release("extract" if step == "provision" else step)


@strike("machine lost")
def machine_lost(case: Case, step: str) -> None:
    """The machine is switched off and on again; its disk is as it was."""
    case.killed_at = case.journaled()
    case.host.kill()
    case.host.boot()
    state = await_retry(case, step)
    case.note("machine lost", step, state, "nothing, if it is back within two minutes; Retry after that")
