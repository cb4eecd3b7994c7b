"""What a command adds to a flow that it runs in its own process: progress bars, and what to do before the process ends.

Prefect passes nothing to the body of a flow but its parameters, and stores these. So an observer is a context variable:
Prefect calls the body in the context of its caller, where the body reads the variable once, at its beginning, and hands on
what it got. No other flow of the process sees it, and no task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from outliers.dispatch.study_run import StudyRun
from outliers.sweep.outcome import Ended
from outliers.sweep.sweep import SweepStudy

T = TypeVar("T")


def _ignore_run(run: StudyRun) -> None:
    """No observer."""


def _ignore_study(study: SweepStudy, end: Ended | None) -> None:
    """No observer."""


on_study: ContextVar[Callable[[StudyRun], None]] = ContextVar("on_study", default=_ignore_run)
"""Called by the flow `study` with its run, before anything of it begins."""

on_sweep: ContextVar[Callable[[SweepStudy, Ended | None], None]] = ContextVar("on_sweep", default=_ignore_study)
"""Called by the flow `sweep` when a study starts (None) and when it ends."""


@contextlib.contextmanager
def observed(variable: ContextVar[T], observer: T) -> Iterator[None]:
    """Observe the flow that is called in the block, in this thread."""
    token = variable.set(observer)
    try:
        yield
    finally:
        variable.reset(token)
