"""The lease of a machine, on that machine: who holds it and until when, and the watchdog that ends what nobody renews.

    <workspace>/lease.json       {"holders": {id: {"title", "until"}}, "remove_files"}; times of this machine's clock
    <workspace>/lease.lock       held by who changes it
    <workspace>/watchdog.lock    held by the watchdog while it lives

`python -m outliers.lease WORKSPACE` is the watchdog: detached, started by `hold`, gone with the last holder. It ends the
jobs of its workspace, and removes their files if that was asked, with the weights that nobody else there needs. Whatever
happens to who rented the machine, its processes end; a rented machine itself is ended by its provider's own timer. Of a
study it knows which model it names. Before it: `agent`, which is asked over ssh. After it: `jobs`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliers import jobs
from outliers.errors import JobFailed, MachineLost

POLL_VARIABLE = "OUTLIERS_WATCHDOG_SECONDS"
_POLL_SECONDS = 5.0
_CANCEL_SECONDS = 10.0
REMOVED = ("captures", "corpora", "jobs", "models", "results", "studies")
"""What of a workspace is removed where that was asked: all that a study makes."""
MACHINES, UPLOADS, HUB = "machines", "uploads", "hub"
"""Below the folder that machines share on a host: their workspaces, models that were sent, models of the hub."""


@dataclass(frozen=True, slots=True)
class Lease:
    """`until`: the last holder's, in unix seconds of this machine; 0 where nobody holds it."""

    holders: dict[str, dict[str, Any]]
    until: float
    remove_files: bool

    def left(self) -> float:
        """Seconds until it ends; 0 where it has."""
        return max(0.0, self.until - time.time())


def read(workspace: Path) -> Lease:
    """The lease as it is; one of nobody where there is none."""
    record = jobs.read_json(workspace / "lease.json") or {}
    holders = record.get("holders", {})
    until = max((float(one["until"]) for one in holders.values()), default=0.0)
    return Lease(holders, until, bool(record.get("remove_files")))


def hold(workspace: Path, holder: str, title: str, seconds: float, remove_files: bool | None = None) -> Lease:
    """`holder` needs the machine for `seconds` from now on; sees to it that the watchdog runs.

    `remove_files`: whether files go with the lease; None leaves that as it is.
    """
    with _changing(workspace):
        known = read(workspace)
        # who is over is dropped here, so that a machine that is held for days keeps no list of the past
        holders = {key: one for key, one in known.holders.items() if one["until"] > time.time()}
        holders[holder] = {"title": title, "until": time.time() + seconds}
        _write(workspace, holders, known.remove_files if remove_files is None else remove_files)
        _start_watchdog(workspace)
    return read(workspace)


@contextlib.contextmanager
def held(workspace: Path) -> Iterator[None]:
    """The lease does not end while the block lasts. MachineLost where it has: what is started then, no watchdog would end."""
    with _changing(workspace):
        if not read(workspace).left():
            raise MachineLost(
                "nobody holds the machine any more: its lease is over, or it was released; run the study again"
            )
        yield


def leave(workspace: Path, holder: str, keep_seconds: float = 0.0) -> Lease:
    """`holder` is over; with `keep_seconds` it keeps the machine for so long. The last one's jobs are ended at once."""
    with _changing(workspace):
        known = read(workspace)
        holders = {key: one for key, one in known.holders.items() if one["until"] > time.time()}
        mine = holders.pop(holder, {"title": ""})
        if keep_seconds > 0:
            holders[holder] = {"title": mine["title"], "until": time.time() + keep_seconds}
        _write(workspace, holders, known.remove_files)
        if not holders:
            end(workspace, known.remove_files)
        elif keep_seconds > 0:
            _start_watchdog(workspace)
    return read(workspace)


def release(workspace: Path) -> Lease:
    """Nobody holds it any longer, whoever did: jobs are ended, and files removed where that was asked."""
    with _changing(workspace):
        known = read(workspace)
        _write(workspace, {}, known.remove_files)
        end(workspace, known.remove_files)
    return read(workspace)


def end(workspace: Path, remove_files: bool) -> None:
    """End every job of the workspace, and remove what they made if asked. JobFailed where one outlives it: after all others."""
    failed: JobFailed | None = None
    for handle in jobs.running(workspace):
        try:
            jobs.cancel(handle.folder, _CANCEL_SECONDS, jobs.LEASE_ENDED)
        except JobFailed as error:
            failed = error
    if failed is not None:
        raise failed
    if remove_files:
        weights = _weights(workspace) - _weights_of_others(workspace)
        for place in (*(workspace / name for name in REMOVED), *weights):
            shutil.rmtree(place, ignore_errors=True)


def _weights(workspace: Path) -> set[Path]:
    """The folders beside the workspaces of a host in which the models of a workspace's studies may be."""
    if workspace.parent.name != MACHINES:
        return set()
    shared, found = workspace.parent.parent, set()
    for path in (workspace / "studies").glob("*.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # none of ours; the watchdog has more to do
            source = (jobs.read_json(path) or {})["model"]["source"]
            if source["kind"] == "hub":
                found.add(shared / HUB / f"models--{source['path'].replace('/', '--')}")
            elif source["path"].startswith(f"{shared / UPLOADS}/"):
                found.add(shared / UPLOADS / Path(source["path"]).relative_to(shared / UPLOADS).parts[0])
    return found


def _weights_of_others(workspace: Path) -> set[Path]:
    """Those of the workspaces beside this one that somebody holds. A study is there before its model, so none is missed."""
    others = (place for place in workspace.parent.iterdir() if place != workspace and place.is_dir())
    return {folder for place in others if read(place).left() for folder in _weights(place)}


def watch(workspace: Path) -> None:
    """The watchdog: returns when the lease has ended and what it ends has ended. At most one of a workspace does anything."""
    seconds = float(os.environ.get(POLL_VARIABLE) or _POLL_SECONDS)
    with (workspace / "watchdog.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        while workspace.is_dir():  # who removes it has ended all that was in it
            with _changing(workspace):
                lease = read(workspace)
                # under the lock: who holds again now waits, and then starts another watchdog
                if lease.until <= time.time() and _ended(workspace, lease.remove_files):
                    _write(workspace, {}, lease.remove_files)
                    fcntl.flock(lock, fcntl.LOCK_UN)
                    return
            time.sleep(min(seconds, lease.left()) or seconds)


def _ended(workspace: Path, remove_files: bool) -> bool:
    """Whether all of it has ended; what is stuck in the kernel is tried again."""
    try:
        end(workspace, remove_files)
    except JobFailed:
        return False
    return True


def _start_watchdog(workspace: Path) -> None:
    with (workspace / "watchdog.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    null = subprocess.DEVNULL
    argv = [sys.executable, "-P", "-m", "outliers.lease", str(workspace)]
    subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")
    # the caller holds lease.lock, so the watchdog reads the lease only once it is written


def _write(workspace: Path, holders: dict[str, dict[str, Any]], remove_files: bool) -> None:
    try:
        jobs.write_json(workspace / "lease.json", {"holders": holders, "remove_files": remove_files})
    except OSError:
        if holders:
            raise
        # a full disk must not keep a machine held: no file says the same
        (workspace / "lease.json").unlink(missing_ok=True)


@contextlib.contextmanager
def _changing(workspace: Path) -> Iterator[None]:
    workspace.mkdir(parents=True, exist_ok=True)
    with (workspace / "lease.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
