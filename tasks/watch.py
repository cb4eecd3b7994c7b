"""A step of a study as a job on a machine: started or found, followed live, ended when the run is.

What the job says goes to the run's log and to run.log, its progress to an artifact, and both to whoever listens in this
process (the command's progress bars). A broken connection leaves the job alone; a cancelled run takes it along.
"""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from outliers import runlog
from outliers.errors import JobFailed, MachineGone, MachineLost, OutliersError
from outliers.events import Event
from outliers.jobs import JobHandle, JobSpec
from outliers.machines.base import Machine
from outliers.parts import LOCKS, locked
from outliers.prepare import Prepared
from outliers.travel import forget_sent, secrets, send_model, send_study
from outliers.workspace import Workspace

ARTIFACT_SECONDS = 2.0
"""Progress artifacts are updated at most this often: each is a call to the server."""

LOCK_SECONDS = 0.1
"""Between two tries at a lock that another part has."""

LISTENERS: list[Callable[[str, Event], None]] = []
"""Called with (step, event) in the process of the flow; the command hangs its progress bars here."""

GUARDS: list[Callable[[], None]] = []
"""Called with every event, in the thread of the step that it is of: whoever must end that step (its budget is spent, its
run is cancelled) raises here. Parts of one study run in threads of one process, and each calls all of these."""

_SEEN: dict[tuple[str, JobHandle], int] = {}
"""How far each job of a disk was followed in this process: a retried task goes on there, so no line is said twice. On another
machine of the same name everything is new."""

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def run_step(
    machine: Machine,
    prepared: Prepared,
    verb: str,
    job_name: str,
    workspace: Workspace,
    options: tuple[str, ...] = (),
    part: str = "",
    env: Mapping[str, str] = {},
) -> dict[str, Any]:
    """Run `python -m outliers VERB` for a study on `machine` to its end; returns what the step reports.

    `options` go behind the verb's own. `part` names the part of a study that is spread: its progress is told apart from
    that of others. `env`: variables of the job, which may be secret. Raises the step's own error. A job of that name that
    still runs is joined, not started again.
    """
    handle = start_step(machine, prepared, verb, job_name, workspace, options, env)
    progress = _Progress(f"{prepared.study_id}{part.replace(' ', '-').replace('/', 'of')}", f"{prepared.title}{part}")
    logger, said = get_run_logger(), []
    mark = (machine.instance_id, handle)
    try:
        for event in machine.follow(handle, _SEEN.get(mark, 0)):
            _SEEN[mark] = event.end
            if event.kind == "log":
                logger.log(_LEVELS[event.level], event.message)
                said.append(runlog.line(event, f"{verb}{part}"))
            elif event.kind == "progress":
                progress.show(event)
            for listen in LISTENERS.copy():
                listen(f"{verb}{part}", event if not part else replace(event, step=f"{event.step}{part}"))
            heed_guards()
    except Exception:
        # the connection broke, or the step failed by itself: the job is left alone, and a retry joins it
        raise
    except BaseException:
        # cancelled, or Ctrl-C: what was paid for is in the journal, and nothing may go on unseen
        with undisturbed():
            logger.warning("cancelled: ending %s on %s", job_name, machine.name)
            try:
                machine.cancel(handle)
            except OutliersError as error:
                # it must not hide that the run was cancelled: the machine is released for that, and its jobs with it
                logger.warning("%s could not be ended: %s", job_name, error)
        raise
    finally:
        try:
            runlog.append(workspace.study(prepared.study_id), said, workspace.root)
        except OSError as error:
            # a full disk ends the step with its own error, which this must not hide; the lines are in the run's log
            logger.warning("run.log could not be written: %s", error)
    try:
        machine.result(handle)
    except MachineGone:
        # the connection is lost, not the job: it is joined where it was left
        raise
    except MachineLost:
        # the job is gone, maybe with all its files: what begins again has the same name and another stream
        forget_sent(machine)
        _SEEN.pop(mark, None)
        raise
    return _result(machine, handle)


def heed_guards() -> None:
    """Call every guard; whoever waits does it too."""
    # other parts come and go meanwhile
    for guard in GUARDS.copy():
        guard()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """In the block no Ctrl-C and no SIGTERM is heard: what was asked once is being done, and a second one would break it off.

    Only the main thread hears signals at all; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _deaf) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _deaf(number: int, frame: object) -> None:
    """A handler that does nothing."""


def start_step(
    machine: Machine,
    prepared: Prepared,
    verb: str,
    job_name: str,
    workspace: Workspace,
    options: tuple[str, ...] = (),
    env: Mapping[str, str] = {},
) -> JobHandle:
    """Send the study to the machine and start (or find) the job."""
    # what another machine reads has its paths in it, and one name here for all machines of the study: one at a time
    with locked(workspace.root / LOCKS / f"{prepared.study_id}-sent", _wait):
        place = send_study(machine, prepared, workspace)
    if verb == "extract":
        send_model(machine, prepared)
    argv = (*machine.python, "-m", "outliers", verb, place, "--workspace", machine.workspace, *options)
    known = secrets(machine, prepared) if verb == "extract" else {}
    return machine.start(JobSpec(name=job_name, argv=argv, env={**known, **env}))


def _wait() -> None:
    heed_guards()
    time.sleep(LOCK_SECONDS)


def _result(machine: Machine, handle: JobHandle) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "result.json"
        machine.download(f"{handle.folder}/result.json", local)
        try:
            content: dict[str, Any] = json.loads(local.read_text())
        except ValueError as error:
            raise JobFailed(f"job {handle.name} left no readable result: {error}") from error
        return content


class _Progress:
    """A progress artifact for each thing that a step counts (download, extract...), updated now and then."""

    def __init__(self, study_id: str, title: str) -> None:
        self._study_id, self._title = study_id, title
        self._artifacts: dict[str, UUID] = {}
        self._told: dict[str, float] = {}

    def show(self, event: Event) -> None:
        if not event.total:
            return
        finished = event.done >= event.total
        if not finished and time.monotonic() - self._told.get(event.step, float("-inf")) < ARTIFACT_SECONDS:
            return
        self._told[event.step] = time.monotonic()
        try:
            self._tell(event, min(100.0, 100.0 * event.done / event.total))
        except (PrefectException, httpx.HTTPError) as error:
            # a server that is away must not end the step; the next one shows where it is
            get_run_logger().warning("the progress of %s could not be shown: %s", event.step, error)

    def _tell(self, event: Event, share: float) -> None:
        if event.step in self._artifacts:
            update_progress_artifact(self._artifacts[event.step], progress=share)
            return
        key, description = f"{event.step}-{self._study_id}", f"{event.step} {self._title}"
        made = create_progress_artifact(progress=share, key=key, description=description)
        if isinstance(made, UUID):
            self._artifacts[event.step] = made
