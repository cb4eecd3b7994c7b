"""A run that is being cancelled ends itself where no worker ends it.

Prefect's process worker (3.8.8) ends the runs that it began itself: not those of a worker that was restarted meanwhile,
and not those that a command runs at a terminal. Such a run would stay Cancelling for five minutes, be called Cancelled by
the server, and go on to its end on a machine that costs money. So each run looks at its own state now and then.
"""

from __future__ import annotations

import contextvars
import logging
import os
import signal
import threading
import time
from typing import Any
from uuid import UUID

import httpx
from prefect import Flow, State
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import PrefectException
from prefect.states import Cancelled

from flows.hooks.live import LiveRun, begin, known
from flows.hooks.stale import ends

LOOK_SECONDS = 10.0
"""Between two looks of a run at its own state: each is a call to the server."""
PATIENCE_SECONDS = 40.0
"""A worker that ends a run takes up to 30 s; after this long the run ends itself."""

log = logging.getLogger("outliers.cancelled")


def watches(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook on_running: from now on a thread looks whether the run is being cancelled."""
    run = known(flow_run.id) or begin(flow_run.id)
    # where the command started a server for itself, only this context knows its address
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(_watch, flow_run.id, run), name="cancelled", daemon=True).start()


def rests(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of every end: the thread stops looking."""
    if (run := known(flow_run.id)) is not None:
        run.over.set()


def was_cancelled(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook on_crashed: a run that ended itself because it was being cancelled is Cancelled, not Crashed."""
    rests(flow, flow_run, state)
    run = known(flow_run.id)
    if run is None or not run.ended_by_us:
        return
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Cancelled(message="The run was cancelled; it ended itself."), force=True)
    ends(flow, flow_run, state)


def _watch(run_id: UUID, run: LiveRun) -> None:
    since: float | None = None
    while not run.over.wait(LOOK_SECONDS):
        if not _is_cancelled(run_id):
            since = None
            continue
        since = since or time.monotonic()
        if time.monotonic() - since >= PATIENCE_SECONDS:
            log.warning("the run is being cancelled, and no worker has ended it in %.0f s: ending", PATIENCE_SECONDS)
            run.ended_by_us = True
            # as a worker does: Prefect passes the signal on to the flow, which ends its job and gives its machine back
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _is_cancelled(run: UUID) -> bool:
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run).state
    except (PrefectException, httpx.HTTPError, RuntimeError):
        return False  # the server does not answer for a moment
    return state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)
