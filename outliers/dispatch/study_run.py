"""One run of a study in this process: its reporter, its listeners, its cancellation, and what its steps share.

A `StudyRun` is made where a run begins and is handed to everything that works for it. Nothing of it is global: two runs in
one process neither hear nor cancel each other. It is a plain class on purpose: Prefect walks through dataclasses and models
among the parameters of a task, and leaves other objects alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from outliers.errors import OutliersError
from outliers.events.event import Event
from outliers.events.stream import Reporter
from outliers.jobs.jobs import JobHandle
from outliers.machines.base import Machine
from outliers.spec import DEFAULT_PROVIDER
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

END_SECONDS = 0.5
"""How long a job on this computer has to end when the process itself is about to end."""

Listener = Callable[[str, Event], None]
"""Called with (step, event), in the thread that follows the step."""
Guard = Callable[[], None]
"""Raises where the step of the calling thread must end."""


class StudyCancelled(BaseException):
    """The run of this study was cancelled. Not an Exception: nothing may take it for a failure of the step."""


class StudyRun:
    """The state of one run of a study.

    Args:
        prepared: the study
        workspace: where its results, captures and records are on this computer
        holder: names this run to the providers of machines; a retry of the run has the same name
        reporter: where the run says what it does, outside of its steps
    """

    def __init__(self, prepared: Prepared, workspace: Workspace, holder: str, reporter: Reporter) -> None:
        self.prepared = prepared
        self.workspace = workspace
        self.holder = holder
        self.reporter = reporter
        self._listeners: list[Listener] = []
        self._guards: list[Guard] = []
        self._cancelled = threading.Event()
        self._offsets: dict[tuple[str, JobHandle], int] = {}
        self._sent: set[tuple[str, str, str]] = set()
        self._at_work: dict[JobHandle, Machine] = {}
        self._lock = threading.Lock()
        self._refusals: list[str | None] = []
        self.failed_parts = threading.Event()
        """Set once a shard of the run has failed: those that wait for it end."""
        self.gave_up: set[int] = set()
        """Numbers of the shards that ended because another failed."""

    # Events

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every event of this run's steps from now on."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def heard_by(self, listener: Listener) -> Iterator[None]:
        """Call `listener` with every event of this run's steps while the block lasts."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def emit(self, step: str, event: Event) -> None:
        """Hand an event to all listeners."""
        # a shard may come or go in another thread meanwhile
        for listener in self._listeners.copy():
            listener(step, event)

    # Cancellation

    def cancel(self) -> None:
        """End the run's steps: each raises StudyCancelled at its next event, and takes its job along. May be repeated."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise what ends the step of this thread: StudyCancelled, or what a guard raises (BudgetSpent).

        Called with every event of a step, and by everything that waits.
        """
        if self._cancelled.is_set():
            raise StudyCancelled
        for guard in self._guards.copy():
            guard()

    @contextlib.contextmanager
    def guarded_by(self, guard: Guard) -> Iterator[None]:
        """Call `guard` with every `check` while the block lasts, in whatever thread of the run."""
        self._guards.append(guard)
        try:
            yield
        finally:
            self._guards.remove(guard)

    # Jobs

    def offset(self, machine: Machine, handle: JobHandle) -> int:
        """How far the events of a job were followed, in bytes: a retry goes on there, so no line is shown twice."""
        return self._offsets.get((machine.instance_id, handle), 0)

    def note_offset(self, machine: Machine, handle: JobHandle, offset: int) -> None:
        """Remember that the events of a job were followed up to byte `offset`."""
        self._offsets[machine.instance_id, handle] = offset

    def forget_job(self, machine: Machine, handle: JobHandle) -> None:
        """Forget a job that is lost: another one may begin under its name, with another stream of events."""
        self._offsets.pop((machine.instance_id, handle), None)

    @contextlib.contextmanager
    def following(self, machine: Machine, handle: JobHandle) -> Iterator[None]:
        """In the block this process follows the job, which must not outlive the process."""
        self._at_work[handle] = machine
        try:
            yield
        finally:
            self._at_work.pop(handle, None)

    def end_local_jobs(self) -> None:
        """End the jobs on this computer that the run still follows. For the end of the process; raises no OutliersError."""
        for handle, machine in list(self._at_work.items()):
            if machine.provider == DEFAULT_PROVIDER:
                with contextlib.suppress(OutliersError):
                    machine.cancel(handle, END_SECONDS)

    # Files on machines

    def was_sent(self, machine: Machine, what: str) -> bool:
        """Whether this run has sent `what` to the machine's present disk."""
        return (machine.name, machine.instance_id, what) in self._sent

    def note_sent(self, machine: Machine, what: str) -> None:
        """Remember that `what` is on the machine's present disk."""
        self._sent.add((machine.name, machine.instance_id, what))

    def forget_sent(self, machine: Machine) -> None:
        """Send everything to a machine again: a lease that ended may have removed its files."""
        lost = (machine.name, machine.instance_id)
        self._sent.difference_update({mark for mark in self._sent if mark[:2] == lost})

    # Shards

    def refusal(self, decide: Callable[[], str | None]) -> str | None:
        """Why the shards of this run don't fit on this computer together, or None.

        The shard that asks first decides for all: what the others then find free is less by what it took.
        """
        with self._lock:
            if not self._refusals:
                self._refusals.append(decide())
            return self._refusals[0]
