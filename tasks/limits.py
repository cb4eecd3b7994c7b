"""How many rented machines may be at work at once: Prefect's global concurrency limit `outliers-machines`.

Without a limit nothing waits, and a study on this computer (provider `local`) never does. A slot is a lease on the Prefect
server that this process renews; a run that was killed loses it about a minute later. The limit counts studies at work, not
machines: one that is kept after a failure holds no slot. `flows.server.settle` makes the limit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import httpx
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from outliers.dispatch.study_run import StudyRun
from outliers.dispatch.transfer import HERE
from outliers.events.stream import Reporter
from outliers.spec import chosen

LIMIT = "outliers-machines"
LEASE_SECONDS = 60.0
"""The shortest lease that Prefect's server accepts. The slot of a killed run stays taken for this long and up to 15 s more."""
POLL_SECONDS = 3.0
NAP_SECONDS = 0.2
AWAY_SECONDS = 300.0
"""How long a server that does not answer is waited for; without it a run can't go on anyway."""
_LOCKED = 423


@contextlib.contextmanager
def machine_slot(run: StudyRun, reporter: Reporter) -> Iterator[None]:
    """Hold one slot of the limit while the block runs; wait for one where all are taken.

    `reporter`: says once that there is a wait. While it waits, `run.check` ends it where the study is cancelled.
    """
    if chosen(run.prepared.spec.compute.provider) == HERE or not _is_limited():
        yield
        return
    with contextlib.ExitStack() as held:
        _wait(held, run, reporter)
        yield


def _is_limited() -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            return False
    return True


def _wait(held: contextlib.ExitStack, run: StudyRun, reporter: Reporter) -> None:
    """Take a slot into `held`. Asks repeatedly: Prefect's own wait can't be interrupted from another thread."""
    waited, away_since = False, None
    while True:
        slot = concurrency(
            # a renewal that fails must not kill a study: at worst there is one machine too many for a while
            LIMIT,
            max_retries=0,
            lease_duration=LEASE_SECONDS,
            raise_on_lease_renewal_failure=False,
        )
        try:
            held.enter_context(slot)
            if waited:
                reporter.log("info", f"there is a slot of {LIMIT} now")
            return
        except ConcurrencySlotAcquisitionError as error:
            if _is_taken(error):
                away_since = None
            else:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > AWAY_SECONDS:
                    raise
        if not waited:
            waited = True
            why = f"every slot of {LIMIT} is taken (more: prefect gcl update {LIMIT} --limit N)"
            reporter.log("info", f"waiting: {why}")
        _nap(run)


def _is_taken(error: ConcurrencySlotAcquisitionError) -> bool:
    cause = error.__cause__
    return isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == _LOCKED


def _nap(run: StudyRun) -> None:
    until = time.monotonic() + POLL_SECONDS
    while time.monotonic() < until:
        run.check()
        time.sleep(NAP_SECONDS)
