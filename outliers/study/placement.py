"""Which GPU holds which part of a model: integer arithmetic on the memory of the devices that were found.

It knows bytes and the order of a forward pass, but no model and no torch. A part is the embedding, one decoder layer, or the
rest. Each GPU holds a run of consecutive parts, so that the hidden state moves between GPUs as seldom as possible. As few GPUs
as fit are used, and filled evenly.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate

from pydantic import BaseModel, ConfigDict

from outliers.errors import PlanRefused
from outliers.units import in_gb

CONTEXT_BYTES = 1_000_000_000
"""Kept free on each GPU for the CUDA context, its libraries' workspaces and compiled kernels. Chosen, not measured."""
RESERVE_SHARE = 20
"""One part in RESERVE_SHARE of each GPU is kept free: for fragmentation, and for the difference between what drivers and torch
report as the total. Chosen, not measured."""
GB = 1_000_000_000


class Placement(BaseModel):
    """Which GPU holds each part. `parts`: bytes of embedding, decoder layers and rest; `devices`: the GPU's number for each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: tuple[int, ...]
    devices: tuple[int, ...]
    work_bytes: int
    """Bytes on each GPU in addition to the weights."""

    @property
    def gpus(self) -> tuple[int, ...]:
        """Numbers of the GPUs that are used, in the order of the forward pass."""
        return tuple(dict.fromkeys(self.devices))

    def weight_bytes(self, gpu: int) -> int:
        """Bytes of the weights on one GPU."""
        return sum(size for size, device in zip(self.parts, self.devices, strict=True) if device == gpu)

    def layers(self, gpu: int) -> str:
        """The decoder layers on one GPU: `0-23`, `7`, or `none`."""
        held = [layer for layer, device in enumerate(self.devices[1:-1]) if device == gpu]
        if not held:
            return "none"
        return str(held[0]) if len(held) == 1 else f"{held[0]}-{held[-1]}"

    @property
    def sentence(self) -> str:
        """For a person: `one GPU is used (GPU 0)`, or `split over 2 GPUs: layers 0-23 on GPU 0, layers 24-47 on GPU 1`."""
        if len(self.gpus) == 1:
            return f"one GPU is used (GPU {self.gpus[0]})"
        runs = ", ".join(f"layers {self.layers(gpu)} on GPU {gpu}" for gpu in self.gpus)
        return f"split over {len(self.gpus)} GPUs: {runs}"


def budgets(gpu_bytes: tuple[int, ...], work_bytes: int) -> tuple[int, ...]:
    """Bytes that each GPU has for weights: its own total, less the reserve and the work of one layer."""
    return tuple(max(0, usable(total) - work_bytes) for total in gpu_bytes)


def usable(total: int) -> int:
    """Bytes of a GPU with `total` that weights and work may take."""
    return max(0, total - total // RESERVE_SHARE - CONTEXT_BYTES)


def total_needed(weights_and_work: int) -> int:
    """The smallest GPU of which `weights_and_work` bytes are `usable`."""
    # rounding may be a byte or two off in either direction: begin below
    total = (weights_and_work + CONTEXT_BYTES) * RESERVE_SHARE // (RESERVE_SHARE - 1) - 2
    while usable(total) < weights_and_work:
        total += 1
    return total


def place(parts: tuple[int, ...], room: tuple[int, ...]) -> tuple[int, ...] | None:
    """The GPU of each part, so that no GPU holds more bytes than its `room`; None where that is impossible.

    Each GPU holds a run of parts, in the order of the GPUs, or no part. The fullest GPU, as a share of its room, is as little
    full as possible.
    """
    sums = (0, *accumulate(parts))
    # least[end]: how full the fullest GPU so far is at best with the first `end` parts on them; None: they don't fit
    least: list[Fraction | None] = [Fraction(0), *[None] * len(parts)]
    begins: list[list[int]] = []
    for bytes_here in room:
        found = [_last_run(sums, least, end, bytes_here) for end in range(len(sums))]
        least = [share for share, _ in found]
        begins.append([begin for _, begin in found])
    if least[-1] is None:
        return None
    devices: list[int] = []
    end = len(parts)
    for gpu in reversed(range(len(room))):
        begin = begins[gpu][end]
        devices[:0] = [gpu] * (end - begin)
        end = begin
    return tuple(devices)


def _last_run(sums: tuple[int, ...], least: list[Fraction | None], end: int, room: int) -> tuple[Fraction | None, int]:
    """(how full the fullest GPU is, where the last one's run begins) with the first `end` parts, the last GPU having `room`."""
    best: tuple[Fraction | None, int] = (None, end)
    for begin in range(end, -1, -1):
        held, before = sums[end] - sums[begin], least[begin]
        if held > room:
            break
        if before is None:
            continue
        share = max(before, Fraction(held, room) if held else Fraction(0))
        if best[0] is None or share < best[0]:
            best = (share, begin)
    return best


def fit(parts: tuple[int, ...], gpu_bytes: tuple[int | None, ...], work_bytes: int, most: int | None) -> Placement:
    """The parts on as few of the GPUs as hold them, the largest first, at most `most` of them.

    gpu_bytes: total of each GPU as it was found; 0 where its driver reports none, which counts as large enough; None for a GPU
    that must not be used. Raises PlanRefused with the bytes needed and the bytes available.
    """
    enough = total_needed(sum(parts) + work_bytes)
    known = {gpu: total or enough for gpu, total in enumerate(gpu_bytes) if total is not None}
    largest = sorted(known, key=lambda gpu: (-known[gpu], gpu))[:most]
    for count in range(1, len(largest) + 1):
        chosen = sorted(largest[:count])
        placed = place(parts, budgets(tuple(known[gpu] for gpu in chosen), work_bytes))
        if placed is not None:
            return Placement(parts=parts, devices=tuple(chosen[n] for n in placed), work_bytes=work_bytes)
    raise PlanRefused(_too_small(parts, tuple(known[gpu] for gpu in sorted(largest)), work_bytes))


def even(parts: tuple[int, ...], count: int, work_bytes: int) -> Placement:
    """The parts on `count` equal GPUs, however large those have to be."""
    return Placement(parts=parts, devices=place(parts, (sum(parts),) * count) or (), work_bytes=work_bytes)


def _too_small(parts: tuple[int, ...], totals: tuple[int, ...], work_bytes: int) -> str:
    """Why the GPUs with `totals` don't hold the parts, with both numbers and what to do."""
    remedy = "choose larger ones (--min-vram), more (--gpu-count), or --gpu-count 0 to compute without"
    if not totals:
        return f"no GPU may be used: {remedy}"
    if len(totals) == 1:
        needed, has, free = in_gb(sum(parts) + work_bytes, totals[0], usable(totals[0]))
        return (
            f"the study needs {needed} on one GPU, the largest has {has} ({free} usable besides the context): choose a larger "
            "(--min-vram), or --gpu-count 0 to compute without"
        )
    each = f"{len(totals)} GPUs of {' and '.join(f'{total / GB:.0f} GB' for total in sorted(set(totals)))}"
    needed, free = in_gb(sum(parts) + len(totals) * work_bytes, sum(map(usable, totals)))
    if sum(parts) + len(totals) * work_bytes > sum(map(usable, totals)):
        return f"the weights and one layer's work on each GPU need {needed} over {each} ({free} usable): {remedy}"
    fullest = even(parts, len(totals), work_bytes)
    held, least = in_gb(max(fullest.weight_bytes(gpu) for gpu in fullest.gpus) + work_bytes, min(map(usable, totals)))
    return (
        f"cut between layers, the weights and one layer's work need {held} on one of {each} ({least} usable): {remedy}"
    )


def device_map(
    embedding_modules: tuple[str, ...], layers_path: str, rest_modules: tuple[str, ...], devices: tuple[int, ...]
) -> dict[str, int]:
    """Name of a module -> number of its GPU, for `from_pretrained`; together the names cover the whole model.

    devices: of embedding, each decoder layer, and rest, as `Placement.devices`.
    """
    first, *layers, last = devices
    return {
        **dict.fromkeys(embedding_modules, first),
        **{f"{layers_path}.{number}": device for number, device in enumerate(layers)},
        **dict.fromkeys(rest_modules, last),
    }
