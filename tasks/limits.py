"""How many rented machines may be at work at once: Prefect's global concurrency limit `outliers-machines`.

Who has set no limit waits for nothing, and nothing on this machine (provider `local`) does. A slot is a lease on the
Prefect server that this process renews; a run that was killed loses it about a minute later. It counts studies at work,
not machines: one that is kept after a failure holds no slot. Before it: `flows.server.settle`, which makes the limit. After it:
whoever rents.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import httpx
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger

from outliers.dispatch.run import GUARDS
from outliers.dispatch.transfer import HERE
from outliers.spec import chosen

LIMIT = "outliers-machines"
LEASE_SECONDS = 60.0
"""The shortest that Prefect's server takes: so long, and up to 15 s more, a killed run's slot stays taken."""
POLL_SECONDS = 3.0
NAP_SECONDS = 0.2
AWAY_SECONDS = 300.0
"""A server that is away is waited for so long; a run without its server gets nowhere anyhow."""
_LOCKED = 423


@contextlib.contextmanager
def machine_slot(provider: str, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold one slot of the limit while the block runs; wait for one if none is free.

    `provider`: as in the spec ("": the default). `say`: told once that there is a wait (default: the run's log).
    While it waits, `GUARDS` are called, so that a cancelled study ends here too.
    """
    if chosen(provider) == HERE or not _is_limited():
        yield
        return
    with contextlib.ExitStack() as held:
        _wait(held, say or get_run_logger().info)
        yield


def _is_limited() -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            return False
    return True


def _wait(held: contextlib.ExitStack, say: Callable[[str], None]) -> None:
    """Take a slot into `held`. Asks again and again: Prefect's own wait can't be interrupted from another thread."""
    told, away_since = False, None
    while True:
        slot = concurrency(
            # a renewal that failed must not kill a study: at worst there is one machine more for a while
            LIMIT,
            max_retries=0,
            lease_duration=LEASE_SECONDS,
            raise_on_lease_renewal_failure=False,
        )
        try:
            held.enter_context(slot)
            if told:
                say(f"there is a slot of {LIMIT} now")
            return
        except ConcurrencySlotAcquisitionError as error:
            if _is_taken(error):
                away_since = None
            else:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > AWAY_SECONDS:
                    raise
        if not told:
            told = True
            say(f"waiting: every slot of {LIMIT} is taken (more: prefect gcl update {LIMIT} --limit N)")
        _nap()


def _is_taken(error: ConcurrencySlotAcquisitionError) -> bool:
    cause = error.__cause__
    return isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == _LOCKED


def _nap() -> None:
    until = time.monotonic() + POLL_SECONDS
    while time.monotonic() < until:
        for guard in list(GUARDS):
            guard()
        time.sleep(NAP_SECONDS)
