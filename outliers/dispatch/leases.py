"""A study's machine while the run lives: its lease is renewed, and at the end it is released, or kept.

    success      released at once, or kept for keep_seconds with --keep-running: its results are home, and publishing them
                 needs no machine
    cancelled    released at once
    failed       kept for grace_seconds, with its disk, so that Retry goes on from the journal; released at once where
                 trying again changes nothing and nothing was journaled
    killed       no renewal: the machine ends by itself when its lease is over

A machine never depends on this class to end: the class only shortens what the lease would end anyway.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from outliers.dispatch.run import undisturbed
from outliers.dispatch.study_run import StudyRun
from outliers.dispatch.transfer import HERE
from outliers.errors import BudgetSpent, OutliersError, PermanentError
from outliers.events.event import Event
from outliers.machines.base import Machine, Provider
from outliers.machines.rentals import KEPT, LEAST_SECONDS, RENEW_SECONDS, Rentals
from outliers.study.parts import Shard, machine_name

LOOK_SECONDS = 5.0
"""Between two looks at the system clock, by which leases run: a computer that was asleep renews when it wakes."""
JOIN_SECONDS = 10.0
"""How long a renewal under way is waited for at the end."""

log = logging.getLogger("outliers.leases")


class MachineLease:
    """A context manager around the steps of a study, or of one shard of it, on one machine.

    Args:
        run: the run that needs the machine
        source: the provider it comes from
        part: the shard that the machine is for
        renew_seconds: longest time between two renewals
        look_seconds: between two looks at the clock
        clock: unix seconds, which also advance while the computer sleeps
    """

    def __init__(
        self,
        run: StudyRun,
        source: Provider,
        part: Shard | None = None,
        *,
        renew_seconds: float = RENEW_SECONDS,
        look_seconds: float = LOOK_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run = run
        self.source = source
        self.name = machine_name(run.prepared, part)
        """The machine's name: the one asked for, else made from the capture's id, so that a retry finds it."""
        budget = run.prepared.spec.compute.max_total_price
        self.budget_dollars = budget / (part.of if part else 1) if budget is not None else None
        """What the machine may cost in all: for a shard, its share of --max-total-price."""
        self.holder = f"{run.prepared.study_id}.{run.holder}"
        self.kept_work = False
        """The machine has something in its journal: a retry would go on from it."""
        self._extract = f"extract {part.number}/{part.of}" if part else "extract"
        self._compute, self._title = run.prepared.spec.compute, run.prepared.title
        self._rentals = Rentals(run.workspace.root)
        self._machine: Machine | None = None
        self._renew_seconds, self._look_seconds, self._clock = renew_seconds, look_seconds, clock
        self._over = threading.Event()
        self._owner = 0
        self._spent: BudgetSpent | None = None
        self._thread: threading.Thread | None = None
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> MachineLease:
        self._owner = threading.get_ident()
        self._hooks.enter_context(self.run.heard_by(self._listen))
        self._hooks.enter_context(self.run.guarded_by(self.check_budget))
        return self

    def opened(self, machine: Machine) -> None:
        """The provider has made `machine`, and holds it for this run: renew its lease from now on."""
        self._machine = machine
        if machine.provider != HERE and self._thread is None:
            self._thread = threading.Thread(target=self._renew, name=f"renew-{self.name}", daemon=True)
            self._thread.start()

    def seconds(self) -> float:
        """How long the lease may be now: as asked for, and never longer than the budget pays. Raises BudgetSpent."""
        paid = self._paid_seconds()
        if paid < min(LEAST_SECONDS, self._compute.lease_seconds):
            price = self._machine.price_per_hour if self._machine else 0.0
            raise BudgetSpent(
                f"{self.name} has cost ${self._rentals.spent(self.name):.2f} at ${price:.2f} an hour, and --max-total-price "
                f"leaves it ${self.budget_dollars or 0:.2f}: it is released, the study ends here"
            )
        return min(float(self._compute.lease_seconds), paid)

    def _paid_seconds(self) -> float:
        """How long the budget still pays; infinite without a budget, or where the machine costs nothing."""
        price = self._machine.price_per_hour if self._machine else 0.0
        return self._rentals.paid_seconds(self.name, self.budget_dollars, price)

    def check_budget(self) -> None:
        """Raise BudgetSpent once the budget is spent, in the thread of this lease alone: other shards go on."""
        if self._spent is not None and threading.get_ident() == self._owner:
            raise self._spent

    def _renew(self) -> None:
        every = min(self._renew_seconds, self._compute.lease_seconds / 3)
        due = self._clock() + every
        while not self._over.wait(min(every, self._look_seconds)):
            if self._clock() < due:
                continue
            due = self._clock() + every
            try:
                self.source.hold(self.name, self.holder, self._title, self.seconds())
            except BudgetSpent as error:
                self._spent = error
                return
            except Exception as error:  # noqa: BLE001 - without this thread the lease would end
                # a connection comes back, a full disk is emptied, and the step says so itself; until then the lease runs on
                log.warning("the lease of %s could not be renewed: %s", self.name, error)

    def _listen(self, step: str, event: Event) -> None:
        # all shards of a run hear all events: only those of its own are about this machine's disk
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
        """Release the machine, or keep it, depending on how the run ended."""
        self._over.set()
        self._hooks.close()
        if self._thread is not None:
            # a renewal under way would undo what follows; one that hangs on a dead line must not delay a cancel
            self._thread.join(JOIN_SECONDS)
        keep = self._keep_seconds(error)
        try:
            here = self._machine is not None and self._machine.provider == HERE
            kept = error is None and self._compute.keep_running and not here
            if kept:
                self._keep(min(float(self._compute.keep_seconds), self._paid_seconds()))
            # a cancelled run has half a minute: no time to wait until a machine is gone
            wait = error is None or isinstance(error, Exception)
            done = self.source.leave(self.name, self.holder, keep, wait)
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
            log.info("%s", done)

    def _keep(self, seconds: float) -> None:
        """--keep-running: no run holds the machine, and it stays until its time is over."""
        self.source.hold(self.name, f"{self.run.prepared.study_id}{KEPT}", self._title, seconds)
        log.info("%s is kept for %.0f minutes: outliers machines release %s", self.name, seconds / 60, self.name)

    def _keep_seconds(self, error: BaseException | None) -> float:
        if error is None:
            return 0.0
        if not isinstance(error, Exception) or isinstance(error, BudgetSpent):
            return 0.0
        if isinstance(error, PermanentError) and not self.kept_work:
            return 0.0
        return min(float(self._compute.grace_seconds), self._paid_seconds())
