"""Provider `sky`: machines that SkyPilot rents from the clouds, and that then are ssh machines like any other.

    outliers study --provider sky --gpu-count 2 --gpu-filter A100 --min-vram 80 --max-price 5 ...

The name is recorded before anything is asked for, and made from the study, so that a retry finds what a crash left. A
machine ends by itself: SkyPilot's autostop, with down, is set at launch and again at each renewal; the watchdog on it ends
its jobs.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from outliers.errors import BudgetSpent, MachineLost, OutliersError, PlanRefused
from outliers.hardware import Facts
from outliers.machines import catalog, sky_engine
from outliers.machines.base import NOT_AMONG, Excluded, Machine, MachineRequest, Offer, Rental, RentalState, fits
from outliers.machines.catalog import Candidate
from outliers.machines.connection import Connection
from outliers.machines.rentals import ENDED_SECONDS, LEAST_SECONDS, Rentals, even_unwritten, gone_by
from outliers.machines.sky_engine import Cluster
from outliers.machines.ssh_leases import Access, SshLeases

NAME = "sky"
FOLDER = ".outliers"
PREFIX = "outliers-"
"""Clusters of this name are ours, also where this computer has no record of them."""
TRIES = 5
"""Offers that are tried, one after the other, where a cloud has run out of what its catalog lists."""
LAUNCH_SECONDS = 3600.0
"""No launch takes longer: a machine with neither an end nor a record is past its lease then."""

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What rents: `sky_engine`, the module; its functions say what each does and raises."""

    def launch(self, name: str, wanted: Candidate, seconds: float, say: Callable[[str], None] | None = None) -> Cluster:
        """Rents a machine, or finds the one of that name; it ends by itself after `seconds`."""

    def write_ssh_entry(self, name: str) -> None:
        """Writes how ssh reaches it."""

    def renew(self, name: str, seconds: float) -> None:
        """It ends by itself in `seconds` from now, and not before."""

    def down(self, name: str, wait: bool = True) -> None:
        """Ends it, and whatever launch of it is under way."""

    def status(self, name: str, refresh: bool = True) -> Cluster:
        """What is known of it."""

    def list_clusters(self, refresh: bool = True) -> tuple[Cluster, ...]:
        """All that there are."""


Candidates = Callable[[MachineRequest], tuple[tuple[Candidate, ...], tuple[Excluded, ...]]]


def may_have(name: str) -> bool:
    """Whether a machine without a record may exist: its name is one of this program's, and SkyPilot was used on this computer."""
    used = (Path.home() / ".sky").is_dir() and importlib.util.find_spec("sky") is not None
    return used and name.startswith(PREFIX)


def access(name: str) -> Access:
    """How a cluster is reached: by the file that SkyPilot wrote for it. The key of a machine that is minutes old is not
    known yet, so it is not checked, as in SkyPilot itself."""
    file = Path.home() / ".sky" / "generated" / "ssh" / name
    config = file if file.exists() else None
    return Access(Connection(sky_engine.ssh_alias(name), config=config, check_host_key=False), FOLDER)


class SkyProvider:
    """Rented machines; `workspace` is this computer's, with the records of what is rented."""

    def __init__(
        self,
        workspace: Path,
        engine: Engine = sky_engine,
        candidates: Candidates = catalog.candidates,
        reached: Callable[[str], Access] = access,
    ) -> None:
        self._engine = engine
        self._candidates = candidates
        self._rentals = Rentals(workspace)
        self._leases = SshLeases(NAME, self._rentals, lambda rental: reached(rental.name))
        self._ends: dict[str, float] = {}

    def offers(self, request: MachineRequest) -> tuple[tuple[Offer, ...], tuple[Excluded, ...]]:
        found, excluded = self._candidates(request)
        return tuple(one.offer for one in found), excluded

    def ensure(self, name: str, request: MachineRequest, holder: str, title: str) -> Machine:
        known, seconds = self._held(name, request, holder, title)
        if known.state == "up":
            # also on attaching: a machine that was started again has forgotten its end, one that waits may be near it
            self._renew(name)
        # the installation may take longer than the lease lasts
        with self._rentals.renewed(name, holder, title, seconds, lambda: self._renew(name, seconds / 4)):
            self._engine.write_ssh_entry(name)
            machine = self._leases.open(name, holder, title, seconds, request.remove_files)
        if known.state == "launching":
            self._check_delivered(name, machine.facts(), request)
        self._renew(name)
        if self._rentals.mark(name, "up", unless="releasing") is None:
            raise MachineLost(f"{name} was released while it was opened; run the study again")
        return machine

    def _held(self, name: str, request: MachineRequest, holder: str, title: str) -> tuple[Rental, float]:
        """The record of the machine of that name, found or rented, held from now on, and for how long."""
        while True:
            known = self._rentals.get(name)
            if known is None or not self._is_there(known):
                known = self._rent(name, request, holder, title)
            seconds = self._lease(name, request, known.price_per_hour)
            known = self._rentals.begin(name, NAME, known.place, known.price_per_hour, holder, title, seconds)
            # another process has released it since it was listed: list again
            if known.state != "releasing":
                return known, seconds

    def _lease(self, name: str, request: MachineRequest, price: float) -> float:
        """Seconds of a lease: as asked, and never more than what is left of the whole budget pays. Raises BudgetSpent."""
        asked = float(request.lease_seconds)
        paid = self._rentals.paid_seconds(name, request.max_total_price, price)
        if paid < min(LEAST_SECONDS, asked):
            raise BudgetSpent(
                f"machines of the name {name} have cost ${self._rentals.spent(name):.2f}, and --max-total-price allows "
                f"${request.max_total_price or 0:.2f}: no more is rented at ${price:.2f} an hour; raise it to go on"
            )
        return min(asked, paid)

    def _is_there(self, known: Rental) -> bool:
        """Whether a recorded machine still is, and can be used; its record ends where not."""
        found, name = self._engine.status(known.name), known.name
        if known.state == "releasing" and found.state != "gone":
            _log.info("%s (%s) is being released: it is waited for, then another is rented", name, known.place)
            self._engine.down(name)
            self._rentals.end(name, "released", known.since)
            return False
        if found.state == "up":
            return True
        if found.state == "launching":
            # asked for by a run that was killed: found, or made, under the same name
            return False
        _log.warning("%s (%s) is %s: another is rented", name, known.place, found.state)
        if found.state == "stopped":
            self._engine.down(name)
        self._rentals.end(name, "released" if known.state == "releasing" else "lost", known.since, _gone_by(known))
        return False

    def _rent(self, name: str, request: MachineRequest, holder: str, title: str) -> Rental:
        """The cheapest machine that is available; where a cloud has run out of one, the next is asked for."""
        found, excluded = self._candidates(request)
        wanted = [one for one in found if not request.among or one.offer.name in request.among]
        if not wanted:
            left_out = (Excluded(one.offer.name, NOT_AMONG) for one in found)
            misses = "".join(f"\n  {item.name}: {item.reason}" for item in (*excluded, *left_out))
            raise PlanRefused(f"nothing fits:{misses}")
        refused: list[str] = []
        for one in wanted[:TRIES]:
            price = one.offer.price_per_hour
            seconds = self._lease(name, request, price)
            made = self._rentals.begin(name, NAME, one.offer.name, price, holder, title, seconds)
            _log.info("renting %s as %s, $%.2f an hour without its disk", one.offer.name, name, price)
            try:
                # a launch may take longer than the lease lasts
                with self._rentals.renewed(name, holder, title, seconds):
                    cluster = self._engine.launch(name, one, seconds, lambda line: _log.info("%s", line))
            except PlanRefused as error:
                refused.append(f"{one.offer.name}: {error}")
                _log.warning("%s can't be had: %s", one.offer.name, error)
                continue
            if cluster.price_per_hour is not None and not math.isclose(cluster.price_per_hour, price):
                made = self._rentals.begin(name, NAME, one.offer.name, cluster.price_per_hour, holder, title, seconds)
            return made
        self._engine.down(name)
        self._rentals.end(name, "refused")
        raise PlanRefused("no cloud had what its catalog lists: " + "; ".join(refused))

    def _check_delivered(self, name: str, facts: Facts, request: MachineRequest) -> None:
        """What came is what was asked and is paid for: a catalog may be wrong, a driver missing. What is not goes back."""
        # a catalog has its own names for GPUs; the memory that the study needs was compared with the offer. The disk there is
        # whatever was asked for, and some clouds (Lambda) give what they have instead
        asked = replace(request, gpu_filter=None, needed_ram_bytes=0)
        if asked.gpu_count is None and request.gpu_filter:
            asked = replace(asked, gpu_count=1)
        if reasons := fits(facts, asked):
            self._engine.down(name)
            self._rentals.end(name, "not what was asked")
            raise PlanRefused(f"the machine that came is not what was asked, it was given back: {'; '.join(reasons)}")

    def find(self, name: str) -> Machine | None:
        if self._rentals.get(name) is None or self._engine.status(name).state != "up":
            return None
        return self._leases.find(name)

    def list(self) -> tuple[Rental, ...]:
        if not self._rentals.ever(NAME) and not self._rentals.unreadable():
            # a study that is refused before it rents should not start SkyPilot's server
            return ()
        # first the records: one that is made meanwhile is of no machine in a list that is older
        records = self._rentals.all(NAME)
        clusters = {one.name: one for one in self._engine.list_clusters() if one.state != "gone"}
        found = []
        for known in records:
            cluster = clusters.pop(known.name, None)
            if cluster is not None or (known.state == "launching" and time.time() - known.since < LAUNCH_SECONDS):
                found.append(known)
                continue
            with even_unwritten(known.name):
                self._rentals.end(known.name, "gone", known.since, _gone_by(known))
        strangers = (one for name, one in sorted(clusters.items()) if name.startswith(PREFIX))
        return (*found, *(_stranger(one) for one in strangers))

    def hold(self, name: str, holder: str, title: str, seconds: float) -> None:
        until = time.time() + seconds
        self._leases.hold(name, holder, title, seconds)
        self._renew(name, slack_seconds=seconds / 4, until=until)

    def _renew(self, name: str, slack_seconds: float = 0.0, until: float = 0.0) -> None:
        """The machine's end by itself: that of its latest holder, also of one whose record (`until`) could not be written; left
        as it is where it is no further off than the slack."""
        known = self._rentals.get(name)
        if known is None:
            return
        until = max(known.lease_until, until)
        if abs(until - self._ends.get(name, 0.0)) <= slack_seconds:
            return
        self._engine.renew(name, until - time.time())
        self._ends[name] = until

    def leave(self, name: str, holder: str, keep_seconds: float = 0, wait: bool = True) -> str:
        known = self._rentals.get(name)
        if known is None:
            return f"{name} is not rented"
        if keep_seconds > 0:
            self._leases.leave(name, holder, keep_seconds)
            self._renew(name)
            return f"{name} is kept for {keep_seconds / 60:.0f} minutes more, at ${known.price_per_hour:.2f} an hour"
        others = [one for key, one in known.holders.items() if key != holder and one.until > time.time()]
        if others:
            self._leases.leave(name, holder, 0)
            # the others may need it for less long than this one would have
            self._renew(name)
            return f"{name} is still held by {len(others)} other runs"
        return self._end(known, wait)

    def has(self, name: str) -> bool:
        """Whether a machine of that name is rented, as SkyPilot knows it, whatever the records here say."""
        return self._engine.status(name, refresh=False).state != "gone"

    def release(self, name: str) -> str:
        known = self._rentals.get(name)
        if known is not None:
            return self._end(known, wait=True)
        if self._engine.status(name, refresh=False).state == "gone":
            return f"{name} is not rented: there is nothing to release"
        self._engine.down(name)
        return f"{name} is released"

    def _end(self, known: Rental, wait: bool) -> str:
        latest = self._gone_since(known) if wait else math.inf
        # a disk that is full here must not let a machine run on
        with even_unwritten(known.name):
            self._rentals.mark(known.name, "releasing", lease_until=min(known.lease_until, time.time()))
        if wait:
            _log.info("releasing %s", known.name)
        elif known.state != "launching":
            # first what needs no teardown: should the order get lost, the machine ends within a minute or two. One that is
            # being launched has no end to set yet, and asking for it would wait for the launch
            try:
                self._engine.renew(known.name, 60)
            except OutliersError as error:
                _log.info("%s: %s", known.name, error)
        self._engine.down(known.name, wait)
        cost = f", it cost ${known.spent(min(time.time(), latest)):.2f}"
        if not wait:
            return f"{known.name} is being released{cost}; `outliers machines list` shows when it is gone"
        with even_unwritten(known.name):
            self._rentals.end(known.name, "released", known.since, latest)
        return f"{known.name} is released{cost}"

    def _gone_since(self, known: Rental) -> float:
        """When a machine long past its lease was gone at the latest; infinity where it is still there, or can't be asked."""
        if not known.is_over(time.time() - ENDED_SECONDS):
            return math.inf
        try:
            return _gone_by(known) if self._engine.status(known.name).state == "gone" else math.inf
        except OutliersError as error:
            _log.info("%s: %s", known.name, error)
            return math.inf


def _gone_by(known: Rental) -> float:
    """The latest time at which a machine that is gone had ended. One whose launch was not seen to end got its timer then."""
    return gone_by(known) + (LAUNCH_SECONDS if known.state == "launching" else 0.0)


def _stranger(found: Cluster) -> Rental:
    """A machine with one of this program's names and no record here: of another workspace, or of one that was deleted."""
    since = found.launched_at or 0.0
    ends = found.autostop_minutes is not None and found.ends
    where = " ".join(part for part in (found.cloud, found.region, found.instance_type) if part)
    until = math.inf if ends else since + LAUNCH_SECONDS
    state: RentalState = "launching" if found.state == "launching" else "up"
    return Rental(found.name, NAME, where, state, found.price_per_hour or 0.0, since, until, {})
