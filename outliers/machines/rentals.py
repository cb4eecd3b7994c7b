"""Records of rented machines, written on this computer before a machine is asked for, so that a crash forgets none.

    <workspace>/machines/<name>.json     one rental, while it may still cost something
    <workspace>/machines/history.jsonl   a line for each that has ended, with what it cost
    <workspace>/machines/lock            held while a record changes

Knows no provider.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeGuard, get_args

import psutil

from outliers.errors import DiskFull, OutliersError, WorkspaceError
from outliers.files.atomic import write_atomic
from outliers.files.private import make_private
from outliers.locks import held
from outliers.machines.base import Holder, Rental, RentalState

HISTORY = "history.jsonl"
KEPT = ".kept"
"""How the holder ends that --keep-running leaves: no run gives it up, only its time or `release`."""
RENEW_SECONDS = 60.0
"""At most this long between two renewals, and never more than a third of the lease."""
LEAST_SECONDS = 60.0
"""A lease that the budget pays no longer than this is not worth having: the budget is spent."""
ENDED_SECONDS = 120.0
"""From the end of a lease until its machine is gone: what ends it looks once a minute (`sky_engine.idle_minutes`)."""

_JOIN_SECONDS = 10.0
_log = logging.getLogger(__name__)


class Rentals:
    """The records of a workspace; any number of processes may use them at once. What changes a record raises DiskFull, or
    WorkspaceError, where it can't be written."""

    def __init__(self, workspace: Path) -> None:
        self.folder = workspace.expanduser().absolute() / "machines"

    def get(self, name: str) -> Rental | None:
        """The record of that name, or None. WorkspaceError where it can't be read."""
        path = self._path(name)
        try:
            return _parse(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IsADirectoryError) as error:
            raise WorkspaceError(
                f"{path} is not a record of a machine ({error}); look at the provider's own list, and remove the file"
            ) from error

    def all(self, provider: str | None = None) -> tuple[Rental, ...]:
        """Every record that can be read, by name; of one provider alone where it is named."""
        return tuple(rental for rental in self._read()[0] if provider in (None, rental.provider))

    def ever(self, provider: str) -> bool:
        """Whether anything was ever held or rented there, as far as this workspace knows."""
        if self.all(provider):
            return True
        return any(line.get("provider") == provider for line in self._history())

    def was_held(self, name: str) -> bool:
        """Whether a machine of that name is held, or was and has ended, as far as this workspace knows."""
        return self._path(name).exists() or any(line.get("name") == name for line in self._history())

    def _history(self) -> Iterator[dict[str, Any]]:
        """The lines of machines that have ended; one that a crash left torn is passed over."""
        with contextlib.suppress(FileNotFoundError):
            for text in (self.folder / HISTORY).read_text("utf-8", "replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    line = json.loads(text)
                    if isinstance(line, dict):
                        yield line

    def unreadable(self) -> tuple[str, ...]:
        """What is wrong with each record that can't be read, as sentences. It does not hide the others."""
        return tuple(self._read()[1])

    def _read(self) -> tuple[list[Rental], list[str]]:
        found: list[Rental] = []
        broken: list[str] = []
        for name in sorted(path.stem for path in self.folder.glob("*.json")):
            try:
                rental = self.get(name)
            except WorkspaceError as error:
                broken.append(str(error))
                continue
            if rental is not None:
                found.append(rental)
        return found, broken

    def begin(
        self, name: str, provider: str, place: str, price_per_hour: float, holder: str, title: str, seconds: float
    ) -> Rental:
        """The record of a machine that is about to be asked for, held from now on. One that is there is held on, and keeps
        its beginning; its place and price are those given."""
        with self._changing():
            return self._begin(name, provider, place, price_per_hour, holder, title, seconds)

    def begin_at_one(
        self, name: str, provider: str, places: Mapping[str, float], holder: str, title: str, seconds: float
    ) -> Rental:
        """As `begin`, at one of `places` (their prices an hour): the cheapest, of equal prices the one with the fewest
        records, then by name. Chosen and written under one lock: runs that choose at the same time don't all choose the same. A
        machine that is recorded at one of them meanwhile is held on."""
        with self._changing():
            known, taken = self.get(name), [rental.place for rental in self.all(provider)]
            if known is not None and known.provider == provider and known.place in places:
                place = known.place
            else:
                place = min(places, key=lambda one: (places[one], taken.count(one), one))
            return self._begin(name, provider, place, places[place], holder, title, seconds)

    def _begin(
        self, name: str, provider: str, place: str, price_per_hour: float, holder: str, title: str, seconds: float
    ) -> Rental:
        now, known = time.time(), self.get(name)
        holders = dict(known.holders) if known else {}
        holders[holder] = Holder(title, now + seconds, this_process())
        until = max(one.until for one in holders.values())
        since, state = (known.since, known.state) if known else (now, "launching")
        made = Rental(name, provider, place, state, price_per_hour, since, until, holders)
        self._write(made)
        return made

    def hold(self, name: str, holder: str, title: str, seconds: float, alive: bool = True) -> Rental | None:
        """Records that `holder` needs it for `seconds` from now; `alive`: this process renews it. None
        without a record."""
        return self._change(name, holder, Holder(title, time.time() + seconds, this_process() if alive else ""))

    @contextlib.contextmanager
    def renewed(
        self, name: str, holder: str, title: str, seconds: float, then: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Renew the record while the block runs and this process lives: what is being made may take longer
        than its lease, and must not be taken for forgotten meanwhile. A record that is gone is not made again. `then`: what
        else renewing takes, called each time."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(min(RENEW_SECONDS, seconds / 3)):
                try:
                    self.hold(name, holder, title, seconds)
                    then()
                except OutliersError as error:
                    _log.warning("%s could not be renewed: %s", name, error)

        thread = threading.Thread(target=renew, name=f"record-{name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            # one that hangs on a dead line must not hold a cancel up
            thread.join(_JOIN_SECONDS)

    def superseded(self, name: str, holder: str) -> tuple[str, ...]:
        """Holders that `holder` makes needless: killed runs of this computer, and ended ones of the same study."""
        known = self.get(name)
        if known is None:
            return ()
        study = holder.partition(".")[0]
        return tuple(
            key
            for key, one in known.holders.items()
            if key != holder
            and not key.endswith(KEPT)
            and (_is_dead(one.process) if one.process else key.partition(".")[0] == study)
        )

    def leave(self, name: str, holder: str) -> Rental | None:
        """Notes that `holder` needs it no longer; what is left of it, or None where there is no record."""
        return self._change(name, holder, None)

    def mark(self, name: str, state: RentalState, unless: RentalState | None = None, **changes: Any) -> Rental | None:
        """Notes a new state, and other fields; None, and nothing changed, where there is no record, or its state is `unless`."""
        with self._changing():
            known = self.get(name)
            if known is None or known.state == unless:
                return None
            made = replace(known, state=state, **changes)
            self._write(made)
            return made

    def take_overdue(self, name: str) -> Rental | None:
        """Records that a machine past its lease is being released: decided and written under one lock. None where it need not
        be released: it was taken again meanwhile, or has ended."""
        with self._changing():
            known = self.get(name)
            if known is None or not known.is_over(time.time()):
                return None
            made = replace(known, state="releasing")
            self._write(made)
            return made

    def end(self, name: str, how: str, since: float | None = None, latest: float = math.inf) -> None:
        """The machine is gone: its record becomes a line of the history. May be repeated.

        since: of the machine that is meant; another that has got its name meanwhile stays. latest: when it was gone at the
        latest (`gone_by`), where that was noticed long after: what it cost ends then.
        """
        with self._changing():
            known = self.get(name)
            if known is None or since not in (None, known.since):
                return
            ended = min(time.time(), latest)
            line = asdict(known) | {"ended": ended, "how": how, "spent": round(known.spent(ended), 4)}
            append_line(self.folder / HISTORY, json.dumps(line))
            self._path(name).unlink(missing_ok=True)

    def spent(self, name: str) -> float:
        """Dollars that machines of that name have cost, ended ones included, until now."""
        known = self.get(name)
        ended = [line.get("spent") for line in self._history() if line.get("name") == name]
        total = sum(spent for spent in ended if is_number(spent) and spent > 0)
        return total + (known.spent(time.time()) if known else 0.0)

    def paid_seconds(self, name: str, most: float | None, price_per_hour: float) -> float:
        """How long `most` dollars in all still pay for a machine of that name; infinite without a limit or
        a price."""
        if most is None or not price_per_hour:
            return math.inf
        return max(0.0, most - self.spent(name)) / price_per_hour * 3600

    def _change(self, name: str, holder: str, entry: Holder | None) -> Rental | None:
        with self._changing():
            known = self.get(name)
            if known is None:
                return None
            holders = {key: value for key, value in known.holders.items() if key != holder}
            if entry is not None:
                holders[holder] = entry
            until = max((one.until for one in holders.values()), default=time.time())
            made = replace(known, holders=holders, lease_until=until)
            self._write(made)
            return made

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            make_private(self.folder.parent)
            self.folder.mkdir(exist_ok=True)
            with held(self.folder / "lock"):
                yield
        except OSError as error:
            kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else WorkspaceError
            raise kind(f"the records of machines in {self.folder} can't be written: {error}") from error

    def _write(self, rental: Rental) -> None:
        write_atomic(self._path(rental.name), json.dumps(asdict(rental), indent=1).encode())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


@contextlib.contextmanager
def even_unwritten(name: str) -> Iterator[None]:
    """Around a change of a record, where what follows must happen even if the record can't be written: that is only logged."""
    try:
        yield
    except OutliersError as error:
        _log.warning("the record of %s stays as it was: %s", name, error)


def gone_by(known: Rental) -> float:
    """When a machine that is not there any more was gone at the latest: its lease ended it, if nothing else did before."""
    return known.lease_until + ENDED_SECONDS


def append_line(path: Path, line: str) -> None:
    """A line of its own, also after one that a crash or a full disk left torn."""
    with path.open("ab+") as file:
        torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * torn + line.encode() + b"\n")


def this_process() -> str:
    """An identity of this process that no other has, on this or another computer, now or earlier."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.2f}"


def _is_dead(process: str) -> bool:
    """Whether a process of this computer is gone; one of another is taken for alive."""
    try:
        host, pid, created = process.rsplit(" ", 2)
        if host != socket.gethostname():
            return False
        return f"{psutil.Process(int(pid)).create_time():.2f}" != created
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return True  # also where it is not the identity of a process: a living process writes its own again


def _parse(record: dict[str, Any]) -> Rental:
    """The rental of a record; ValueError, KeyError or TypeError where it is not one.

    A record with impossible times is not valid either, since no comparison would ever find its lease over: whoever reads it
    gets the error, and `reap` fails, until a person has looked.
    """
    holders = {key: Holder(**value) for key, value in record.pop("holders").items()}
    rental = Rental(**record, holders=holders)
    texts = (
        rental.name,
        rental.provider,
        rental.place,
        *(text for one in holders.values() for text in (one.title, one.process)),
    )
    if not all(isinstance(text, str) for text in texts) or rental.state not in get_args(RentalState):
        raise TypeError("a name, a place or a state is not valid")
    numbers = (rental.price_per_hour, rental.since, rental.lease_until, *(one.until for one in holders.values()))
    if not all(is_number(number) for number in numbers) or rental.price_per_hour < 0:
        raise ValueError("a time or a price is not a number")
    return rental


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value that JSON held is a finite number."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
