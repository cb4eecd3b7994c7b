"""Machines that are reached over ssh: opened with everything installed, held by a lease there, left, released.

What providers `ssh` and `sky` have in common once a host answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from outliers.errors import MachineLost
from outliers.machines.base import Rental
from outliers.machines.connection import Connection, quote
from outliers.machines.deploy import deploy
from outliers.machines.probe import Probe, probe
from outliers.machines.remote import RemoteMachine
from outliers.machines.rentals import KEPT, Rentals, even_unwritten

RELEASE_SECONDS = 120.0
QUESTION_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Access:
    """How a host is reached, and where our files go there; `python`: an interpreter to use as it is, or ""."""

    connection: Connection
    folder: str
    python: str = ""

    def probe(self) -> Probe:
        """What the host has; installs nothing. Raises HostRefused, MachineLost, DeployFailed."""
        return probe(self.connection, self.folder, self.python or None)


class SshLeases:
    """The machines of one provider that this process has opened; each is asked for with its rental's record."""

    def __init__(self, provider: str, rentals: Rentals, access: Callable[[Rental], Access]) -> None:
        self._provider = provider
        self._rentals = rentals
        self._access = access
        self._opened: dict[str, RemoteMachine] = {}

    def open(self, name: str, holder: str, title: str, seconds: float, remove_files: bool) -> RemoteMachine:
        """The machine of a record, with this program on it, held by `holder`: always looked at anew."""
        self._opened.pop(name, None)
        machine = self._machine(self._known(name))
        answer = machine.ask(
            "hold", holder=holder, title=title, seconds_held=seconds, remove_files=remove_files, facts=True
        )
        if self._rentals.get(name) is None:
            # released while it was opened: a machine without a record here must not be held there
            machine.ask("leave", holder=holder)
        self._known(name)
        machine.instance_id = answer["instance_id"]
        self._opened[name] = machine
        for other in self._rentals.superseded(name, holder):
            # held by us by now, so nothing ends with this
            machine.ask("leave", holder=other)
            self._rentals.leave(name, other)
        return machine

    def find(self, name: str) -> RemoteMachine | None:
        """The machine of a record, opened but not held; None where there is no record."""
        known = self._rentals.get(name)
        if known is None or known.provider != self._provider:
            return None
        machine = self._machine(known)
        machine.instance_id = machine.ask("facts")["instance_id"]
        return machine

    def hold(self, name: str, holder: str, title: str, seconds: float) -> None:
        """Renew, here and there; there also where the disk here is full. MachineLost where it was released meanwhile."""
        if holder.endswith(KEPT):
            # no run holds it: without a record nothing would know of it
            self._rentals.hold(name, holder, title, seconds, alive=False)
        else:
            with even_unwritten(name):
                self._rentals.hold(name, holder, title, seconds)
        self._machine(self._known(name)).ask("hold", patient=False, holder=holder, title=title, seconds_held=seconds)

    def leave(self, name: str, holder: str, keep_seconds: float) -> int:
        """`holder` ends, or keeps the machine for `keep_seconds`; returns how many runs still hold it. May raise MachineLost."""
        known = self._rentals.get(name)
        if known is None:
            return 0
        machine, others = self._reach(known), [key for key in known.holders if key != holder]
        if machine is not None:
            answer = machine.ask(
                "leave", seconds=RELEASE_SECONDS, patient=False, holder=holder, keep_seconds=keep_seconds
            )
            others = [key for key in answer["holders"] if key != holder]
        if keep_seconds > 0:
            self._rentals.hold(
                name, holder, known.holders[holder].title if holder in known.holders else "", keep_seconds, False
            )
        elif not others:
            self._rentals.end(name, "released")
            self._forget(name)
        else:
            self._rentals.leave(name, holder)
        return len(others)

    def release(self, known: Rental) -> None:
        """End the jobs of all its holders. May raise MachineLost."""
        machine = self._reach(known)
        if machine is not None:
            machine.ask("release", seconds=RELEASE_SECONDS, patient=False)
        self._forget(known.name)

    def forget_holder(self, name: str, holder: str, how: str) -> None:
        """Remove `holder` from the record without asking the host; the record goes with the last holder."""
        left = self._rentals.leave(name, holder)
        if left is not None and not left.holders:
            self._rentals.end(name, how)
        self._forget(name)

    def _reach(self, known: Rental) -> RemoteMachine | None:
        """The machine of a record, to release it; None where its host has no workspace of that name: nothing ever ran there, and
        nothing is installed for a release."""
        if known.name in self._opened:
            return self._opened[known.name]
        reached = self._access(known)
        found = reached.probe()
        there = reached.connection.call(f"[ -d {quote([_workspace(found, known)])} ]")
        return self._machine(known, reached, found) if there.returncode == 0 else None

    def _machine(self, known: Rental, reached: Access | None = None, found: Probe | None = None) -> RemoteMachine:
        if known.name in self._opened:
            return self._opened[known.name]
        reached = reached or self._access(known)
        found = found or reached.probe()
        deployment = deploy(reached.connection, found, own_python=bool(reached.python))
        machine = RemoteMachine(
            name=known.name,
            provider=self._provider,
            connection=reached.connection,
            deployment=deployment,
            root=found.root,
            workspace=_workspace(found, known),
            price_per_hour=known.price_per_hour,
            instance_id="",
            lease_left=lambda: self._left(known.name),
        )
        self._opened[known.name] = machine
        return machine

    def _left(self, name: str) -> float:
        known = self._rentals.get(name)
        return known.lease_until - time.time() if known else 0.0

    def _forget(self, name: str) -> None:
        self._opened.pop(name, None)

    def _known(self, name: str) -> Rental:
        known = self._rentals.get(name)
        if known is None:
            raise MachineLost(f"the record of {name} is gone: it was released meanwhile; run the study again")
        return known


def _workspace(found: Probe, known: Rental) -> str:
    return f"{found.root}/machines/{known.name}"
