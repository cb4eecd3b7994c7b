"""What a machine has: its GPUs and their compute capability, its memory.

GPUs are found with nvidia-smi, not with torch, whose import takes seconds and creates a context on every card. The device's own
answer counts where there is one (nvidia-smi, torch). A catalog gives only a name, and `capability_of` looks it up in NVIDIA's
tables.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

Capability = tuple[int, int]
GB = 1_000_000_000
"""10^9 bytes, as in min_vram, min_cpu_ram and disk. Makers count memory in 2^30 bytes: an "80 GB" card reports 79 to 80
GiB, which is 85 of these, a "64 GB" machine about 66 after its kernel's share. So no tolerance is needed or given."""
_MIB = 1 << 20
_QUERY_SECONDS = 20.0
QUERY = ("--query-gpu=uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits")
"""What nvidia-smi is asked."""
OLD_QUERY = ("--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits")
"""The question to an nvidia-smi that refuses QUERY: of drivers before 2021."""
_GPU_LINE = re.compile(
    r"([^,]+),(.+?),\s*(\d{1,12}|\[[^\]]*\])(?:,\s*(?:(\d{1,3})\.(\d{1,3})|\[[^\]]*\]))?\s*", re.ASCII
)

_log = logging.getLogger(__name__)

# https://developer.nvidia.com/cuda-gpus and /cuda-legacy-gpus; the first that is found in a name is meant
_NAMES: tuple[tuple[str, Capability], ...] = (
    (r"GB10(?!\d)", (12, 1)),
    (r"G?B300", (10, 3)),
    (r"G?B[12]00", (10, 0)),
    (r"G?H[128]00|H20(?!\d)", (9, 0)),
    (r"ADA|L40S?|L[24]0?(?!\d)|RTX ?40\d\d", (8, 9)),
    (r"RTX ?50\d\d|RTX ?PRO", (12, 0)),
    (r"ORIN", (8, 7)),
    (r"A[18]00(?!\d)|A30(?!\d)", (8, 0)),
    (r"A10G?(?!\d)|A(?:2|16|40)(?!\d)|A[2-6][05]00|RTX ?30\d\d", (8, 6)),
    (r"T4G?(?!\d)|TITAN RTX|RTX ?20\d\d|RTX ?[3-8]000|GTX ?16\d\d|T[1-9]00", (7, 5)),
    (r"V100|TITAN V", (7, 0)),
    (r"P100", (6, 0)),
    (r"P(?:4|6|40)(?!\d)|GTX ?10\d\d|TITAN X|P[2-6]000", (6, 1)),
    (r"M(?:4|40|60)(?!\d)|GTX ?9\d\d", (5, 2)),
    (r"K80", (3, 7)),
)


def capability_of(name: str) -> Capability | None:
    """(major, minor) of a GPU such as `NVIDIA A100-SXM4-80GB` or `A100-80GB`; None for a name that is not known."""
    text = name.upper().replace("-", " ").replace("_", " ")
    for pattern, capability in _NAMES:
        if re.search(rf"(?<![A-Z0-9])(?:RTX ?)?(?:{pattern})", text):
            return capability
    return None


def is_named_like(name: str, wanted: str | None) -> bool:
    """Whether a GPU's name contains `wanted` (--gpu-filter), whatever the case; with None or "" every name does."""
    return (wanted or "").lower() in name.lower()


def written(capability: Capability) -> str:
    """As nvidia-smi writes it: `8.9`."""
    return f"{capability[0]}.{capability[1]}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; `total_bytes` as its driver reports it, 0 where it reports none. `reported`: the compute capability by
    the driver, None where it reports none and for a GPU of a catalog."""

    name: str
    total_bytes: int
    reported: Capability | None = None

    @property
    def capability(self) -> Capability | None:
        """Its compute capability: as reported, else by its name; None where neither is known."""
        return self.reported or capability_of(self.name)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a machine has. No host name, user or path: it may stand in a published manifest. `python`: its version."""

    cpus: int
    ram_bytes: int
    ram_available_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...]
    python: str


def find_gpus(executable: str = "nvidia-smi", visible: str | None = None) -> tuple[Gpu, ...]:
    """The GPUs that a CUDA program may use here; none where there is no `executable`, or it fails (which is logged).

    `visible`: as CUDA_VISIBLE_DEVICES, None for all. Raises nothing.
    """
    path = shutil.which(executable)
    if path is None:
        return ()
    try:
        done = _ask(path, QUERY, check=False)
        if done.returncode > 0:
            done = _ask(path, OLD_QUERY, check=True)
        done.check_returncode()
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s is here but does not work, so no GPU is used: %s", executable, error)
        return ()
    return parse_gpus(done.stdout, visible)


def _ask(path: str, query: tuple[str, ...], *, check: bool) -> subprocess.CompletedProcess[str]:
    return subprocess.run([path, *query], capture_output=True, text=True, timeout=_QUERY_SECONDS, check=check)


def parse_gpus(text: str, visible: str | None = None) -> tuple[Gpu, ...]:
    """The GPUs in what nvidia-smi printed for QUERY or OLD_QUERY; `visible`: as CUDA_VISIBLE_DEVICES, None for all."""
    found = []
    for line in text.splitlines():
        if known := _GPU_LINE.fullmatch(line):
            identity, name, mib, major, minor = known.groups()
            # A GPU that shares the machine's memory answers [N/A].
            total = int(mib) * _MIB if mib.isdigit() else 0
            found.append((identity.strip(), Gpu(name.strip(), total, (int(major), int(minor)) if major else None)))
    return _visible(found, visible)


def _visible(found: list[tuple[str, Gpu]], visible: str | None) -> tuple[Gpu, ...]:
    """What CUDA shows of (uuid, GPU): those named by number or beginning of the uuid, up to the first unknown."""
    if visible is None:
        return tuple(gpu for _, gpu in found)
    chosen: list[Gpu] = []
    for token in (part.strip() for part in visible.split(",")):
        named = [gpu for identity, gpu in found if token and identity.startswith(token)]
        if token.isdigit() and int(token) < len(found):
            named = [found[int(token)][1]]
        if len(named) != 1:
            break
        chosen += named
    return tuple(chosen)


def cuda_names(count: int) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls each of the `count` GPUs that this process sees: their numbers, or as it was given here."""
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(name.strip() for name in known.split(",")) if known else tuple(map(str, range(count)))


def free_ram_bytes() -> int:
    """The memory that is free for this process now: the machine's, or its container's limit where that is lower."""
    import psutil

    return min(total_ram_bytes(), int(psutil.virtual_memory().available))


def total_ram_bytes() -> int:
    """The memory that this process may use at most: the machine's, or its container's limit where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    with contextlib.suppress(OSError):
        own = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        group = Path("/sys/fs/cgroup") / own
        limits += [parent / "memory.max" for parent in (group, *group.parents)]
    for path in limits:
        # "max" is not a number: no limit at this level.
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(path.read_text()))
    return total


def available_ram_bytes() -> int:
    """Memory that a new process can have without swapping, of this machine or container, in bytes."""
    import psutil

    return min(total_ram_bytes(), int(psutil.virtual_memory().available))
