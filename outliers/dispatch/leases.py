"""A study's machine while the flow lives: its lease renewed, and at the end released, kept for Retry, or kept as asked.

    success      released at once, or kept for keep_seconds with --keep-running: its results are home, and whether they can
                 be published is nothing to it
    cancelled    released at once
    failed       kept for grace_seconds, with its disk, so that Retry goes on from the journal; released at once where
                 trying again changes nothing and nothing was journaled
    killed       nobody renews: the machine ends by itself when its lease is over

What ends a machine is never this class alone: it shortens what the lease would end anyway.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from outliers.dispatch.run import GUARDS, LISTENERS, undisturbed
from outliers.dispatch.transfer import HERE
from outliers.errors import BudgetSpent, OutliersError, PermanentError
from outliers.events.event import Event
from outliers.machines.base import Machine, Provider
from outliers.machines.rentals import KEPT, LEAST_SECONDS, RENEW_SECONDS, Rentals
from outliers.study.parts import Part
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

LOOK_SECONDS = 5.0
"""Between two looks at the clock on the wall, by which leases run: a computer that was asleep renews when it wakes."""

log = logging.getLogger("outliers.tenancy")


def machine_name(prepared: Prepared, part: Part | None = None) -> str:
    """The machine's name: the one asked for, else made from the capture, so that a retry finds it; of a part, with its
    number."""
    name = prepared.spec.compute.machine or f"outliers-{prepared.capture_id}"
    return name + (part.suffix if part else "")


class Tenancy:
    """A context manager around the steps of a study; `holder` is the run, the same one when it is retried."""

    def __init__(
        self, source: Provider, prepared: Prepared, workspace: Workspace, holder: str, part: Part | None = None
    ) -> None:
        self.source = source
        self.name = machine_name(prepared, part)
        budget = prepared.spec.compute.max_total_price
        self.budget_dollars = budget / (part.of if part else 1) if budget is not None else None
        """What the machine may cost in all: of a study that is spread, its part of --max-total-price."""
        self.holder = f"{prepared.study_id}.{holder}"
        self._extract = f"extract {part.number}/{part.of}" if part else "extract"
        self._prepared = prepared
        self._rentals = Rentals(workspace.root)
        self._machine: Machine | None = None
        self.kept_work = False
        """Something is journaled on the machine: a retry would go on from it."""
        self._over = threading.Event()
        self._owner = 0
        self._budget: BudgetSpent | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Tenancy:
        self._owner = threading.get_ident()
        LISTENERS.append(self._listen)
        GUARDS.append(self.check)
        return self

    def opened(self, machine: Machine) -> None:
        """The machine is there and held: renew from now on."""
        self._machine = machine
        if machine.provider != HERE and self._thread is None:
            self._thread = threading.Thread(target=self._renew, name=f"renew-{self.name}", daemon=True)
            self._thread.start()

    def seconds(self) -> float:
        """What the lease may be now: as asked, and never beyond what the budget pays. Raises BudgetSpent."""
        compute, paid = self._prepared.spec.compute, self._paid_seconds()
        if paid < min(LEAST_SECONDS, compute.lease_seconds):
            price = self._machine.price_per_hour if self._machine else 0.0
            raise BudgetSpent(
                f"{self.name} has cost ${self._rentals.spent(self.name):.2f} at ${price:.2f} an hour, and --max-total-price "
                f"leaves it ${self.budget_dollars or 0:.2f}: it is released, the study ends here"
            )
        return min(float(compute.lease_seconds), paid)

    def _paid_seconds(self) -> float:
        """How long the budget still pays; for ever where there is none, or nothing is to be paid."""
        price = self._machine.price_per_hour if self._machine else 0.0
        return self._rentals.paid_seconds(self.name, self.budget_dollars, price)

    def check(self) -> None:
        """Raises BudgetSpent once it is spent; called with every event of a step, of other parts too: theirs goes on."""
        if self._budget is not None and threading.get_ident() == self._owner:
            raise self._budget

    def _renew(self) -> None:
        every = min(RENEW_SECONDS, self._prepared.spec.compute.lease_seconds / 3)
        due = time.time() + every
        while not self._over.wait(min(every, LOOK_SECONDS)):
            if time.time() < due:
                continue
            due = time.time() + every
            try:
                self.source.hold(self.name, self.holder, self._prepared.title, self.seconds())
            except BudgetSpent as error:
                self._budget = error
                return
            except Exception as error:  # noqa: BLE001 - the end of this thread would be the machine's
                # a broken line mends, a full disk is emptied, and the step says so itself; until then the lease runs on
                log.warning("the lease of %s could not be renewed: %s", self.name, error)

    def _listen(self, step: str, event: Event) -> None:
        # parts of one study are told to all: only its own is on this machine's disk
        if step == self._extract and event.kind == "progress" and event.done:
            self.kept_work |= event.step.partition(" ")[0] == "extract"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Exception):
            self._leave(error)
        else:
            # cancelled, or Ctrl-C: a second one must not keep the machine
            with undisturbed():
                self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """Release the machine, or keep it, as the run ended."""
        self._over.set()
        LISTENERS.remove(self._listen)
        GUARDS.remove(self.check)
        if self._thread is not None:
            # a renewal on its way would undo what follows; one that hangs on a dead line must not hold a cancel up
            self._thread.join(10)
        keep = self._keep_seconds(error)
        try:
            here = self._machine is not None and self._machine.provider == HERE
            kept = error is None and self._prepared.spec.compute.keep_running and not here
            if kept:
                self._keep(min(float(self._prepared.spec.compute.keep_seconds), self._paid_seconds()))
            # a cancelled run has half a minute: no time to see a machine go
            wait = error is None or isinstance(error, Exception)
            said = self.source.leave(self.name, self.holder, keep, wait)
        except OutliersError as failed:
            log.error(
                "%s could not be %s: %s; it ends by itself when its lease is over, or now with "
                "`outliers machines release %s`",
                self.name,
                "kept" if keep else "released",
                failed,
                self.name,
            )
            return
        if not here and not kept:
            log.info("%s", said)

    def _keep(self, seconds: float) -> None:
        """--keep-running: held by nobody's run, until its time is over."""
        self.source.hold(self.name, f"{self._prepared.study_id}{KEPT}", self._prepared.title, seconds)
        log.info("%s is kept for %.0f minutes: outliers machines release %s", self.name, seconds / 60, self.name)

    def _keep_seconds(self, error: BaseException | None) -> float:
        compute = self._prepared.spec.compute
        if error is None:
            return 0.0
        if not isinstance(error, Exception) or isinstance(error, BudgetSpent):
            return 0.0
        if isinstance(error, PermanentError) and not self.kept_work:
            return 0.0
        return min(float(compute.grace_seconds), self._paid_seconds())
