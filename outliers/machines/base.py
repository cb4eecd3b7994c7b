"""The protocols of machines and their providers: what a study asks for, what a machine has, and whether the two fit.

No cloud, no ssh, no study and no I/O. `fits` is the one place where a machine is refused, the same for this computer and for
a rented one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from outliers.errors import BadInput
from outliers.events.event import Event
from outliers.hardware import GB, Facts, Gpu, is_named_like
from outliers.jobs.jobs import JobHandle, JobSpec, Status
from outliers.machines.lease import MAX_SECONDS, SLACK_SECONDS
from outliers.units import in_gb
from outliers.untrusted.bounds import RECEIVED_BYTES, RECEIVED_FILES

if TYPE_CHECKING:
    from outliers.spec import (
        ComputeSpec,  # pydantic, which an agent that answers in a tenth of a second has no time for
    )


@dataclass(frozen=True, slots=True)
class MachineRequest:
    """What a machine must have; None or 0: no demand.

    `gpu_count`: None takes whatever is there, 0 uses none. `min_...`: what the user asked for, against totals (the
    disk: against what is free). `needed_...`: what the study takes by its plan, against what is free now.
    `max_price`: dollars an hour of the whole machine, `max_total_price`: in all. `region`: of a cloud. `host`: one of the
    user's own, by name. `among`: names of offers, others are left alone; () for any. `lease_seconds`: a machine
    ends by itself this long after the last renewal, with `remove_files` and the files on it. `fits` does not look at these.
    """

    gpu_count: int | None = None
    gpu_filter: str | None = None
    min_vram_bytes: int = 0
    min_ram_bytes: int = 0
    min_disk_bytes: int = 0
    needed_ram_bytes: int = 0
    needed_disk_bytes: int = 0
    max_price: float | None = None
    max_total_price: float | None = None
    region: str | None = None
    host: str | None = None
    lease_seconds: int = 1_800
    remove_files: bool = False
    among: tuple[str, ...] = ()

    @classmethod
    def from_spec(cls, compute: ComputeSpec, needed_ram_bytes: int = 0, needed_disk_bytes: int = 0) -> MachineRequest:
        """The request of a spec and of what its plan came to; BadInput where it wants no GPU and a kind of GPU."""
        if compute.gpu_count == 0 and (compute.gpu_filter or compute.min_vram):
            raise BadInput(
                "--gpu-count 0 uses no GPU, but --gpu-filter or --min-vram asks for one: leave one of them out"
            )
        return cls(
            gpu_count=compute.gpu_count,
            gpu_filter=compute.gpu_filter,
            min_vram_bytes=_bytes(compute.min_vram),
            min_ram_bytes=_bytes(compute.min_cpu_ram),
            min_disk_bytes=_bytes(compute.disk),
            needed_ram_bytes=needed_ram_bytes,
            needed_disk_bytes=needed_disk_bytes,
            max_price=compute.max_price,
            max_total_price=compute.max_total_price,
            region=compute.region,
            host=compute.host,
            remove_files=compute.remove_files,
            lease_seconds=compute.lease_seconds,
        )


def _bytes(gb: float | None) -> int:
    return round((gb or 0) * GB)


@dataclass(frozen=True, slots=True)
class Offer:
    """A machine that fits; `price_per_hour` in dollars, of the whole machine."""

    provider: str
    name: str
    facts: Facts
    price_per_hour: float


@dataclass(frozen=True, slots=True)
class Excluded:
    """A machine that doesn't fit; `reason` carries what was asked and what there is."""

    name: str
    reason: str


NOT_AMONG = "it does not hold the study, or for too much (`outliers plan` says why)"
"""The reason of an offer that fits and is not among those that were chosen for a study."""


@dataclass(frozen=True, slots=True)
class Completed:
    """How a short command ended; `returncode` is minus the signal's number where one ended it."""

    returncode: int
    stdout: str
    stderr: str


class Machine(Protocol):
    """A machine one can work on. Every call but `start` may be repeated; all may raise MachineLost."""

    @property
    def name(self) -> str:
        """Unique within its provider."""

    @property
    def provider(self) -> str:
        """The provider's name."""

    @property
    def instance_id(self) -> str:
        """Changes whenever the workspace's disk is another one: what was cached for the old one is gone."""

    @property
    def price_per_hour(self) -> float:
        """In dollars, of the whole machine."""

    @property
    def python(self) -> tuple[str, ...]:
        """The beginning of a command line: the interpreter that has this package."""

    @property
    def workspace(self) -> str:
        """The full path of the workspace on that machine."""

    @property
    def shared(self) -> str:
        """The full path of a folder there for what several workspaces use."""

    @property
    def provenance(self) -> Mapping[str, str | int | float]:
        """What a manifest may say of it: no host, no path."""

    def facts(self) -> Facts:
        """What it has now."""

    def run(self, argv: Sequence[str], timeout_seconds: float) -> Completed:
        """Runs a short command to its end, whatever its exit code; JobFailed if it can't be run or takes longer."""

    def upload(self, local: Path, remote: str) -> None:
        """Copies a file or folder to `remote`, relative to the workspace or full; files appear whole or not at all."""

    def download(
        self,
        remote: str,
        local: Path,
        *,
        max_bytes: int = RECEIVED_BYTES,
        max_files: int = RECEIVED_FILES,
        names: Collection[str] | None = None,
    ) -> None:
        """The way back of `upload`: plain files alone; BadInput where there is nothing at `remote`.

        `names`: of a folder only these files, relative to it, as far as they are there. JobFailed for more than `max_bytes` in
        `max_files` files: then nothing of it stays.
        """

    def start(self, job: JobSpec) -> JobHandle:
        """Starts a detached job, or finds the one of that name that still runs."""

    def follow(self, handle: JobHandle, offset: int = 0) -> Iterator[Event]:
        """Its events from byte `offset` on, until it has ended; `Event.end` is where to go on after a break."""

    def status(self, handle: JobHandle) -> Status:
        """Whether it runs, or how it ended."""

    def result(self, handle: JobHandle) -> None:
        """Waits for its end; raises what it raised (`jobs.result`)."""

    def cancel(self, handle: JobHandle, grace_seconds: float = 10.0) -> Status:
        """Ends it and all its processes."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A run that needs a machine until `until` (unix seconds). `process`: the one that renews it, as `rentals` names it; ""
    where none does, because the run has ended and the machine waits for its retry, or is kept."""

    title: str
    until: float
    process: str = ""


RentalState = Literal["launching", "up", "releasing", "lost"]


@dataclass(frozen=True, slots=True)
class Rental:
    """A machine that is held or rented now, as its record on this side says; all times in unix seconds.

    `place`: user@host, or cloud and region. `since`: when it was asked for, from which on it may cost. `lease_until`: when
    it ends by itself. `price_per_hour`: dollars, of the whole machine. `holders`: runs that need it, by their ids.
    """

    name: str
    provider: str
    place: str
    state: RentalState
    price_per_hour: float
    since: float
    lease_until: float
    holders: Mapping[str, Holder]

    def spent(self, now: float) -> float:
        """Dollars since it was asked for."""
        return self.price_per_hour * max(0.0, now - self.since) / 3600

    def is_over(self, now: float) -> bool:
        """Whether it was not renewed in time. A time that no lease reaches (the clock was set back, the record is damaged)
        counts as over too: else nothing would ever end the machine."""
        left = self.lease_until - now
        # infinite: it has no record here, and its provider's own timer ends it
        return left <= 0 or MAX_SECONDS + SLACK_SECONDS < left < math.inf


class Provider(Protocol):
    """Where machines come from."""

    def offers(self, request: MachineRequest) -> tuple[tuple[Offer, ...], tuple[Excluded, ...]]:
        """What fits, cheapest first, and what doesn't, with the reasons; costs nothing."""

    def ensure(self, name: str, request: MachineRequest, holder: str, title: str) -> Machine:
        """The machine of that name, found or made, held by `holder` for request.lease_seconds from now on.

        Its record is written before anything is asked for. `holder`: STUDY.RUN; what is left of killed and failed runs of
        the same study gives way to it. PlanRefused, with every reason, where none fits.
        """

    def find(self, name: str) -> Machine | None:
        """The machine of that name, if there is one; makes none."""

    def list(self) -> tuple[Rental, ...]:
        """What is held or rented now, asked of the provider where it knows more than the records do."""

    def hold(self, name: str, holder: str, title: str, seconds: float) -> None:
        """Renews: the machine does not end by itself for `seconds` from now. May raise MachineLost."""

    def leave(self, name: str, holder: str, keep_seconds: float = 0, wait: bool = True) -> str:
        """The run `holder` is over. With `keep_seconds` the machine stays that long for it; without, it is released if no
        other run holds it. Without `wait` that is only asked for. May be repeated; returns a sentence of what was done."""

    def release(self, name: str) -> str:
        """Ends a machine, even if others hold it; returns a sentence that says what was done."""


def fits(facts: Facts, request: MachineRequest) -> tuple[str, ...]:
    """Every reason why `request` can't be met by a machine with `facts`, each with both numbers; empty: it fits."""
    demands = (
        ("{asked} of memory asked (--min-cpu-ram), the machine has {has}", request.min_ram_bytes, facts.ram_bytes),
        ("the study needs {asked} of memory, {has} is free", request.needed_ram_bytes, facts.ram_available_bytes),
        ("{asked} of free disk asked (--disk), {has} is free", request.min_disk_bytes, facts.disk_free_bytes),
        ("the study needs {asked} of disk, {has} is free", request.needed_disk_bytes, facts.disk_free_bytes),
    )
    short = [_with_amounts(text, asked, has) for text, asked, has in demands if has < asked]
    return (*_gpu_reasons(facts.gpus, request), *short)


def _gpu_reasons(gpus: tuple[Gpu, ...], request: MachineRequest) -> list[str]:
    particular = bool(request.gpu_filter or request.min_vram_bytes)
    # Without a count a kind of GPU was asked for all the same: one of them is the least.
    wanted = request.gpu_count if request.gpu_count is not None else int(particular)
    if not wanted:
        return []
    named = [gpu for gpu in gpus if is_named_like(gpu.name, request.gpu_filter)]
    if len(named) < wanted:
        kind = f" named like '{request.gpu_filter}' (--gpu-filter)" if request.gpu_filter else ""
        present = ", ".join(gpu.name for gpu in gpus) or "none"
        return [f"{wanted} GPU{'s' * (wanted > 1)}{kind} asked, the machine has {len(named)} (its GPUs: {present})"]
    large = sorted((gpu.total_bytes for gpu in named), reverse=True)
    if large[wanted - 1] < request.min_vram_bytes:
        which = "the largest" if wanted == 1 else f"the smallest of the {wanted} largest"
        text = f"{wanted} GPU{'s' * (wanted > 1)} with {{asked}} each asked (--min-vram), {which} has {{has}}"
        return [_with_amounts(text, request.min_vram_bytes, large[wanted - 1])]
    return []


def _with_amounts(text: str, asked: int, has: int) -> str:
    """`text` with both amounts of bytes in the place of {asked} and {has}."""
    needed, there = in_gb(asked, has)
    return text.format(asked=needed, has=there)
