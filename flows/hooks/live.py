"""What the hooks keep of the flow runs of this process, from one hook to the next.

Prefect calls a hook with (flow, flow run, state) and nothing else, so what one hook leaves for another is found by the id of
the flow run. Each entry belongs to one run and is removed at its end: two runs in one process don't share anything.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from uuid import UUID


@dataclass
class LiveRun:
    """A flow run whose hook on_running was called in this process."""

    lock_file: int | None = None
    """Descriptor of the open file that holds the run's lock; closing it gives the lock up. None where there is no lock: a hook
    that fails does not end its run."""
    over: threading.Event = field(default_factory=threading.Event)
    """Set at the end of the run."""
    ended_by_us: bool = False
    """The process ends because its run is being cancelled: what then looks like a crash is a cancel."""


_RUNS: dict[UUID, LiveRun] = {}


def begin(run: UUID, lock_file: int | None = None) -> LiveRun:
    """A run begins, or begins again: nothing is left of an earlier attempt."""
    _RUNS[run] = LiveRun(lock_file)
    return _RUNS[run]


def known(run: UUID) -> LiveRun | None:
    """What is kept of a run; None for a run of another process: the worker calls the hooks of a run that it has ended."""
    return _RUNS.get(run)


def forget(run: UUID) -> None:
    """The run has ended."""
    _RUNS.pop(run, None)
