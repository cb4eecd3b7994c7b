"""Studies of other kinds that meet faults: on an SSH machine, as a child of a sweep, spread over parts.

Before it: `fault_case`. After it: `fault_suite`.
"""

from __future__ import annotations

import itertools
import sys

from outliers.counting.shards import is_here
from outliers.jobs import jobs
from outliers.machines.ssh import Host, Hosts
from outliers.publish.outcome import find_finished
from outliers.study.parts import Shard, machine_name, split
from outliers.workspace import Workspace
from tests.support.fault_case import Case
from tests.support.fault_home import until
from tests.support.fault_world import World
from tests.support.ssh_studies import ours


class SweepCase(Case):
    """The one study of a sweep, both of them runs of deployments."""

    kind = ", in a sweep"

    def begin(self) -> str:
        """Start the sweep; its run, not the study's, is the one that is watched and retried."""
        study = {"name": "one", "model": self.parameters["model"], "corpus": self.parameters["corpus"]}
        place = {"workspace": str(self.workspace.root), "publish_to": self.target}
        self.runs.append(self.home.start(self.home.sweep_id, {"study": [study], **place}))
        return self.run

    def all_runs(self) -> list[str]:
        return self.runs + [child for run in self.runs for child in self.home.children(run)]

    def back_at(self, step: str, since: str) -> bool:
        return self.home.state(self.run)["name"] == "Running"


class ShardsCase(Case):
    """A study in three parts on this computer; the second one meets the faults."""

    kind = ", a part of three"
    tasks = {"extract": "shard", "analyze": "shard"}  # noqa: RUF012 - a constant

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name, {"shards": 3})
        self.parts = split(self.study, 3)
        self.part = self.parts[1]
        self.place = self._place(self.part)

    def _place(self, part: Shard) -> Workspace:
        return Workspace(self.workspace.root / "shards" / f"{machine_name(self.study)}{part.suffix}")

    def places(self) -> tuple[Workspace, ...]:
        return tuple(self._place(part) for part in self.parts)

    def job_name(self, step: str) -> str:
        return self._job_of(self.part, step)

    def _job_of(self, part: Shard, step: str) -> str:
        return f"{super().job_name(step)}-{part.first}-{part.stop}"

    def hold(self, step: str) -> None:
        """As `Case`, with the other parts done; `merge`: with all of them done, and no results."""
        if step == "merge":
            process = self.home.flow_process(self.run)
            self.until(lambda: all(self._is_here(part) for part in self.parts), "all parts", 0.002)
            process.suspend()
            self._stopped.append(process)
            assert find_finished(self.study, self.workspace) is None, "held too late"
            return
        super().hold(step)
        if step != "sync":
            others = [part for part in self.parts if part != self.part]
            self.until(lambda: all(self._is_here(part) for part in others), "the other parts")

    def _is_here(self, part: Shard) -> bool:
        return is_here(part, self.study, self.workspace)

    def check_attempts(self) -> None:
        """Each job was started once, but those of the part that met the faults; there is no report among them."""
        for part, step in itertools.product(self.parts, ("extract", "analyze")):
            job = jobs.newest(self._place(part).root, self._job_of(part, step))
            due = 1 + self.again[step] * (part == self.part)
            assert job is not None
            assert job.attempt == due, f"{job.attempt} jobs did {step} of part {part.title}"


class RemoteCase(Case):
    """A study on an SSH machine, which is not on the network while `provision` is held."""

    kind = ", over ssh"

    def __init__(self, world: World, name: str) -> None:
        assert world.host is not None
        self.host = world.host
        compute = {"provider": "ssh", "host": self.host.alias, "machine": name, "upload_model": True}
        super().__init__(world, name, {**compute, "lease_seconds": 60, "grace_seconds": 0})
        Hosts(self.workspace.root).add(Host(self.host.alias, self.host.alias, python=sys.executable))
        self.place = Workspace(self.host.home / ".outliers" / "machines" / name)

    def __exit__(self, *stack: object) -> None:
        self.host.restore_host_key()
        self.host.start_sshd()
        super().__exit__(*stack)

    def pid(self, number: int) -> int:
        return self.host.host_pid(number)

    def release(self, step: str) -> None:
        if step == "provision":
            self.host.start_sshd()
        super().release(step)

    def check_nothing_is_left(self) -> None:
        super().check_nothing_is_left()
        until(lambda: not ours(self.host, self.name), "an end of all on the machine", explain=self.log)
