"""One step of a study as a job on a machine: started or joined, followed to its end, and ended when the run is.

What the job prints goes to the step's reporter and to run.log, and all its events to the listeners of the run. A broken
connection leaves the job alone, and a retry joins it; a cancelled run takes it along.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from outliers.dispatch.study_run import StudyRun
from outliers.dispatch.transfer import HERE, secrets, send_model, send_study
from outliers.errors import MachineGone, MachineLost, OutliersError
from outliers.events.event import Event
from outliers.events.stream import Reporter
from outliers.jobs import jobs
from outliers.jobs.jobs import JobHandle, JobSpec
from outliers.locks import locked
from outliers.machines.answers import parse_result
from outliers.machines.base import Machine
from outliers.publish import runlog
from outliers.publish.own import private_words
from outliers.study.parts import LOCKS
from outliers.study.prepare import Prepared
from outliers.untrusted.bounds import LOG_CHARS, RESULT_BYTES, STEPS

LOCK_SECONDS = 0.1
"""Between two tries at a lock that another shard has."""

INTERRUPT_SECONDS = 2.0
"""What a job on this computer has to end by itself after Ctrl-C; its journal is whole at any moment."""


def run_step(
    run: StudyRun,
    machine: Machine,
    verb: str,
    job_name: str,
    reporter: Reporter,
    *,
    options: tuple[str, ...] = (),
    shard: str = "",
    env: Mapping[str, str] = {},
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """Run `python -m outliers VERB` for a study on `machine` to its end; returns the step's result.

    A job of that name that still runs is joined, not started again. Raises the step's own error; StudyCancelled and
    BudgetSpent as `StudyRun.check`.

    Args:
        run: the run that the step belongs to
        reporter: gets the job's log and progress
        options: appended to the verb's own
        shard: ` 1/3` for a shard of the study; appended to the names of its steps for listeners and run.log
        env: variables of the job, which may be secret
        prepared: the study as this machine reads it (default: the run's)
    """
    handle = _start_or_end(run, machine, verb, job_name, options, env, prepared or run.prepared)
    # until its end, also while it is being ended: what still runs when the process ends is killed
    with run.following(machine, handle):
        _follow(run, machine, handle, verb, shard, reporter)
    try:
        machine.result(handle)
    except MachineGone:
        # the connection is lost, not the job: a retry joins it where it was left
        raise
    except MachineLost:
        # the job is lost, perhaps with all its files
        run.forget_sent(machine)
        run.forget_job(machine, handle)
        raise
    return _result(machine, handle)


def _follow(run: StudyRun, machine: Machine, handle: JobHandle, verb: str, shard: str, reporter: Reporter) -> None:
    """Hand on what a job says, to its end. A run that is cancelled ends the job."""
    output = StepOutput(f"{verb}{shard}")
    try:
        for event in machine.follow(handle, run.offset(machine, handle)):
            run.note_offset(machine, handle, event.end)
            for shown in output.accept(event):
                _report(shown, reporter)
                run.emit(f"{verb}{shard}", replace(shown, step=f"{shown.step}{shard}") if shard else shown)
            run.check()
    except Exception:
        # the connection broke, or the step failed by itself: the job is left alone, and a retry joins it
        raise
    except BaseException as error:
        _end_job(machine, handle, reporter, error)
        raise
    finally:
        _append_log(run, output, reporter)


def _report(event: Event, reporter: Reporter) -> None:
    if event.kind == "log":
        reporter.log(event.level, event.message)
    elif event.kind == "progress":
        reporter.progress(event.step, event.done, event.total, event.unit)


def _end_job(machine: Machine, handle: JobHandle, reporter: Reporter, error: BaseException) -> None:
    """End the job of a run that was cancelled: its journal has what was paid for, and nothing may go on unseen."""
    with undisturbed():
        reporter.log("warning", f"cancelled: ending {handle.name} on {machine.name}")
        hurry = isinstance(error, KeyboardInterrupt) and machine.provider == HERE
        try:
            machine.cancel(handle, *([INTERRUPT_SECONDS] if hurry else []))
        except OutliersError as failed:
            # it must not hide that the run was cancelled: the machine is released for that, and its jobs with it
            reporter.log("warning", f"{handle.name} could not be ended: {failed}")


def _append_log(run: StudyRun, output: StepOutput, reporter: Reporter) -> None:
    try:
        words = private_words(run.prepared)
        runlog.append(run.workspace.study(run.prepared.study_id), output.lines, run.workspace.root, words)
    except OSError as error:
        # a full disk ends the step with its own error, which this must not hide; the reporter has the lines
        reporter.log("warning", f"run.log could not be written: {error}")


class StepOutput:
    """What a step has printed, within bounds: a hostile machine can't make its log longer than LOG_CHARS, nor count more
    than STEPS things.

    `lines`: those of the log so far, as run.log has them.
    """

    def __init__(self, step: str) -> None:
        self.lines: list[str] = []
        self._step = step
        self._left = LOG_CHARS
        self._counted: set[str] = set()

    def accept(self, event: Event) -> list[Event]:
        """The event, where it is to be shown; a warning in the place of the first log line beyond the bound."""
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


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM in the block: it does what a first signal asked for, and a second must not break it off.

    Only the main thread hears signals; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: object) -> None:
    """A handler that does nothing."""


def _start_or_end(
    run: StudyRun,
    machine: Machine,
    verb: str,
    job_name: str,
    options: tuple[str, ...],
    env: Mapping[str, str],
    prepared: Prepared,
) -> JobHandle:
    """`start_step`; where it is interrupted while a job of this computer starts, that job is ended."""
    try:
        return start_step(run, machine, verb, job_name, options=options, env=env, prepared=prepared)
    except Exception:
        # it did not start: no job is there to end
        raise
    except BaseException:
        if machine.provider == HERE:
            with undisturbed(), contextlib.suppress(OutliersError):
                begun = jobs.newest(Path(machine.workspace), job_name)
                if begun is not None and jobs.status(begun.folder) == "running":
                    machine.cancel(begun, INTERRUPT_SECONDS)
        raise


def start_step(
    run: StudyRun,
    machine: Machine,
    verb: str,
    job_name: str,
    *,
    options: tuple[str, ...] = (),
    env: Mapping[str, str] = {},
    prepared: Prepared | None = None,
) -> JobHandle:
    """Send the study to the machine and start the job, or find the one that runs. Arguments as `run_step`."""
    prepared = prepared or run.prepared

    def wait() -> None:
        run.check()
        time.sleep(LOCK_SECONDS)

    # the file that is sent has the machine's own paths in it, and one name here for all machines: one at a time
    with locked(run.workspace.root / LOCKS / f"{prepared.study_id}-sent", wait):
        place = send_study(run, machine, prepared)
    if verb == "extract":
        send_model(run, machine)
    argv = (*machine.python, "-m", "outliers", verb, place, "--workspace", machine.workspace, *options)
    known = secrets(machine, prepared) if verb == "extract" else {}
    return machine.start(JobSpec(name=job_name, argv=argv, env={**known, **env}))


def _result(machine: Machine, handle: JobHandle) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "result.json"
        machine.download(f"{handle.folder}/result.json", local, max_bytes=RESULT_BYTES, max_files=1)
        return parse_result(local.read_bytes(), handle.name)
