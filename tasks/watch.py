"""A step of a study as a job on a machine: started or found, followed live, ended when the run is.

What the job says goes to the run's log and to run.log, its progress to an artifact, and both to whoever listens in this
process (the command's progress bars). A broken connection leaves the job alone; a cancelled run takes it along.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from outliers import runlog
from outliers.errors import JobFailed
from outliers.events import Event
from outliers.jobs import JobHandle, JobSpec
from outliers.machines.base import Machine
from outliers.prepare import Prepared
from outliers.workspace import Workspace

ARTIFACT_SECONDS = 2.0
"""Progress artifacts are updated at most this often: each is a call to the server."""

LISTENERS: list[Callable[[str, Event], None]] = []
"""Called with (step, event) in the process of the flow; the command hangs its progress bars here."""

_SEEN: dict[JobHandle, int] = {}
"""How far each job was followed in this process: a retried task goes on there, so no line is said twice."""

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def run_step(machine: Machine, prepared: Prepared, verb: str, job_name: str, workspace: Workspace) -> dict[str, Any]:
    """Run `python -m outliers VERB` for a study on `machine` to its end; returns what the step reports.

    Raises the step's own error. A job of that name that still runs is joined, not started again.
    """
    handle = start_step(machine, prepared, verb, job_name)
    progress = _Progress(prepared.study_id, prepared.title)
    logger, said = get_run_logger(), []
    try:
        for event in machine.follow(handle, _SEEN.get(handle, 0)):
            _SEEN[handle] = event.end
            if event.kind == "log":
                logger.log(_LEVELS[event.level], event.message)
                said.append(runlog.line(event, verb))
            elif event.kind == "progress":
                progress.show(event)
            for listen in LISTENERS:
                listen(verb, event)
    except Exception:
        # the connection broke, or the step failed by itself: the job is left alone, and a retry joins it
        raise
    except BaseException:
        # cancelled, or Ctrl-C: what was paid for is in the journal, and nothing may go on unseen
        logger.warning("cancelled: ending %s on %s", job_name, machine.name)
        machine.cancel(handle)
        raise
    finally:
        try:
            runlog.append(workspace.study(prepared.study_id), said, workspace.root)
        except OSError as error:
            # a full disk ends the step with its own error, which this must not hide; the lines are in the run's log
            logger.warning("run.log could not be written: %s", error)
    machine.result(handle)
    return _result(machine, handle)


def start_step(machine: Machine, prepared: Prepared, verb: str, job_name: str) -> JobHandle:
    """Send the study to the machine and start (or find) the job."""
    place = send_spec(machine, prepared)
    argv = (*machine.python, "-m", "outliers", verb, place, "--workspace", machine.workspace)
    return machine.start(JobSpec(name=job_name, argv=argv))


def send_spec(machine: Machine, prepared: Prepared) -> str:
    """Put the study on the machine as the file that every step reads; returns its path there."""
    place = f"studies/{prepared.study_id}.json"
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "spec.json"
        local.write_text(prepared.model_dump_json())
        machine.upload(local, place)
    return f"{machine.workspace}/{place}"


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
        share = min(100.0, 100.0 * event.done / event.total)
        if event.step in self._artifacts:
            update_progress_artifact(self._artifacts[event.step], progress=share)
            return
        key, description = f"{event.step}-{self._study_id}", f"{event.step} {self._title}"
        made = create_progress_artifact(progress=share, key=key, description=description)
        if isinstance(made, UUID):
            self._artifacts[event.step] = made
