"""Progress of a step in Prefect's pages: sent by a thread of its own, so that no server holds the step up.

Only the last state of each thing that is counted is sent, and a server that is away is left alone for longer and longer.
Before it: `watch`, which follows the step. After it: Prefect's server.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
import threading
from collections.abc import Iterator
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from outliers.events.event import Event
from outliers.untrusted.visible import markdown

ARTIFACT_SECONDS = 2.0
"""Progress artifacts are updated at most this often: each is a call to the server."""
PAUSE_SECONDS = (2.0, 60.0)
"""After a failure the server is left alone for the first, then twice as long each time, up to the second."""
CLOSE_SECONDS = 5.0
"""The last state is waited for at the end of a step, where the server has answered so far."""

_NOT_IN_KEYS = re.compile(r"[^a-z0-9-]+")
_KEY_CHARS = 40

log = logging.getLogger("outliers.progress")


def artifact_key(step: str, study_id: str) -> str:
    """The key of a step's artifact, whatever a machine calls its step: small letters, digits and dashes."""
    return f"{_NOT_IN_KEYS.sub('-', step.lower())[:_KEY_CHARS]}-{study_id}".strip("-")


@contextlib.contextmanager
def tried_once() -> Iterator[None]:
    """In the block Prefect's client asks once: what is only shown is worth no minute of retries."""
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield


class Progress:
    """A progress artifact for each thing that a step counts (download, extract...), updated now and then. Never blocks."""

    def __init__(self, study_id: str, title: str) -> None:
        self._study_id, self._title = study_id, title
        self._artifacts: dict[str, UUID] = {}
        self._pending: dict[str, Event] = {}
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._pause = 0.0
        self._warned = False
        self._thread: threading.Thread | None = None

    def show(self, event: Event) -> None:
        """Note where the step is; returns at once."""
        if not event.total:
            return
        with self._changed:
            self._pending[event.step] = event
            self._changed.notify()
        if self._thread is None:
            # the run that an artifact belongs to is known to this context
            context = contextvars.copy_context()
            self._thread = threading.Thread(target=context.run, args=(self._send,), name="progress", daemon=True)
            self._thread.start()

    def close(self, wait: bool = True) -> None:
        """Nothing more comes. Waits for the last state to be shown, not for a server that is away."""
        self._over.set()
        with self._changed:
            self._changed.notify()
        if wait and self._thread is not None and not self._pause:
            self._thread.join(CLOSE_SECONDS)

    def _send(self) -> None:
        """The thread: whatever changed, at most every ARTIFACT_SECONDS, until all is over and said."""
        while True:
            with self._changed:
                while not self._pending and not self._over.is_set():
                    self._changed.wait()
                taken, self._pending = self._pending, {}
            if not taken:
                return
            with tried_once():
                self._tell_all(taken)
            if self._over.is_set() and self._pause:
                return  # the step has ended, and nobody answers
            self._over.wait(max(ARTIFACT_SECONDS, self._pause))

    def _tell_all(self, taken: dict[str, Event]) -> None:
        for event in taken.values():
            try:
                self._tell(event, min(100.0, 100.0 * event.done / (event.total or 1)))
                self._pause = 0.0
            except (PrefectException, httpx.HTTPError, OSError, RuntimeError) as error:
                # what came meanwhile is newer
                with self._changed:
                    self._pending = {event.step: event} | self._pending
                self._pause = min(max(PAUSE_SECONDS[0], 2 * self._pause), PAUSE_SECONDS[1])
                if not self._warned:
                    self._warned = True
                    log.warning("the progress of %s can't be shown, the step itself goes on: %s", event.step, error)
                return

    def _tell(self, event: Event, share: float) -> None:
        if event.step in self._artifacts:
            update_progress_artifact(self._artifacts[event.step], progress=share)
            return
        # Prefect shows a description as Markdown
        key, description = artifact_key(event.step, self._study_id), markdown(f"{event.step} {self._title}")
        made = create_progress_artifact(progress=share, key=key, description=description)
        if isinstance(made, UUID):
            self._artifacts[event.step] = made
