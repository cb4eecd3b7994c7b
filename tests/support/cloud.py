"""An engine of provider `sky` without SkyPilot: what it rents are folders of one host of the tests, reached by a real ssh.

It does what `sky_engine` promises (a machine by its name, an end by itself, one that is gone stays gone) and keeps what it
was asked. Its catalog is a list of rows that the real `select` chooses from.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from dataclasses import replace

from outliers.errors import MachineLost, PlanRefused
from outliers.hardware import GB
from outliers.machines import catalog, lease
from outliers.machines.catalog import Row
from outliers.machines.connection import Connection
from outliers.machines.sky import SkyProvider
from outliers.machines.sky_engine import Cluster
from outliers.machines.ssh_leases import Access

ROWS = (
    Row("cheap", "here", "small", 4, 16 * GB, 2.0),
    Row("dear", "there", "large", 8, 64 * GB, 6.0),
)


class Cloud:
    """`asked`: every call that changes something, with its argument. `ends`: when each machine ends by itself. `looked`: how
    often the list of all was asked for. `slow`: who doesn't wait for an end leaves the machine there for now."""

    def __init__(self, box, workspace) -> None:
        self.box = box
        self.rows = ROWS
        self.clusters: dict[str, Cluster] = {}
        self.ends: dict[str, float] = {}
        self.asked: list[tuple[str, object]] = []
        self.sold_out: set[str] = set()
        self.while_launching = lambda: None
        self.renewing = lambda: None
        self.ended = lambda name: None
        self.looking = lambda: None
        self.looked = 0
        self.slow = False
        self.workspace = workspace

    def provider(self) -> SkyProvider:
        """As a new process has it."""
        return SkyProvider(self.workspace, self, self.candidates, self.reached)

    def candidates(self, request):
        return catalog.select(self.rows, request)

    def reached(self, name: str) -> Access:
        return Access(Connection("box"), f"clouds/{name}", sys.executable)

    def folder(self, name: str):
        return self.box.home / "clouds" / name

    def names(self, what: str) -> list[object]:
        """The arguments of all calls of one kind."""
        return [argument for verb, argument in self.asked if verb == what]

    # what `sky_engine` has

    def launch(self, name, wanted, seconds, say=None):
        self.asked.append(("launch", wanted.offer.name))
        self.while_launching()
        if wanted.row.cloud in self.sold_out:
            raise PlanRefused(f"{wanted.row.cloud} has none left")
        self.ends[name] = time.time() + seconds
        self.clusters[name] = Cluster(
            name, "up", wanted.row.price_per_hour, time.time(), 30, True, wanted.row.cloud, wanted.row.region
        )
        return self.clusters[name]

    def write_ssh_entry(self, name):
        self.asked.append(("ssh", name))

    def renew(self, name, seconds):
        self.asked.append(("renew", name))
        self.renewing()
        if name not in self.clusters:
            raise MachineLost(f"no {name}")
        self.ends[name] = time.time() + seconds

    def down(self, name, wait=True):
        self.asked.append(("down", name))
        if self.slow and not wait:
            return
        if self.clusters.pop(name, None) is not None and self.folder(name).exists():
            self.switch_off(name)
        self.ended(name)

    def switch_off(self, name):
        """A rented machine's processes are gone with it: its watchdog must not write into what is being removed."""
        workspace = self.folder(name) / "machines" / name
        lease.release(workspace)
        with (workspace / "watchdog.lock").open("ab") as lock:
            # the one that runs looks again and goes; one that has only been started finds this lock, or nothing at all
            fcntl.flock(lock, fcntl.LOCK_EX)
            gone = self.folder(name).with_name(f"{name}.gone")
            self.folder(name).rename(gone)
        shutil.rmtree(gone)

    def status(self, name, refresh=True):
        found = self.clusters.get(name, Cluster(name, "gone"))
        self.looking()
        return found

    def list_clusters(self, refresh=True):
        self.looked += 1
        return tuple(self.clusters[name] for name in sorted(self.clusters))

    def change(self, name, **changes):
        """What the cloud does by itself."""
        self.clusters[name] = replace(self.clusters[name], **changes)
