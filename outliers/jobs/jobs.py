"""A detached job: a command that outlives the process that started it, and can be found, followed and cancelled later.

    <workspace>/jobs/<name>/lock             held while an attempt is being started
    <workspace>/jobs/<name>/<attempt>/       0001, 0002, ...; the newest counts
        job.json       what was started: argv, and the names (never the values) of its extra environment
        lock           an flock that the supervisor and its child share: free exactly when both have ended
        started.json   pgid and child: the supervisor runs the command
        events.jsonl   the stream (see `events`): what the command printed, what it reported, heartbeats
        error.json     the OutliersError that the command recorded before it ended, if any
        cancel.json    a request to end the job
        reserve        room for the last records on a full disk; removed at the end of the job or, if its supervisor was
                       killed, when the job is found dead or another one starts
        exit.json      how it ended; missing after a power cut or a SIGKILL of the supervisor

`python -m outliers.jobs.supervisor FOLDER LOCK_FD` is the supervisor. It leads a session of its own and runs the command as
its child in the same process group. Whether a job lives is read from its lock and not from a process id: ids are reused, and
an flock ends with its holders, however they end. The workspace must therefore be on a disk of this machine; NFS has other
rules for an flock.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from outliers.errors import BadInput, JobCancelled, JobFailed, MachineLost, OutliersError, from_record
from outliers.events import stream as events
from outliers.events.event import Event
from outliers.files.records import read_json, write_json
from outliers.hardware import total_ram_bytes
from outliers.jobs.leftovers import DRAFT, RESERVE, tidy, tidy_all
from outliers.locks import acquire, held, is_locked
from outliers.untrusted.bounds import LARGEST

Status = Literal["running", "done", "failed", "cancelled", "lost"]

JOB_VARIABLE = "OUTLIERS_JOB"
"""Environment variable with the folder of the job that a command runs in."""
HEARTBEAT_VARIABLE = "OUTLIERS_HEARTBEAT_SECONDS"
LEASE_ENDED = "lease"
"""Reason of a cancel: the lease of the machine has ended."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ATTEMPT = re.compile(r"[0-9]{4,9}")
_START_SECONDS = 60.0
KILL_SECONDS = 10.0
_LAST_LINES = 15
_RESERVE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What to run. `env` is added to the environment and may hold secrets: it is neither written nor shown."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class JobHandle:
    """One attempt at a job. It holds only names, so it can be kept, sent and made again."""

    name: str
    attempt: int
    folder: Path


def start(workspace: Path, job: JobSpec) -> JobHandle:
    """Start `job` in `<workspace>/jobs`, detached, and return once it runs; or return the handle of the one that still runs.

    Any number of callers at once start one job. Raises BadInput for an invalid name or command, MachineLost if the
    supervisor did not start.
    """
    if not _NAME.fullmatch(job.name):
        raise BadInput(f"'{job.name}' is not a valid job name; give up to 128 letters, digits, . _ -")
    if not job.argv or any("\0" in part for part in job.argv):
        raise BadInput(f"job '{job.name}' has no command that can be run: {list(job.argv)}")
    home = (workspace / "jobs" / job.name).absolute()
    home.mkdir(parents=True, exist_ok=True)
    tidy_all(workspace)
    with held(home / "lock"):
        last = newest(workspace, job.name)
        if last and status(last.folder) == "running":
            if not (last.folder / "cancel.json").exists():
                return last
            # A start after a cancel asks for another attempt, not for the one that is ending.
            cancel(last.folder)
        folder, lock = _new_attempt(home, job, last.attempt + 1 if last else 1)
        try:
            supervisor = _spawn_supervisor(folder, lock, job)
        finally:
            os.close(lock)
        _await_start(folder, supervisor)
    return JobHandle(job.name, int(folder.name), folder)


def newest(workspace: Path, name: str) -> JobHandle | None:
    """The latest attempt at the job of that name, in any state; None if there was none."""
    home = (workspace / "jobs" / name).absolute()
    attempts = [int(path.name) for path in home.glob("[0-9]*") if _ATTEMPT.fullmatch(path.name)]
    return JobHandle(name, max(attempts), home / f"{max(attempts):04d}") if attempts else None


def running(workspace: Path) -> tuple[JobHandle, ...]:
    """Every job of a workspace that is running."""
    names = sorted(path.name for path in (workspace / "jobs").glob("*") if _NAME.fullmatch(path.name))
    latest = [handle for name in names if (handle := newest(workspace, name)) is not None]
    return tuple(handle for handle in latest if _runs(handle.folder))


def _runs(folder: Path) -> bool:
    """Whether a job runs. If its records can't be read, it counts as running: whatever ends all jobs must not leave it out."""
    try:
        return _held(folder) and read_json(folder / "exit.json") is None
    except OSError:
        return True


def _new_attempt(home: Path, job: JobSpec, attempt: int) -> tuple[Path, int]:
    """The folder of a new attempt and its held lock. Under its name the folder always has a job.json and a held lock."""
    draft, folder = home / DRAFT, home / f"{attempt:04d}"
    # Left by a starter that was killed; the lock on the name excludes another one.
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    record = {"name": job.name, "attempt": attempt, "argv": job.argv, "env": sorted(job.env), "created": time.time()}
    write_json(draft / "job.json", record)
    # not zeros: some file systems allocate no space for them
    (draft / RESERVE).write_bytes(os.urandom(_RESERVE_BYTES))
    lock = acquire(draft / "lock")
    draft.rename(folder)
    return folder, lock


def _spawn_supervisor(folder: Path, lock: int, job: JobSpec) -> subprocess.Popen[bytes]:
    # -P: a json.py in the current directory must not be imported as a module.
    argv = [sys.executable, "-P", "-m", "outliers.jobs.supervisor", str(folder), str(lock)]
    null = subprocess.DEVNULL
    try:
        supervisor = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True, pass_fds=(lock,)
        )
    except OSError as error:
        raise MachineLost(f"job '{job.name}' can't be started: {error}") from error
    if supervisor.stdin:
        # A broken pipe means that the supervisor died at once; _await_start reports it.
        with contextlib.suppress(BrokenPipeError), supervisor.stdin as pipe:
            pipe.write(json.dumps(dict(job.env)).encode())
    # Reap it: a starter that lives on would keep it as a zombie.
    threading.Thread(target=supervisor.wait, name=f"reap-{job.name}", daemon=True).start()
    return supervisor


def _await_start(folder: Path, supervisor: subprocess.Popen[bytes]) -> None:
    def reported() -> bool:
        return (folder / "started.json").exists() or (folder / "exit.json").exists()

    _until(lambda: reported() or not _held(folder), _START_SECONDS)
    if not reported():
        what = f"is stuck in process {supervisor.pid}" if _held(folder) else "ended before it began"
        raise MachineLost(f"the job in {folder} {what}: is the disk full? does {sys.executable} have outliers?")


def status(folder: Path) -> Status:
    """State of the job in `folder`; lost: it ended without a record of how. Raises BadInput if there is no job."""
    exit_record = read_json(folder / "exit.json")
    if exit_record is None:
        if _held(folder):
            return "running"
        # It may have ended since the first read.
        exit_record = read_json(folder / "exit.json")
    if exit_record is None:
        if not (folder / "job.json").exists():
            raise BadInput(f"there is no job in {folder}")
        return "cancelled" if (folder / "cancel.json").exists() else "lost"
    if exit_record.get("cancelled"):
        return "cancelled"
    return "done" if exit_record.get("code") == 0 else "failed"


def read_events(folder: Path, offset: int = 0) -> tuple[list[Event], int]:
    """Whole events from byte `offset` of the job's stream, about 1 MiB at most, and the offset to go on from."""
    return events.read(folder / "events.jsonl", offset)


def follow(folder: Path, offset: int = 0, poll_seconds: float = 0.2) -> Iterator[Event]:
    """Each event from byte `offset` on, once and in order, until the job has ended and all is read.

    To continue after an interruption, call it with the last event's `end`.
    """
    while True:
        # Read the state first: everything written before the end is then in the stream.
        ended = status(folder) != "running"
        while True:
            found, offset = read_events(folder, offset)
            if not found:
                break
            yield from found
        if ended:
            return
        time.sleep(poll_seconds)


def wait(folder: Path, timeout_seconds: float | None = None) -> Status:
    """The status once the job has ended, or "running" after `timeout_seconds`."""
    seconds = float("inf") if timeout_seconds is None else timeout_seconds
    _until(lambda: status(folder) != "running", seconds, poll_seconds=0.1)
    return status(folder)


def result(folder: Path) -> None:
    """Wait for the end of the job; return if it succeeded.

    Raises the OutliersError that the command recorded; JobFailed, with the end of its log, if it recorded none;
    JobCancelled if another run ended it; MachineLost if it vanished.
    """
    how, name = wait(folder), f"job '{folder.parent.name}' (attempt {folder.name})"
    if how == "done":
        return
    if how == "lost":
        tidy(folder)
        raise MachineLost(f"{name} vanished: its machine was stopped, or its supervisor killed; start it again")
    if how == "cancelled":
        if (read_json(folder / "cancel.json") or {}).get("reason") == LEASE_ENDED:
            raise MachineLost(f"{name} was ended because the lease of its machine was not renewed; start it again")
        raise JobCancelled(f"{name} was cancelled by another run that shared it, or by hand; started again, it goes on")
    record = read_json(folder / "exit.json") or {}
    if isinstance(error := record.get("error"), dict):
        raise from_record(str(error.get("kind")), str(error.get("message")))
    raise JobFailed(f"{name} {_describe(record)}{_last_lines(folder)}")


def _describe(record: Mapping[str, Any]) -> str:
    number = _whole(record.get("signal"))
    if number == signal.SIGKILL:
        ram_gb = (_whole(record.get("ram_bytes")) or total_ram_bytes()) / 1e9
        return f"was killed (signal 9), most likely because memory ran out: this machine has {ram_gb:.1f} GB of RAM"
    if number is not None and 0 < number < signal.NSIG:
        return f"was ended by signal {number} ({signal.strsignal(number) or 'unknown'}), not by a cancel"
    return f"failed with exit code {_whole(record.get('code'))}"


def _whole(value: object) -> int | None:
    """A whole number of a record, 0 or more; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST else None


def _last_lines(folder: Path) -> str:
    lines = [event.message for event in events.read_tail(folder / "events.jsonl") if event.kind == "log"]
    return "\nThe last lines of its log:\n  " + "\n  ".join(lines[-_LAST_LINES:]) if lines else "; it printed nothing"


def record_error(error: OutliersError) -> None:
    """Record the error with which a step exits, for `result`; does nothing outside a job."""
    if folder := os.environ.get(JOB_VARIABLE):
        _write_last(Path(folder), "error.json", {"kind": type(error).__name__, "message": str(error)})


def cancel(folder: Path, grace_seconds: float = 10.0, reason: str = "") -> Status:
    """End the job and all its processes: SIGTERM, after `grace_seconds` SIGKILL; return when they are gone.

    `reason`: LEASE_ENDED turns its result into a transient error. A job that has ended is not changed. No signal is sent
    once the lock is free, because the number of the process group may then belong to other processes. Raises JobFailed
    if the job can't be ended.
    """
    if _held(folder) and not (folder / "exit.json").exists():
        # On a full disk the job still ends, and then looks killed.
        with contextlib.suppress(OSError):
            _write_last(folder, "cancel.json", {"requested": time.time(), "reason": reason})
    # The number of the group is written a moment after the lock is taken.
    _until(lambda: not _held(folder) or (folder / "started.json").exists(), _START_SECONDS)
    pgid = group_of(folder)
    for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, KILL_SECONDS)):
        if not _held(folder):
            break
        if pgid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pgid, number)
        _until(lambda: not _held(folder), seconds)
    if _held(folder):
        raise JobFailed(f"the job in {folder} can't be ended: process group {pgid} outlives SIGKILL")
    if (folder / "cancel.json").exists() and not (folder / "exit.json").exists():
        with contextlib.suppress(OSError):
            write_exit(folder, None, signal.SIGKILL, None)
    tidy(folder)
    return status(folder)


def group_of(folder: Path) -> int | None:
    """The process group of a running job, from its record, else from its processes; None if neither is found."""
    pgid = (read_json(folder / "started.json") or {}).get("pgid")
    # Other numbers (0 and 1 mean other processes) were not written by a supervisor.
    if isinstance(pgid, int) and not isinstance(pgid, bool) and 1 < pgid < 1 << 22:
        return pgid
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(JOB_VARIABLE) == str(folder) and os.getpgid(process.pid) != os.getpgrp():
                return os.getpgid(process.pid)
    return None


def write_exit(folder: Path, code: int | None, number: int | None, error: Mapping[str, Any] | None) -> None:
    """Write how a job ended: exit code or signal, and the error that it recorded."""
    cancelled = (folder / "cancel.json").exists()
    record = {"code": code, "signal": number, "error": error, "cancelled": cancelled, "ended": time.time()}
    _write_last(folder, "exit.json", {**record, "ram_bytes": total_ram_bytes()})
    (folder / RESERVE).unlink(missing_ok=True)


def _write_last(folder: Path, name: str, value: Any) -> None:
    """`write_json` of how a job ended; on a full disk, in the room that was kept for it."""
    try:
        write_json(folder / name, value)
    except OSError:
        (folder / RESERVE).unlink(missing_ok=True)
        write_json(folder / name, value)


def _until(condition: Callable[[], bool], seconds: float, poll_seconds: float = 0.02) -> bool:
    """Wait for `condition`, at most `seconds`; return whether it became true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(poll_seconds)
    return True


def _held(folder: Path) -> bool:
    """Whether a process holds the job's lock."""
    return is_locked(folder / "lock")
