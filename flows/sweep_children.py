"""The studies of a sweep as children: a limited number at once, each failing by itself, all ended on cancel.

There are two kinds of children. The command runs each study as a process of its own (`sweep_processes`), and the deployment
as a run of the deployment `study`. They are never subflows in threads: a signal reaches the main thread alone, so the
subflows of a cancelled sweep run on to their end (measured on Prefect 3.8.8: SIGTERM after 2 s, two subflows in threads both
ended by themselves at 6 s). One thread polls the children: there is nothing to lock.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException

from outliers.errors import BadInput, HubUnavailable, OutliersError
from outliers.publish.outcome import Outcome
from outliers.sweep.outcome import Ended, end_of, end_without
from outliers.sweep.sweep import Sweep, SweepStudy, answer, kept_for_next, next_to_start

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
API_SECONDS = 2.0
"""Between two looks at a run of a deployment: each is a call to the server."""
LATE_SECONDS = 60.0
"""After this long without a worker, a run is reported."""
JOIN_SECONDS = 20.0
"""How long children have to end once they are asked to. Prefect kills a cancelled run 30 s after its signal."""


class Child(Protocol):
    """A study that runs."""

    def poll(self) -> Ended | None:
        """How it ended, or None while it runs."""

    def cancel(self) -> None:
        """Ask it to end; `join` waits for that."""

    def join(self, seconds: float) -> None:
        """Wait for its end, at most this long, and then make sure of it."""


Start = Callable[[SweepStudy], Child]
Tell = Callable[[SweepStudy, Ended | None], None]
"""Called when a study starts (None) and when it ends."""


def run_studies(
    sweep: Sweep,
    start: Start,
    tell: Tell,
    look: Callable[[SweepStudy], Outcome | None] = answer,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Ended, ...]:
    """Run all studies of a sweep; how each ended, in the order of the file.

    At most `parallel` run at once, two of one capture never, and models of the hub begin `stagger_seconds` apart. An error
    that one child raises ends that study alone; what is raised here (a cancel, Ctrl-C) ends the children first.

    Args:
        sweep: the studies and the limits
        start: starts a child
        tell: called when a study starts and when it ends
        look: returns the outcome of a study that is there already
        clock: seconds, monotonic
        sleep: waits
    """
    waiting, running, ended = list(sweep.studies), dict[str, tuple[SweepStudy, Child]](), dict[str, Ended]()
    last_from_hub = float("-inf")
    try:
        while waiting or running:
            # first those that have ended: they leave a place, and their capture
            for name, (one, child) in list(running.items()):
                end = _polled(one, child)
                if end is not None:
                    ended[name] = end
                    del running[name]
                    tell(one, end)
            study = next_to_start(sweep, waiting, [one for one, _ in running.values()], clock() - last_from_hub)
            if study is not None:
                waiting.remove(study)
                begun = _begin(study, waiting, start, look)
                if isinstance(begun, Ended):
                    ended[study.name] = begun
                    tell(study, begun)
                    continue
                running[study.name] = (study, begun)
                last_from_hub = clock() if study.from_hub else last_from_hub
                tell(study, None)
            elif running or waiting:
                sleep(POLL_SECONDS)
    finally:
        _end([child for _, child in running.values()])
    return tuple(ended[study.name] for study in sweep.studies)


def _end(children: list[Child]) -> None:
    """Ask all to end, then make sure of it. One that can't be asked is logged, and the others are still asked."""
    until = time.monotonic() + JOIN_SECONDS
    for child in children:
        _tried(child.cancel)
    for child in children:
        _tried(functools.partial(child.join, max(0.0, until - time.monotonic())))


def _tried(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:  # of one study, and the others are still to be ended
        log.exception("a study could not be ended")


def _polled(study: SweepStudy, child: Child) -> Ended | None:
    """How a child ended. One that can't be polled is ended, and has failed with that error."""
    try:
        return child.poll()
    except Exception as error:  # of one study, and it must not end the others
        log.warning("%s can't be polled", study.name, exc_info=True)
        _end([child])
        return _failed(study, error)


def _failed(study: SweepStudy, error: Exception) -> Ended:
    how = "refused: " if isinstance(error, BadInput) else ""
    text = str(error) if isinstance(error, OutliersError) else f"{type(error).__name__}: {error}"
    return end_without(study, "failed", f"{how}{text}")


def _begin(
    study: SweepStudy, waiting: list[SweepStudy], start: Start, look: Callable[[SweepStudy], Outcome | None]
) -> Child | Ended:
    """The child of a study; or its end at once, where it is there already, is refused, or can't be started."""
    try:
        outcome = _looked(study, look)
        if outcome is not None:
            return end_of(study, outcome)
        # a machine is paid while it waits: only for a study that will come
        kept = kept_for_next(study)
        return start(kept if kept is not study and _has_next(study, waiting, look) else study)
    except Exception as error:  # of one study: it has failed with this, and the others go on
        if not isinstance(error, OutliersError):
            log.warning("%s can't be started", study.name, exc_info=True)
        return _failed(study, error)


def _has_next(study: SweepStudy, waiting: list[SweepStudy], look: Callable[[SweepStudy], Outcome | None]) -> bool:
    """Whether a waiting study reads the same capture, and is neither there already nor refused."""
    for other in waiting:
        if other.capture_key == study.capture_key:
            try:
                if _looked(other, look) is None:
                    return True
            except OutliersError:
                continue
    return False


def _looked(study: SweepStudy, look: Callable[[SweepStudy], Outcome | None]) -> Outcome | None:
    try:
        return look(study)
    except HubUnavailable:
        return None  # the child waits for the hub
    except OutliersError:
        raise
    except Exception:  # noqa: BLE001 - an unforeseen error of one study must not end the others
        return None  # the child meets it too, and reports it with its traceback


class Deployments:
    """Starts each study as a run of a deployment; one that an earlier try of this sweep left running is joined.

    `holder`: id of the sweep's own run. `say`: called with a sentence when a run waits for a worker.
    """

    def __init__(self, deployment: str, holder: str, say: Callable[[str], None]) -> None:
        self._deployment, self._holder, self._say = deployment, holder, say

    def __call__(self, study: SweepStudy) -> Child:
        parameters = study.spec.model_dump(mode="json")
        for number in itertools.count():
            # a retry of the sweep's run gets the same run back, or another one where that has failed
            key = f"sweep-{self._holder}-{study.name}-{number}"
            try:
                run = run_deployment(self._deployment, parameters=parameters, timeout=0, idempotency_key=key)
            except ObjectNotFound as error:
                raise BadInput(
                    f"there is no deployment {self._deployment}: `prefect --no-prompt deploy --all`"
                ) from error
            except (PrefectException, httpx.HTTPError) as error:
                raise BadInput(f"a run of {self._deployment} can't be made: {error}") from error
            if isinstance(run, FlowRun) and not _over_in_vain(run):
                return DeploymentChild(study, run.id, self._say)
        raise AssertionError("unreachable")


def _over_in_vain(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_final() and run.state.type != StateType.COMPLETED


class DeploymentChild:
    """A run of the deployment `study`; what it found is read from where it published, or from the workspace."""

    def __init__(self, study: SweepStudy, run: UUID, say: Callable[[str], None]) -> None:
        self._study, self._run, self._say = study, run, say
        self._began, self._looked, self._late = time.monotonic(), 0.0, False

    def poll(self) -> Ended | None:
        now = time.monotonic()
        if now - self._looked < API_SECONDS:
            return None
        self._looked = now
        try:
            state = self._state()
        except ObjectNotFound:
            return self._ended("failed", "its flow run was deleted")
        except (PrefectException, httpx.HTTPError):
            return None  # the server is away for a moment
        if state is None or not state.is_final():
            self._tell_late(state, now)
            return None
        if state.type == StateType.COMPLETED:
            return self._done()
        kind: Literal["failed", "cancelled"] = "cancelled" if state.type == StateType.CANCELLED else "failed"
        return self._ended(kind, state.message or str(state.name))

    def cancel(self) -> None:
        try:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(self._run, State(type=StateType.CANCELLING))
        except (PrefectException, httpx.HTTPError) as error:
            self._say(f"{self._study.name}: its run {self._run} could not be cancelled: {error}")

    def join(self, seconds: float) -> None:
        """The worker ends it: there is nothing to wait for."""

    def _state(self) -> State[Any] | None:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(self._run).state

    def _done(self) -> Ended:
        seconds = time.monotonic() - self._began
        try:
            outcome = answer(self._study)
        except Exception as error:  # noqa: BLE001 - its run is completed, whatever is in the way here
            return self._ended("done", f"its results are not to be had here: {error}")
        if outcome is None:
            return self._ended("done", "its results are in its worker's workspace: give the sweep a publish_to")
        return end_of(self._study, outcome.model_copy(update={"cached": False}), str(self._run), seconds)

    def _ended(self, state: Literal["done", "failed", "cancelled"], reason: str) -> Ended:
        return end_without(self._study, state, reason, str(self._run), time.monotonic() - self._began)

    def _tell_late(self, state: State[Any] | None, now: float) -> None:
        if self._late or state is None or state.type != StateType.SCHEDULED or now - self._began < LATE_SECONDS:
            return
        self._late = True
        self._say(
            f"{self._study.name}: no worker has taken its run yet. A sweep takes one place of the pool and of its worker, "
            "and each study another: start a worker, or raise their limits"
        )
