"""Ending machines that are past their lease, where a machine's own timer did not."""

from __future__ import annotations

import time

from outliers.errors import DiskFull, OutliersError
from outliers.machines.base import Rental
from outliers.machines.providers import PROVIDERS, provider
from outliers.machines.rentals import Rentals
from outliers.names import LOCAL
from outliers.workspace import Workspace

REMOTE = tuple(name for name in PROVIDERS if name != LOCAL)


def reap(workspace: Workspace) -> tuple[list[str], list[str]]:
    """End whatever is past its lease, by the records and the providers' own lists; (what was done, what failed)."""
    done: list[str] = []
    failed = list(Rentals(workspace.root).unreadable())
    for name in REMOTE:
        if name != "ssh" and not Rentals(workspace.root).ever(name):
            continue
        source = provider(name, workspace.root)
        try:
            rentals = source.list()
        except OutliersError as error:
            failed.append(f"{name} did not answer, so what is past its lease there could not be ended: {error}")
            continue
        for rental in rentals:
            if not rental.is_over(time.time()):
                continue
            try:
                if _is_still_over(Rentals(workspace.root), rental):
                    done.append(source.release(rental.name))
            except OutliersError as error:
                failed.append(f"{rental.name} ({rental.provider}, {rental.place}) could not be ended: {error}")
    return done, failed


def _is_still_over(records: Rentals, rental: Rental) -> bool:
    """Whether a machine that was past its lease in a list still is, its record saying so from now on: Retry may have taken it
    again while others were being released."""
    if not rental.holders and records.get(rental.name) is None:
        return True  # no record: by its provider's own clock
    try:
        return records.take_overdue(rental.name) is not None
    except DiskFull:
        now = records.get(rental.name)
        return now is not None and now.is_over(time.time())
