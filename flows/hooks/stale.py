"""Runs that died with their worker: found by a lock that each run's process holds while it lives, and ended by `reap`.

    <workspace>/runs/<flow run id>     {"host", "pid", "run_count"}, and an flock of the process that runs the flow

Prefect does not notice the death of a flow that was killed together with its worker: its state would stay Running.
An flock ends with its process, however that ends, while a process id is used again; so the lock decides. A run whose file
names another computer is left alone: only that computer can see whether it lives.

A run that was killed before it had its lock, in the seconds of its imports, stays Pending or Running too. Prefect
does not say on which computer that was; but a living worker reports to the server every half minute, and a run whose lock is
held has a label there (`BEGUN`). A run that no worker has had for ten minutes, and that is not a process here, is dead. Where
that is wrong nothing is lost: a run that is called Crashed and begins all the same is Running again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from prefect import Flow, State
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

from flows.hooks.live import begin, forget, known
from outliers.errors import OutliersError
from outliers.files.atomic import temporary_for
from outliers.jobs import jobs
from outliers.locks import is_locked
from outliers.workspace import Workspace, default_root

WATCHED = ("study", "sweep")
"""Flows whose runs hold a lock."""
AT_WORK = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
"""States in which a run has a process, or a worker that starts one."""
FOLDER = "runs"
BEGUN = "outliers.begun"
"""Label of a run: the number of the attempt whose process has, or had, the lock."""
GRACE_VARIABLE = "OUTLIERS_REAP_GRACE_SECONDS"
GRACE_SECONDS = 600.0
"""How long a run that has not begun is left alone; imports from a slow disk take a minute, not ten."""
FLOW_COMMAND = re.compile(r"prefect\.|.*/prefect/runner/")
"""How a word in the command line of a flow's process begins, and of the process that starts it: Prefect's modules and files."""
MISSED_BEATS = 3
"""A worker that has missed this many heartbeats is offline, as for Prefect's server."""
LOST = (
    "The process of this run is gone, and its worker with it: killed, out of memory, or the machine was switched off. "
    "Retry goes on where it was: what is done is not done again."
)
UNBEGUN = (
    "No process of this run has begun, and the worker that took it is gone: killed, out of memory, or the machine was "
    "switched off. Retry, once a worker runs (`prefect worker start --pool ...`): what was done before is not done again."
)
GONE = "The run was being cancelled; its process is gone, and its worker with it."

log = logging.getLogger("outliers.stale")


def begins(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook on_running: this process holds the run's lock from now on."""
    with get_client(sync_client=True) as client:
        count = client.read_flow_run(flow_run.id).run_count
    path = _mark(flow_run)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = temporary_for(path)
    handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    # renamed last: under its name the file always has its lock and its content
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.write(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "run_count": count}).encode())
    draft.replace(path)
    begin(flow_run.id, handle)
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(flow_run.id, {BEGUN: count})


def ends(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of every end but a crash: give the lock up. After a cancel the worker calls it, in another process.

    Not on_crashed: the worker says Crashed once more after that hook, and what was retried meanwhile would be undone.
    """
    run = known(flow_run.id)
    if run is not None and run.lock_file is not None:
        # the name first: under it the file always has its lock
        _mark(flow_run).unlink(missing_ok=True)
        os.close(run.lock_file)
    else:
        _remove_if_free(_mark(flow_run))
    forget(flow_run.id)


def end_stale_runs(workspace: Workspace, grace_seconds: float | None = None) -> tuple[list[str], list[str]]:
    """End every run that says it runs, or is about to, and has no process; (what was done, what failed).

    `grace_seconds`: how long one that has not begun is left alone ($OUTLIERS_REAP_GRACE_SECONDS, else ten minutes).
    In `workspace`, files of runs that have ended are removed; of crashed runs, those that were not retried.
    """
    if grace_seconds is None:
        grace_seconds = float(os.environ.get(GRACE_VARIABLE) or GRACE_SECONDS)
    done: list[str] = []
    failed: list[str] = []
    with get_client(sync_client=True) as client:
        for found in _running(client):
            # the end of a sweep may just have cancelled it
            run = client.read_flow_run(found.id)
            # a run that has ended or begun again meanwhile is in another state now
            dead = _is_at_work(run) and (_is_dead(run) or _never_began(client, run, grace_seconds))
            if dead and client.read_flow_run(run.id).state_id == run.state_id:
                ended, unended = _end(client, run)
                done, failed = done + ended, failed + unended
        for path in sorted((workspace.root / FOLDER).glob("*-*")):
            if not is_locked(path) and _has_ended(client, path.name):
                path.unlink(missing_ok=True)
    return done, failed


def _end(client: SyncPrefectClient, run: FlowRun) -> tuple[list[str], list[str]]:
    """Set the final state of a run without a process."""
    if run.state is not None and run.state.type == StateType.CANCELLING:
        done, failed = _end_jobs(run)
        state: State[Any] = Cancelled(message=GONE)
        how = "it had been cancelled"
    else:
        # a step that is at work goes on: Retry joins it, and what it does is not lost
        message = UNBEGUN if _is_pending(run) else LOST
        done, failed, state, how = [], [], Crashed(message=message), "crashed: Retry goes on where it was"
    client.set_flow_run_state(run.id, state, force=True)
    running = TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING]))
    for task in client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])), task_run_filter=TaskRunFilter(state=running)
    ):
        client.set_task_run_state(task.id, Crashed(message="its run has no process any more"), force=True)
    _remove_if_free(_mark(run))
    return [*done, f"{run.name} ({run.id}) had no process any more; {how}"], failed


def _is_at_work(run: FlowRun) -> bool:
    return run.state is not None and run.state.type in AT_WORK


def _is_pending(run: FlowRun) -> bool:
    return run.state is not None and run.state.type == StateType.PENDING


def _has_ended(client: SyncPrefectClient, run: str) -> bool:
    try:
        state = client.read_flow_run(UUID(run)).state
    except (ObjectNotFound, ValueError):
        # a run of another server, or not a run
        return False
    return state is not None and state.is_final()


def _running(client: SyncPrefectClient) -> list[FlowRun]:
    states = FlowRunFilterStateType(any_=list(AT_WORK))
    found: list[FlowRun] = []
    while True:
        page = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=list(WATCHED))),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=states)),
            limit=200,
            offset=len(found),
        )
        found += page
        if not page:
            return found


def _is_dead(run: FlowRun) -> bool:
    """Whether this very attempt was made on this computer, and its process is gone."""
    if not _has_begun(run):
        return False
    record = _record(run)
    if record.get("host") != socket.gethostname() or record.get("run_count") != run.run_count:
        return False
    return not is_locked(_mark(run))


def _record(run: FlowRun) -> dict[str, Any]:
    """The content of a run's file; empty where there is no file."""
    try:
        return dict(json.loads(_mark(run).read_bytes()))
    except (OSError, ValueError):
        return {}


def _has_begun(run: FlowRun) -> bool:
    """Whether a process of this attempt has had the run's lock, on whatever computer."""
    # a pending run has the count, the label and the file of the attempt before
    return not _is_pending(run) and run.run_count in (run.labels.get(BEGUN), _record(run).get("run_count"))


def _never_began(client: SyncPrefectClient, run: FlowRun, grace_seconds: float) -> bool:
    """Whether a worker took this run and is gone, and no process of the run has had the lock or is about to have it."""
    if run.state is None or run.work_pool_name is None or _has_begun(run):
        return False
    now = datetime.now(UTC)
    if now - run.state.timestamp < timedelta(seconds=grace_seconds) or _has_process(run):
        return False
    try:
        pool = client.read_work_pool(run.work_pool_name)
    except ObjectNotFound:
        return False
    # runs of other kinds of workers may wait for long, and outlive them
    return pool.type == "process" and not _has_worker(client, run, now, grace_seconds)


def _has_process(run: FlowRun) -> bool:
    """Whether the run's flow is a process of this computer. Its jobs outlive an attempt and do not count."""
    for process in psutil.process_iter():
        mine = str(process.pid) == run.infrastructure_pid
        try:
            if process.environ().get("PREFECT__FLOW_RUN_ID") == str(run.id):
                mine = mine or any(FLOW_COMMAND.match(word) for word in process.cmdline())
            else:
                mine = False  # its number is used again
        except psutil.AccessDenied:
            pass  # another user's process: taken for the run's
        except psutil.Error:
            continue
        if mine:
            return True
    return False


def _has_worker(client: SyncPrefectClient, run: FlowRun, now: datetime, grace_seconds: float) -> bool:
    """Whether the worker that took the run has sent a heartbeat since."""
    name = run.labels.get("prefect.worker.name")
    if name == os.environ.get("PREFECT__WORKER_NAME"):
        # that worker runs this flow, on this computer: where no process of the run is here, it was another one of that name
        return False
    # the latest heartbeat comes first
    for worker in client.read_workers_for_work_pool(str(run.work_pool_name), offset=0, limit=200):
        silence = timedelta(seconds=max(grace_seconds, MISSED_BEATS * (worker.heartbeat_interval_seconds or 30)))
        if worker.name == name and worker.last_heartbeat_time is not None:
            return now - worker.last_heartbeat_time < silence
    return False


def _remove_if_free(path: Path) -> None:
    if path.exists() and not is_locked(path):
        path.unlink(missing_ok=True)


def _mark(run: FlowRun) -> Path:
    return _root(run) / FOLDER / str(run.id)


def _root(run: FlowRun) -> Path:
    """The workspace that a run's parameters name, else the default one of this process."""
    asked = run.parameters
    named = asked.get("workspace") or (asked.get("compute") or {}).get("workspace")
    return Path(named).expanduser().absolute() if named else default_root().expanduser().absolute()


def _end_jobs(run: FlowRun) -> tuple[list[str], list[str]]:
    """End the jobs on this computer that a cancelled run has left at work: they have its id in their environment."""
    done, failed = [], []
    for handle in jobs.running(_root(run)):
        group = jobs.group_of(handle.folder)
        with contextlib.suppress(psutil.Error):
            if not group or psutil.Process(group).environ().get("PREFECT__FLOW_RUN_ID") != str(run.id):
                continue
            try:
                jobs.cancel(handle.folder)
            except OutliersError as error:
                failed.append(f"{handle.name} of {run.name} could not be ended: {error}")
            else:
                done.append(f"{handle.name} of {run.name} was ended")
    return done, failed
