"""What can be rented, and for how much: SkyPilot's catalog as offers, the cheapest that fits first.

Knows no cluster and starts nothing: `read_rows` reads the catalog (CSV files that SkyPilot keeps, and fetches when they
are hours old), `select` is arithmetic on what it read. `import sky` takes seconds, so it happens inside functions.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from outliers.errors import BadInput, PlanRefused
from outliers.hardware import GB, Facts, Gpu, is_named_like
from outliers.machines.base import Excluded, MachineRequest, Offer, fits
from outliers.units import clip

PROVIDER = "sky"
USAGE_VARIABLE = "SKYPILOT_DISABLE_USAGE_COLLECTION"

DISK_MARGIN_BYTES = 60 * GB
"""What the image of a cloud's GPU machine (up to 45 GB on AWS) and our environment with a CUDA torch (8 GB) take."""
LEAST_DISK_GB = 100
MAX_MISSES = 10

_GIB = 1 << 30
_PULL_HOURS = 7  # as SkyPilot's own modules: it fetches a catalog again after that
# Asked of the cluster itself: no prices, and no machines without GPUs.
_OWN_CATALOGS = frozenset({"kubernetes", "slurm", "ssh"})
_OTHER_ARCH = ("arm64", "arm64_mac", "x86_64_mac")
_NO_CUDA = re.compile(r"tpu|trainium|inferentia|gaudi|radeon|mi\d|hl-\d|ai100|xilinx|u30", re.IGNORECASE)
_GCP_HOSTS = re.compile(r"[ag]\d+-")
_SIZED = re.compile(r"-(\d+)GB\b", re.IGNORECASE)

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of machine in one region at its on-demand price, in the units of this project.

    `instance_type`: empty on a cluster that makes machines to measure (Slurm). `gpu_count`: 0 without GPUs, of which all
    are alike. `ram_bytes`: the machine's.
    """

    cloud: str
    region: str
    instance_type: str
    cpus: int
    ram_bytes: int
    price_per_hour: float
    gpu: Gpu | None = None
    gpu_count: int = 0

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        return (self.gpu,) * self.gpu_count if self.gpu else ()

    @property
    def kind(self) -> tuple[str, str, str, int]:
        """What it is, wherever it is."""
        return (self.cloud, self.instance_type, self.gpu.name if self.gpu else "", self.gpu_count)

    @property
    def name(self) -> str:
        """Unique in a catalog: the type, with the GPUs where it does not name them."""
        loose = self.gpu and (self.cloud == "gcp" or not self.instance_type)
        gpus = f"{self.gpu.name}:{self.gpu_count}" if self.gpu and loose else ""
        return " ".join(word for word in (self.cloud, self.region, self.instance_type, gpus) if word)

    @property
    def order(self) -> tuple[float, str, str, str, str, int]:
        """Cheapest first, and no two alike."""
        return (self.price_per_hour, self.cloud, self.region, *self.kind[1:])


@dataclass(frozen=True, slots=True)
class Candidate:
    """A machine that fits, and what it takes to ask for it. `disk_gb`: of the whole disk, as SkyPilot counts (2^30)."""

    offer: Offer
    row: Row
    disk_gb: int
    max_price: float | None


def import_sky() -> Any:
    """SkyPilot, with its usage collection off here, in its server where this process starts it, and in every request; its log
    goes to standard error, where standard output is for the one object of --json. BadInput where it is not installed.
    """
    os.environ[USAGE_VARIABLE] = "1"
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import sky
    except ImportError as error:
        raise BadInput(
            f"renting machines needs SkyPilot, which can't be imported ({error}): pip install 'outlier-features[sky]'"
        ) from error
    finally:
        # one of its modules configures the root logger on import: every line would be said twice from then on
        root.handlers[:] = handlers
        root.setLevel(level)
    return sky


def candidates(
    request: MachineRequest, clouds: Sequence[str] | None = None
) -> tuple[tuple[Candidate, ...], tuple[Excluded, ...]]:
    """What fits `request` in the catalogs of `clouds` (None: those that are enabled, or all where that isn't known),
    cheapest first; the nearest misses where nothing does. PlanRefused where no catalog can be read."""
    chosen = tuple(clouds) if clouds is not None else enabled_clouds() or known_clouds()
    rows = read_rows(chosen)
    if not rows:
        raise PlanRefused(
            f"the catalogs of {', '.join(chosen)} list no machine: `sky check` says which clouds can be used"
        )
    if (disk := disk_gb(request)) > LEAST_DISK_GB:
        _log.warning(
            "a disk of %d GB is asked for: what it costs is not in SkyPilot's catalog, and so in no price here, and neither in "
            "--max-price nor in --max-total-price",
            disk,
        )
    return select(rows, request)


def enabled_clouds() -> tuple[str, ...]:
    """The clouds that the last `sky check` found usable, by name; empty where that isn't written on this computer.

    Reads a file and makes no request: a cloud whose key was revoked since is named too.
    """
    import_sky()
    from sky import global_user_state, skypilot_config
    from sky.clouds.cloud import CloudCapability
    from sky.server import common
    from sky.skylet import runtime_utils

    # Opening the database makes one, and what a remote server has enabled isn't in it.
    if not common.is_api_server_local() or not Path(runtime_utils.get_runtime_dir_path(".sky/state.db")).exists():
        return ()
    found = global_user_state.get_cached_enabled_clouds(CloudCapability.COMPUTE, skypilot_config.get_active_workspace())
    return tuple(sorted(str(cloud).lower() for cloud in found))


def known_clouds() -> tuple[str, ...]:
    """Every cloud that has a catalog with prices."""
    import_sky()
    from sky.skylet import constants

    return tuple(cloud for cloud in constants.ALL_CLOUDS if cloud not in _OWN_CATALOGS)


_WHY_CHARACTERS = 150
"""Of a library's reason why a catalog can't be read: one line at a terminal."""


def read_rows(clouds: Iterable[str]) -> tuple[Row, ...]:
    """Every machine in the catalogs of `clouds`, by name: with CUDA GPUs, whole ones, and without any; no spot prices.

    Machines with arm64 processors are left out: nothing here was tried on one. A catalog that can't be read is left out and
    logged; PlanRefused where that is every one.
    """
    names, rows, failed = tuple(clouds), list[Row](), dict[str, str]()
    import_sky()
    import requests

    for cloud in names:
        try:
            # how far it is with fetching a catalog, SkyPilot writes to standard output as a server would
            with contextlib.redirect_stdout(io.StringIO()):
                rows += _rows_of(cloud)
        except (requests.exceptions.RequestException, OSError, ValueError, KeyError) as error:
            reached = not isinstance(error, requests.exceptions.ConnectionError)
            failed[cloud] = (
                clip(" ".join(str(error).split()), _WHY_CHARACTERS) if reached else "it can't be reached from here"
            )
    if names and len(failed) == len(names):
        lines = "\n".join(f"  {cloud}: {why}" for cloud, why in failed.items())
        raise PlanRefused(f"no catalog of prices can be read, so no machine can be chosen:\n{lines}")
    for cloud, why in failed.items():
        _log.warning("the catalog of %s can't be read: %s", cloud, why)
    return tuple(rows)


def _rows_of(cloud: str) -> list[Row]:
    from sky import catalog
    from sky.catalog import common

    machines, arm = [], frozenset[str]()
    if cloud not in _OWN_CATALOGS:
        machines = common.read_catalog(f"{cloud}/vms.csv", pull_frequency_hours=_PULL_HOURS).to_dict("records")
        arm = frozenset(str(row["InstanceType"]) for row in machines if row.get("Arch") in _OTHER_ARCH)
    found: dict[tuple[Any, ...], Row] = {}
    # A type is listed once a zone.
    for row in (*_with_gpus(cloud, catalog), *_without_gpus(cloud, machines)):
        place = (*row.kind, row.region)
        if row.instance_type not in arm and (place not in found or row.price_per_hour < found[place].price_per_hour):
            found[place] = row
    return list(found.values())


def _with_gpus(cloud: str, catalog: Any) -> list[Row]:
    # Not from the file: SkyPilot adds the price of the host where a cloud sells GPUs apart (GCP), and asks Slurm.
    listed = catalog.list_accelerators(gpus_only=True, clouds=cloud, all_regions=True)
    rows = []
    for info in (info for infos in listed.values() for info in infos):
        count = float(info.accelerator_count)
        complete = _known(info.price) and _known(info.cpu_count) and _known(info.memory)
        if not complete or count < 1 or not count.is_integer() or _NO_CUDA.match(info.accelerator_name):
            continue
        mib = info.device_memory * 1024 if _known(info.device_memory) else 0.0
        gpu = Gpu(info.accelerator_name, vram_bytes(cloud, info.accelerator_name, mib, int(count)))
        rows.append(
            Row(
                cloud, str(info.region), info.instance_type or "", int(info.cpu_count),
                int(info.memory * _GIB), float(info.price), gpu, int(count),
            )
        )  # fmt: skip
    return rows


def _without_gpus(cloud: str, machines: list[dict[str, Any]]) -> list[Row]:
    rows = []
    for row in machines:
        kind, region = row["InstanceType"], str(row["Region"])
        plain = isinstance(kind, str) and not isinstance(row["AcceleratorName"], str)
        # GCP lists the hosts of its A100s and L4s without them, at a price without them.
        if not plain or (cloud == "gcp" and _GCP_HOSTS.match(kind)):
            continue
        if all(_known(row[column]) for column in ("Price", "vCPUs", "MemoryGiB")):
            ram = int(row["MemoryGiB"] * _GIB)
            rows.append(Row(cloud, region, kind, int(row["vCPUs"]), ram, float(row["Price"])))
    return rows


def vram_bytes(cloud: str, name: str, mib: float, count: int) -> int:
    """Bytes of one GPU of that name; 0 where that is not known. `mib`: what the catalog has under SizeInMiB.

    Most write an "80 GB" card as 81920. RunPod writes 80. Vast writes the sum of all cards. AWS writes an L4, which has 24
    times 10^9 bytes and a little more, as 22888, cut off below it. Slurm knows the name alone.
    """
    mib = mib / count if cloud == "vast" else mib
    if not mib:
        sized = _SIZED.search(name)
        return int(sized[1]) * _GIB if sized else 0
    if mib < 1024:
        return round(mib * _GIB)
    size, whole = int(mib * (1 << 20)), math.ceil(mib * (1 << 20) / GB) * GB
    return whole if whole - size < 1 << 20 else size


def _known(value: Any) -> bool:
    return value is not None and not math.isnan(value)


def disk_gb(request: MachineRequest) -> int:
    """The whole disk to ask for; Lambda and some others give what they have instead."""
    needed = max(request.min_disk_bytes, request.needed_disk_bytes) + DISK_MARGIN_BYTES
    return max(LEAST_DISK_GB, math.ceil(needed / GB))


def select(
    rows: Iterable[Row], request: MachineRequest, max_misses: int = MAX_MISSES
) -> tuple[tuple[Candidate, ...], tuple[Excluded, ...]]:
    """The rows that fit, cheapest first in a total order, each kind of machine in its cheapest region.

    Of those without GPUs only such as no other beats in price, processors and memory at once: there are hundreds. Where
    nothing fits: the `max_misses` nearest kinds of machine, those with the fewest reasons first, then by how far off; where
    GPUs are asked, those without any last, however cheap.
    """
    disk = disk_gb(request)
    fitting, missing = [], []
    for row in sorted(rows, key=lambda row: row.order):
        facts = Facts(row.cpus, row.ram_bytes, row.ram_bytes, disk * GB - DISK_MARGIN_BYTES, row.gpus, "")
        if reasons := (*_market_reasons(row, request), *fits(facts, request)):
            without = bool(_gpus_wanted(request)) and not row.gpus
            missing.append(((without, len(reasons), _distance(row, request), row.order), row, reasons))
        else:
            offer = Offer(PROVIDER, row.name, facts, row.price_per_hour)
            fitting.append(Candidate(offer, row, disk, request.max_price))
    if fitting:
        return tuple(_unbeaten(_first_of_kind(fitting, lambda one: one.row.kind))), ()
    missing.sort(key=lambda miss: miss[0])
    nearest = _first_of_kind(missing, lambda miss: miss[1].kind)[:max_misses]
    return (), tuple(Excluded(row.name, "; ".join(reasons)) for _, row, reasons in nearest)


def _first_of_kind(items: Iterable[T], kind: Callable[[T], Any]) -> list[T]:
    found: dict[Any, T] = {}
    for item in items:
        found.setdefault(kind(item), item)
    return list(found.values())


def _unbeaten(ordered: Iterable[Candidate]) -> list[Candidate]:
    kept: list[Candidate] = []
    plain: list[tuple[int, int]] = []
    for one in ordered:
        if not one.row.gpus:
            size = (one.row.cpus, one.row.ram_bytes)
            if any(size[0] <= cpus and size[1] <= ram for cpus, ram in plain):
                continue
            plain.append(size)
        kept.append(one)
    return kept


def _market_reasons(row: Row, request: MachineRequest) -> list[str]:
    reasons = []
    if request.max_price is not None and row.price_per_hour > request.max_price:
        digits = 2
        while digits < 9 and f"{row.price_per_hour:.{digits}f}" == f"{request.max_price:.{digits}f}":
            digits += 1
        reasons.append(
            f"at most ${request.max_price:.{digits}f} an hour asked (--max-price), it costs ${row.price_per_hour:.{digits}f}"
        )
    if request.region is not None and row.region.lower() != request.region.lower():
        reasons.append(f"region {request.region} asked (--region), this is {row.region}")
    return reasons


def _gpus_wanted(request: MachineRequest) -> int:
    """How many at the least: a kind of GPU that is asked for is one of it."""
    return (
        request.gpu_count if request.gpu_count is not None else int(bool(request.gpu_filter or request.min_vram_bytes))
    )


def _distance(row: Row, request: MachineRequest) -> float:
    """How far a machine is from what is asked: the sum of the relative gaps, where another kind of GPU counts 10."""
    wanted = _gpus_wanted(request)
    named = row.gpu is not None and is_named_like(row.gpu.name, request.gpu_filter)
    gaps = [
        (max(request.min_ram_bytes, request.needed_ram_bytes), row.ram_bytes),
        (row.price_per_hour, request.max_price if request.max_price is not None else math.inf),
    ]
    if wanted and named and row.gpu is not None:
        gaps += [(wanted, row.gpu_count), (request.min_vram_bytes, row.gpu.total_bytes)]
    elsewhere = request.region is not None and row.region.lower() != request.region.lower()
    far = 10.0 * bool(wanted and not named) + float(elsewhere)
    return far + sum(max(0.0, asked / has - 1) if has else 100.0 * bool(asked) for asked, has in gaps)
