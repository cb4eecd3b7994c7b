"""A step of a study as a job on a machine: started or found, followed live, ended when the run is.

What the job says goes to the run's log and to run.log, its progress to an artifact, and both to whoever listens in this
process (the command's progress bars). A broken connection leaves the job alone; a cancelled run takes it along.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger

from outliers.dispatch.transfer import HERE, forget_sent, secrets, send_model, send_study
from outliers.errors import MachineGone, MachineLost, OutliersError
from outliers.events.event import Event
from outliers.jobs import jobs
from outliers.jobs.jobs import JobHandle, JobSpec
from outliers.locks import locked
from outliers.machines.answers import parse_result
from outliers.machines.base import Machine
from outliers.publish import runlog
from outliers.study.parts import LOCKS
from outliers.study.prepare import Prepared
from outliers.untrusted.bounds import LOG_CHARS, RESULT_BYTES, STEPS
from outliers.workspace import Workspace
from tasks.progress import Progress

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

AT_WORK: dict[JobHandle, Machine] = {}
"""Jobs that this process follows now: they must not outlive a command that is ended."""

INTERRUPT_SECONDS = 2.0
"""What a job on this computer has to end by itself after Ctrl-C; its journal is whole at any moment."""

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
    handle = _started(machine, prepared, verb, job_name, workspace, options, env)
    AT_WORK[handle] = machine
    progress = Progress(f"{prepared.study_id}{part.replace(' ', '-').replace('/', 'of')}", f"{prepared.title}{part}")
    logger, said, waits = get_run_logger(), Said(f"{verb}{part}"), True
    mark = (machine.instance_id, handle)
    try:
        for event in machine.follow(handle, _SEEN.get(mark, 0)):
            _SEEN[mark] = event.end
            for shown in said.taken(event):
                if shown.kind == "log":
                    logger.log(_LEVELS[shown.level], "%s", shown.message)
                elif shown.kind == "progress":
                    progress.show(shown)
                for listen in LISTENERS.copy():
                    listen(f"{verb}{part}", shown if not part else replace(shown, step=f"{shown.step}{part}"))
            heed_guards()
    except Exception:
        # the connection broke, or the step failed by itself: the job is left alone, and a retry joins it
        raise
    except BaseException as error:
        # cancelled, or Ctrl-C: what was paid for is in the journal, and nothing may go on unseen
        waits = False
        with undisturbed():
            logger.warning("cancelled: ending %s on %s", job_name, machine.name)
            hurry = isinstance(error, KeyboardInterrupt) and machine.provider == HERE
            try:
                machine.cancel(handle, *([INTERRUPT_SECONDS] if hurry else []))
            except OutliersError as failed:
                # it must not hide that the run was cancelled: the machine is released for that, and its jobs with it
                logger.warning("%s could not be ended: %s", job_name, failed)
        raise
    finally:
        AT_WORK.pop(handle, None)
        progress.close(wait=waits)
        try:
            runlog.append(workspace.study(prepared.study_id), said.lines, workspace.root)
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


class Said:
    """What a step has said: the lines of its log, which a machine that was taken over can't make longer than LOG_CHARS, and
    the things that it counts, at most STEPS."""

    def __init__(self, step: str) -> None:
        self.lines: list[str] = []
        self._step = step
        self._left = LOG_CHARS
        self._counted: set[str] = set()

    def taken(self, event: Event) -> list[Event]:
        """The event, where it is one to be shown; in the place of the first log line that is too much, a warning."""
        if event.kind == "progress":
            if len(self._counted) < STEPS:
                self._counted.add(event.step)
            return [event] if event.step in self._counted else []
        if event.kind != "log":
            return [event]
        if self._left <= 0:
            return []
        self._left -= len(event.message) + 1
        if self._left <= 0:
            text = f"{self._step} has printed {LOG_CHARS / 1e6:.0f} MB: nothing more of it is shown or kept"
            event = replace(event, level="warning", message=text)
        self.lines.append(runlog.line(event, self._step))
        return [event]


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


def _started(
    machine: Machine, prepared: Prepared, verb: str, job_name: str, workspace: Workspace, *more: Any
) -> JobHandle:
    """`start_step`; interrupted while a job of this computer was being started, it is not left to itself."""
    try:
        return start_step(machine, prepared, verb, job_name, workspace, *more)
    except Exception:
        raise
    except BaseException:
        if machine.provider == HERE:
            with undisturbed(), contextlib.suppress(OutliersError):
                begun = jobs.newest(Path(machine.workspace), job_name)
                if begun is not None and jobs.status(begun.folder) == "running":
                    machine.cancel(begun, INTERRUPT_SECONDS)
        raise


def end_at_work() -> None:
    """End the jobs on this computer that this process still follows, at once. Raises nothing that another one's end needs."""
    for handle, machine in list(AT_WORK.items()):
        if machine.provider == HERE:
            with contextlib.suppress(OutliersError):
                machine.cancel(handle, 0.5)


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
        machine.download(f"{handle.folder}/result.json", local, max_bytes=RESULT_BYTES, max_files=1)
        return parse_result(local.read_bytes(), handle.name)
