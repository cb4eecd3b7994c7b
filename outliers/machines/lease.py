"""The lease of a machine, on that machine: its holders, until when, and the watchdog that ends its jobs after that.

    <workspace>/lease.json       {"holders": {id: {"title", "until", "seconds", "boot", "since"}}, "remove_files"}
    <workspace>/lease.lock       held during a change
    <workspace>/watchdog.lock    held by the watchdog while it lives

`python -m outliers.machines.lease WORKSPACE` is the watchdog: detached, started by `hold`, it
exits after the last holder. It ends the jobs of its workspace, and removes their files if that was asked, with weights that no
other workspace there needs. So the processes end whatever happens to the computer that started them. A rented machine itself is
ended by its provider's own timer.

A lease that can't be read is over: `until` is unix seconds of this machine's clock, `since` seconds of its clock since boot
`boot`, and the shorter of both counts, so a clock that is set back lengthens nothing. Nothing is longer than MAX_SECONDS.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliers import locks
from outliers.errors import BadInput, JobFailed, MachineLost
from outliers.files.private import make_private
from outliers.files.records import read_json, write_json
from outliers.hub.files import cache_folder_name
from outliers.jobs import jobs

MAX_SECONDS = 7 * 86_400.0
"""The longest that a study may ask for (`keep_seconds`, `grace_seconds`). What says more was not written by `hold`."""
SLACK_SECONDS = 60.0
"""A time server sets the clock now and then: a lease that is longer by no more than this was the longest one."""
CONFIRM_SECONDS = 1.0
"""A lease that can't be read is read again after this long before anything ends."""
POLL_VARIABLE = "OUTLIERS_WATCHDOG_SECONDS"
_POLL_SECONDS = 5.0
CANCEL_SECONDS = 10.0
"""From SIGTERM to SIGKILL, for a job whose lease is over."""
REMOVED = ("captures", "corpora", "jobs", "models", "results", "studies")
"""What of a workspace is removed where that was asked: all that a study makes."""
MACHINES, UPLOADS, HUB = "machines", "uploads", "hub"
"""Below the folder that machines share on a host: their workspaces, models that were sent, models of the hub."""


@dataclass(frozen=True, slots=True)
class Lease:
    """`until`: the last holder's, in unix seconds of this machine; 0 without holders. `readable`: whether the file was
    what `hold` writes; otherwise there are no holders."""

    holders: dict[str, dict[str, Any]]
    until: float
    remove_files: bool
    readable: bool = True

    def left(self) -> float:
        """Seconds until it ends; 0 where it has."""
        return max(0.0, self.until - time.time())


def read(workspace: Path) -> Lease:
    """The lease; one without holders where the file is missing or can't be read. Raises nothing."""
    path = workspace / "lease.json"
    try:
        record = read_json(path)
        readable = record is not None or not path.exists()
    except OSError:
        record, readable = None, False
    given = (record or {}).get("holders", {})
    if not isinstance(given, dict):
        given, readable = {}, False
    now, holders = time.time(), {}
    for key, entry in given.items():
        left = _left(entry, now)
        if left is None:
            readable = False
        else:
            # what the clock since boot leaves of it is what everybody sees
            holders[key] = {**entry, "title": str(entry.get("title", "")), "until": now + left}
    until = max((float(one["until"]) for one in holders.values()), default=0.0)
    return Lease(holders, until, (record or {}).get("remove_files") is True, readable)


def _left(entry: object, now: float) -> float | None:
    """Seconds that are left to a holder, negative where it is over; None where that can't be said: then it holds nothing."""
    if not isinstance(entry, dict):
        return None
    until = _number(entry.get("until"))
    if until is None or until - now > MAX_SECONDS + SLACK_SECONDS:
        return None
    left = until - now
    if not entry.keys() & {"seconds", "boot", "since"}:
        return left  # of a version that knew one clock
    seconds, since = _number(entry.get("seconds")), _number(entry.get("since"))
    if seconds is None or since is None or seconds > MAX_SECONDS:
        return None
    clock = _clock()
    if entry.get("boot") == _boot() and clock >= since:
        left = min(left, since + seconds - clock)
    return min(left, seconds)


def _number(value: object) -> float | None:
    """A finite number that is not negative; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) and found >= 0 else None


def _clock() -> float:
    """Seconds since this machine was switched on, those in which it was asleep included where the system counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _boot() -> str:
    """The identity of this boot of the machine; "" where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _entry(title: str, seconds: float) -> dict[str, Any]:
    """A holder from now on, for at most MAX_SECONDS. BadInput where `seconds` is not a number of seconds."""
    asked = _number(seconds) if seconds != math.inf else MAX_SECONDS
    if asked is None:
        raise BadInput(f"a lease of {seconds!r:.40} seconds can't be: 0 to {MAX_SECONDS:,.0f}")
    asked = min(asked, MAX_SECONDS)
    return {"title": title, "until": time.time() + asked, "seconds": asked, "boot": _boot(), "since": _clock()}


def start_watchdog(workspace: Path) -> None:
    """Start the watchdog of a workspace, detached, unless one runs. The caller holds the lease's lock."""
    with (workspace / "watchdog.lock").open("ab") as lock:
        if not locks.try_lock(lock):
            return
    null = subprocess.DEVNULL
    argv = [sys.executable, "-P", "-m", "outliers.machines.lease", str(workspace)]
    subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")
    # the watchdog waits for the caller's lock, so it reads the lease only once it is written


def hold(
    workspace: Path,
    holder: str,
    title: str,
    seconds: float,
    remove_files: bool | None = None,
    *,
    watchdog: Callable[[Path], None] = start_watchdog,
) -> Lease:
    """`holder` needs the machine for `seconds` from now on, at most MAX_SECONDS.

    `remove_files`: whether files go with the lease; None leaves that as it is. `watchdog` sees to it that one runs. Raises
    BadInput where `seconds` is not a number of seconds.
    """
    with _changing(workspace):
        known = read(workspace)
        # holders whose time is over are dropped, so that the file of a machine that is held for days does not grow
        holders = {key: one for key, one in known.holders.items() if one["until"] > time.time()}
        holders[holder] = _entry(title, seconds)
        _write(workspace, holders, known.remove_files if remove_files is None else remove_files)
        watchdog(workspace)
    return read(workspace)


@contextlib.contextmanager
def held(workspace: Path) -> Iterator[None]:
    """Keep the lease from ending while the block runs. MachineLost where it has ended: no watchdog would end what is started."""
    with _changing(workspace):
        if not read(workspace).left():
            raise MachineLost(
                "nobody holds the machine any more: its lease is over, or it was released; run the study again"
            )
        yield


def leave(
    workspace: Path, holder: str, keep_seconds: float = 0.0, *, watchdog: Callable[[Path], None] = start_watchdog
) -> Lease:
    """`holder` ends, or keeps the machine for `keep_seconds`. Where it was the last one, its jobs are ended at once."""
    with _changing(workspace):
        known = read(workspace)
        holders = {key: one for key, one in known.holders.items() if one["until"] > time.time()}
        mine = holders.pop(holder, {"title": ""})
        if keep_seconds > 0:
            holders[holder] = _entry(mine["title"], keep_seconds)
        _write(workspace, holders, known.remove_files)
        if not holders:
            end(workspace, known.remove_files)
        elif keep_seconds > 0:
            watchdog(workspace)
    return read(workspace)


def release(workspace: Path) -> Lease:
    """End the lease of all holders: jobs are ended, and files removed where that was asked."""
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
            jobs.cancel(handle.folder, CANCEL_SECONDS, jobs.LEASE_ENDED)
        except JobFailed as error:
            failed = error
        except OSError as error:
            failed = JobFailed(f"the job in {handle.folder} can't be ended: {error}")
    if failed is not None:
        raise failed
    if remove_files:
        weights = _weights(workspace) - _weights_of_others(workspace)
        for place in (*(workspace / name for name in REMOVED), *weights):
            shutil.rmtree(place, ignore_errors=True)


def _weights(workspace: Path) -> set[Path]:
    """The folders of a host, outside its workspaces, that may hold the models of a workspace's studies."""
    if workspace.parent.name != MACHINES:
        return set()
    shared, found = workspace.parent.parent, set()
    for path in (workspace / "studies").glob("*.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # not a study's file: the watchdog goes on
            source = (read_json(path) or {})["model"]["source"]
            if source["kind"] == "hub":
                found.add(shared / HUB / cache_folder_name(source["path"]))
            elif source["path"].startswith(f"{shared / UPLOADS}/"):
                found.add(shared / UPLOADS / Path(source["path"]).relative_to(shared / UPLOADS).parts[0])
    return found


def _weights_of_others(workspace: Path) -> set[Path]:
    """Those of the other workspaces that are held. A study is written before its model, so none is missed."""
    others = (place for place in workspace.parent.iterdir() if place != workspace and place.is_dir())
    return {folder for place in others if read(place).left() for folder in _weights(place)}


def watch(workspace: Path) -> None:
    """The watchdog: returns when the lease has ended and what it ends has ended. At most one of a workspace does anything."""
    seconds = float(os.environ.get(POLL_VARIABLE) or _POLL_SECONDS)
    with (workspace / "watchdog.lock").open("ab") as lock:
        if not locks.try_lock(lock):
            return
        doubted = False
        while workspace.is_dir():  # whatever removes it has ended its jobs before
            try:
                with _changing(workspace):
                    lease = read(workspace)
                    # under the lock: a `hold` at this moment waits, and then starts another watchdog
                    sure = lease.readable or doubted
                    if sure and lease.until <= time.time() and _ended(workspace, lease.remove_files):
                        _write(workspace, {}, lease.remove_files)
                        locks.unlock(lock)
                        return
            except OSError:
                # neither lock nor lease can be read, on a failing disk for example: no renewal can succeed either
                lease = Lease({}, 0.0, False, readable=False)
                if doubted and _ended(workspace, False):
                    return
            pause = seconds if lease.readable or doubted else CONFIRM_SECONDS
            doubted = not lease.readable
            time.sleep(min(pause, lease.left()) or pause)


def _ended(workspace: Path, remove_files: bool) -> bool:
    """Whether everything has ended; a job that is stuck in the kernel, or can't be read just now, is tried again."""
    try:
        end(workspace, remove_files)
    except (JobFailed, OSError):
        return False
    return True


def _write(workspace: Path, holders: dict[str, dict[str, Any]], remove_files: bool) -> None:
    path = workspace / "lease.json"
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)  # not a lease, and none could be written in its place
        write_json(path, {"holders": holders, "remove_files": remove_files})
    except OSError:
        if holders:
            raise
        # a full disk must not keep a machine held: no file says the same
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _changing(workspace: Path) -> Iterator[None]:
    make_private(workspace)
    with locks.held(workspace / "lease.lock"):
        yield


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
