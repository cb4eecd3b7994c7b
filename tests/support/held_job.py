"""A job that is held in its middle until its end is asked for: what a cancel does must not depend on its speed."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from outliers.files.records import read_json
from outliers.jobs import jobs

LIMIT = 120.0


def until(condition: Callable[[], Any], what: str, seconds: float = LIMIT, poll_seconds: float = 0.05) -> Any:
    """What `condition` gives, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(poll_seconds)
    return found


def _is_told_to_end(process: psutil.Process) -> bool:
    """Whether SIGTERM waits for a stopped process, or it has ended."""
    try:
        told = re.search(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return True
    return told is None or bool(int(told[1], 16) >> (signal.SIGTERM - 1) & 1)


@contextlib.contextmanager
def held_until_cancelled(root: Path, name: str, journal: Path) -> Iterator[jobs.JobHandle]:
    """The job `name` of the workspace `root`, stopped once its journal has a line.

    In the block its end is asked for; after it the job goes on, and finds that it is cancelled.
    """
    until(lambda: journal.exists() and journal.stat().st_size, "a journaled sequence", poll_seconds=0.002)
    job = jobs.newest(root, name)
    assert job is not None
    process = psutil.Process((read_json(job.folder / "started.json") or {})["child"])
    process.suspend()
    try:
        yield job
        until(lambda: _is_told_to_end(process), f"a cancel of {name}", poll_seconds=0.002)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
    assert jobs.wait(job.folder, 30) == "cancelled"
