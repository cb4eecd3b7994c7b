"""What a task's step says, in Prefect's pages: log lines of the task run, and progress artifacts.

A thread of its own sends the progress, so that no server delays the step. Only the last state of each counted thing is
sent, and the pauses after a server's failures get longer.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
import threading
from collections.abc import Iterator
from types import TracebackType
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from outliers.events.event import Level
from outliers.events.stream import Lines
from outliers.untrusted.visible import markdown

ARTIFACT_SECONDS = 2.0
"""Between two updates of an artifact: each is a call to the server."""
PAUSE_SECONDS = (2.0, 60.0)
"""The pause after a failure of the server: the first, then twice as long each time, up to the second."""
CLOSE_SECONDS = 5.0
"""How long the end of a step waits for its last state to be shown, where the server has answered so far."""

_NOT_IN_KEYS = re.compile(r"[^a-z0-9-]+")
_KEY_CHARS = 40

log = logging.getLogger("outliers.progress")


def artifact_key(step: str, ident: str) -> str:
    """The key of a step's artifact, whatever name a machine gives its step: small letters, digits and dashes."""
    return f"{_NOT_IN_KEYS.sub('-', step.lower())[:_KEY_CHARS]}-{ident}".strip("-")


@contextlib.contextmanager
def tried_once() -> Iterator[None]:
    """In the block Prefect's client does not retry: what is only shown must not cost minutes."""
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield


class TaskReporter:
    """A Reporter for the step of a task: lines of the task run's log, and a progress artifact for each thing that the step
    counts (download, extract...), updated now and then. Never blocks.

    Made within the task. As a context manager it waits at the end for the last state to be shown; not where the run is
    cancelled.

    Args:
        title: what is worked on, for a person: the study's title
        ident: the same in the keys of artifacts: the study's id
        artifact_seconds: at least this long between two updates
    """

    def __init__(self, title: str, ident: str, *, artifact_seconds: float = ARTIFACT_SECONDS) -> None:
        self._title, self._ident = title, ident
        self._artifact_seconds = artifact_seconds
        self._lines = Lines(get_run_logger())
        self._artifacts: dict[str, UUID] = {}
        self._pending: dict[str, float] = {}
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._pause = 0.0
        self._warned = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> TaskReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait=error is None or isinstance(error, Exception))

    def log(self, level: Level, message: str) -> None:
        """One line of the task run's log."""
        self._lines.log(level, message)

    def progress(self, step: str, done: int, total: int | None, unit: str) -> None:
        """Note where the step is; returns at once. What has no total is not shown."""
        if not total:
            return
        with self._changed:
            self._pending[step] = min(100.0, 100.0 * done / total)
            self._changed.notify()
        if self._thread is None:
            # the context knows which run an artifact belongs to
            context = contextvars.copy_context()
            self._thread = threading.Thread(target=context.run, args=(self._send,), name="progress", daemon=True)
            self._thread.start()

    def close(self, wait: bool = True) -> None:
        """No more progress comes. Waits for the last state to be shown, but not for a server that does not answer."""
        self._over.set()
        with self._changed:
            self._changed.notify()
        if wait and self._thread is not None and not self._pause:
            self._thread.join(CLOSE_SECONDS)

    def _send(self) -> None:
        """The thread: send what has changed, at most every `artifact_seconds`, until the end is shown."""
        while True:
            with self._changed:
                while not self._pending and not self._over.is_set():
                    self._changed.wait()
                changed, self._pending = self._pending, {}
            if not changed:
                return
            with tried_once():
                self._show_all(changed)
            if self._over.is_set() and self._pause:
                return  # the step has ended, and the server does not answer
            self._over.wait(max(self._artifact_seconds, self._pause))

    def _show_all(self, changed: dict[str, float]) -> None:
        for step, percent in changed.items():
            try:
                self._show(step, percent)
                self._pause = 0.0
            except (PrefectException, httpx.HTTPError, OSError, RuntimeError) as error:
                # what came meanwhile is newer
                with self._changed:
                    self._pending = {step: percent} | self._pending
                self._pause = min(max(PAUSE_SECONDS[0], 2 * self._pause), PAUSE_SECONDS[1])
                if not self._warned:
                    self._warned = True
                    log.warning("the progress of %s can't be shown, the step itself goes on: %s", step, error)
                return

    def _show(self, step: str, percent: float) -> None:
        if step in self._artifacts:
            update_progress_artifact(self._artifacts[step], progress=percent)
            return
        # Prefect shows a description as Markdown
        key, description = artifact_key(step, self._ident), markdown(f"{step} {self._title}")
        made = create_progress_artifact(progress=percent, key=key, description=description)
        if isinstance(made, UUID):
            self._artifacts[step] = made
