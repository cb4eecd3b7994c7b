"""Provider `ssh`: hosts that the user names, through the user's own ssh configuration.

    outliers machines add lab1 user@host
    outliers study --provider ssh ...                  the cheapest added host that fits
    outliers study --provider ssh --host user@host     this one

A study gets a workspace of its own on the host, below `~/.outliers/machines/<name>`, and a lease: when it is not renewed, a
watchdog there ends the study's processes. The host itself is the user's and is never ended.
"""

from __future__ import annotations

import json
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outliers.errors import BadInput, DeployFailed, HostRefused, JobFailed, MachineLost, PlanRefused, WorkspaceError
from outliers.files.atomic import write_atomic
from outliers.files.private import file_mode, make_private
from outliers.machines.answers import parse_answer
from outliers.machines.base import NOT_AMONG, Excluded, Machine, MachineRequest, Offer, Rental, fits
from outliers.machines.connection import Connection, quote
from outliers.machines.deploy import deploy
from outliers.machines.rentals import Rentals, even_unwritten, gone_by
from outliers.machines.ssh_leases import Access, SshLeases
from outliers.untrusted.bounds import PATH_CHARS
from outliers.untrusted.visible import visible_line

NAME = "ssh"
DEFAULT_FOLDER = ".outliers"
HOSTS = "hosts.json"
MOST_ASKED = 16
"""Hosts that are asked at once what they have."""
QUESTION_SECONDS = 600.0
"""A host with many captures counts their files."""

_log = logging.getLogger(__name__)
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Host:
    """A host that the user named. `folder`: where our files go, relative to the home there. `python`: an interpreter that has
    all that is needed, used as it is; "" makes an environment. `price_per_hour`: dollars, where the user pays for it."""

    name: str
    destination: str
    folder: str = DEFAULT_FOLDER
    python: str = ""
    price_per_hour: float = 0.0


class Hosts:
    """The hosts of a workspace, by name."""

    def __init__(self, workspace: Path) -> None:
        self._path = workspace.expanduser().absolute() / HOSTS

    def all(self) -> tuple[Host, ...]:
        """Every host, by name. WorkspaceError where the file can't be read."""
        try:
            content = json.loads(self._path.read_bytes())
            return tuple(Host(**content[name]) for name in sorted(content))
        except FileNotFoundError:
            return ()
        except (ValueError, TypeError, AttributeError) as error:
            raise WorkspaceError(
                f"{self._path} can't be read ({error}): mend or remove it, and add the hosts again"
            ) from error

    def get(self, name: str) -> Host | None:
        """The host of that name."""
        return next((host for host in self.all() if host.name == name), None)

    def add(self, host: Host) -> None:
        """Remember a host; one of that name is replaced. BadInput for a name that can't be."""
        self.check(host)
        self._write({known.name: known for known in self.all()} | {host.name: host})

    def check(self, host: Host) -> None:
        """BadInput for a name that can't be."""
        if not _HOST_NAME.fullmatch(host.name):
            raise BadInput(
                f"'{visible_line(host.name)}' is not a valid name for a host: letters, digits, . _ - and at most 64 of them"
            )
        for option, text in (("--folder", host.folder), ("--python", host.python)):
            if text != visible_line(text, PATH_CHARS):
                raise BadInput(
                    f"{option} '{visible_line(text)}' can't be the name of a file: it has control characters"
                )

    def remove(self, name: str) -> bool:
        """Forget a host; whether it was known."""
        kept = {host.name: host for host in self.all() if host.name != name}
        known = len(kept) < len(self.all())
        self._write(kept)
        return known

    def _write(self, hosts: dict[str, Host]) -> None:
        make_private(self._path.parent)
        data = json.dumps({name: asdict(host) for name, host in hosts.items()}, indent=1).encode()
        write_atomic(self._path, data, file_mode(self._path.parent))


def access(host: Host) -> Access:
    """How a host is reached."""
    return Access(Connection(host.destination), host.folder, host.python)


def ask_host(workspace: Path, name: str, verb: str, **request: Any) -> dict[str, Any]:
    """One question to a host about everything below its folder; the answer as `answers.parse_answer` gives it."""
    host = Hosts(workspace).get(name) or Host(name, name)
    reached = access(host)
    found = reached.probe()
    python = deploy(reached.connection, found, own_python=bool(reached.python)).python
    command = quote([*python, "-m", "outliers.machines.agent", f"{found.root}/machines", verb])
    done = reached.connection.call(command, json.dumps(request).encode(), QUESTION_SECONDS)
    return parse_answer(verb, done.returncode, done.stdout, done.stderr, host.destination)


def _look(host: Host, request: MachineRequest) -> Offer | Excluded:
    """What a host offers, or why it doesn't fit; raises where the one that was asked for by name does not answer."""
    try:
        found = access(host).probe()
    except (HostRefused, MachineLost, DeployFailed, JobFailed) as error:
        if request.host:
            raise
        return Excluded(host.name, str(error))
    reasons = [*fits(found.facts, request)]
    if request.max_price is not None and host.price_per_hour > request.max_price:
        reasons.append(f"${host.price_per_hour:g} an hour, and at most ${request.max_price:g} is allowed (--max-price)")
    if reasons:
        return Excluded(host.name, "; ".join(reasons))
    return Offer(NAME, host.name, found.facts, host.price_per_hour)


class SshProvider:
    """The user's hosts; `workspace` is this computer's, with their names and the records of what is held."""

    def __init__(self, workspace: Path) -> None:
        self._hosts = Hosts(workspace)
        self._rentals = Rentals(workspace)
        self._leases = SshLeases(NAME, self._rentals, lambda rental: access(self._named(rental.place)))

    def offers(self, request: MachineRequest) -> tuple[tuple[Offer, ...], tuple[Excluded, ...]]:
        hosts = self._candidates(request)
        # at once: one that is down takes as long as a connection may
        with ThreadPoolExecutor(min(len(hosts), MOST_ASKED)) as pool:
            looked = list(pool.map(lambda host: _look(host, request), hosts))
        offers = [found for found in looked if isinstance(found, Offer)]
        excluded = [found for found in looked if isinstance(found, Excluded)]
        busy = [rental.place for rental in self._rentals.all(NAME)]
        # of equal prices the least busy: parts of one study are spread over hosts
        offers.sort(key=lambda offer: (offer.price_per_hour, busy.count(offer.name), offer.name))
        return tuple(offers), tuple(excluded)

    def ensure(self, name: str, request: MachineRequest, holder: str, title: str) -> Machine:
        places = self._places_for(name, request)
        # recorded first: whatever happens from here on, the host is known
        self._rentals.begin_at_one(name, NAME, places, holder, title, request.lease_seconds)
        try:
            # an environment may take longer to install than the lease lasts
            with self._rentals.renewed(name, holder, title, request.lease_seconds):
                machine = self._leases.open(name, holder, title, request.lease_seconds, request.remove_files)
        except (HostRefused, DeployFailed):
            # nothing of this study runs there
            self._leases.forget_holder(name, holder, "refused")
            raise
        self._rentals.mark(name, "up")
        return machine

    def find(self, name: str) -> Machine | None:
        return self._leases.find(name)

    def list(self) -> tuple[Rental, ...]:
        return self._rentals.all(NAME)

    def hold(self, name: str, holder: str, title: str, seconds: float) -> None:
        self._leases.hold(name, holder, title, seconds)

    def leave(self, name: str, holder: str, keep_seconds: float = 0, wait: bool = True) -> str:
        others = self._leases.leave(name, holder, keep_seconds)
        if keep_seconds > 0:
            return f"{name} is kept for {keep_seconds / 60:.0f} minutes more"
        return f"{name} is still held by {others} other runs" if others else f"{name} is released"

    def release(self, name: str) -> str:
        known = self._rentals.get(name)
        if known is None:
            return f"{name} is not held: there is nothing to release"
        with even_unwritten(name):
            self._rentals.mark(name, "releasing")
        try:
            self._leases.release(known)
        except (MachineLost, HostRefused, DeployFailed, JobFailed) as error:
            if not known.is_over(time.time()):
                raise
            # the watchdog there has ended all of it, or the host is down, or another one now
            self._rentals.end(name, "its lease ended", known.since, gone_by(known))
            return f"{name}: its lease is over, and {known.place} could not be asked ({error})"
        self._rentals.end(name, "released", known.since)
        return f"{name} on {known.place} is released, its jobs are ended"

    def _candidates(self, request: MachineRequest) -> tuple[Host, ...]:
        if request.host:
            return (self._named(request.host),)
        known = self._hosts.all()
        if not known:
            raise PlanRefused(
                "no host is known: name one (--host user@host), or add one: outliers machines add NAME user@host"
            )
        return known

    def _named(self, name: str) -> Host:
        """An added host, or whatever `ssh` understands by that name."""
        return self._hosts.get(name) or Host(name, name)

    def _places_for(self, name: str, request: MachineRequest) -> dict[str, float]:
        """The host that has the machine of that name already, if it answers; else all that fit: name -> price an hour."""
        known = self._rentals.get(name)
        if known is not None and known.provider == NAME:
            host = self._named(known.place)
            if request.host in (None, known.place, host.destination) and not self._may_replace(request):
                return {host.name: host.price_per_hour}
            try:
                access(host).probe()
            except MachineLost as error:
                _log.warning("%s, which has %s, is lost (%s): another host is used", known.place, name, error)
                self._rentals.end(name, "lost", known.since, gone_by(known))
            else:
                if request.host in (None, known.place, host.destination):
                    return {host.name: host.price_per_hour}
                raise BadInput(
                    f"{name} is on {known.place} until its lease ends, and --host says {request.host}: release it first "
                    f"(outliers machines release {name}), or leave --host out"
                )
        found, excluded = self.offers(request)
        offers = [offer for offer in found if not request.among or offer.name in request.among]
        if not offers:
            left_out = (Excluded(offer.name, NOT_AMONG) for offer in found)
            raise PlanRefused(
                "no host fits: " + "; ".join(f"{item.name}: {item.reason}" for item in (*excluded, *left_out))
            )
        return {offer.name: offer.price_per_hour for offer in offers}

    def _may_replace(self, request: MachineRequest) -> bool:
        """Whether a host that doesn't answer leaves another one to go to."""
        return request.host is not None or len(self._hosts.all()) > 1
