"""What a study would take, computed before anything is spent: parameters, memory, disk, seconds, and which machine fits.

Bytes of the capture are exact; memory and time are estimates, each with its assumption beside it. Nothing is loaded
but a config. Before it: `prepare`'s model_info. After it: a refusal with both numbers, or the flow.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from outliers.errors import CaptureError, PlanRefused
from outliers.machines.base import GB, Excluded, Gpu, MachineRequest, Offer, Provider
from outliers.memory import even_placement, needs, placement_for
from outliers.model_info import ModelInfo
from outliers.placement import Placement, total_needed
from outliers.prepare import Prepared, layout_of
from outliers.spec import StudySpec
from outliers.store import Journal, Layout, is_complete
from outliers.workspace import Workspace

__all__ = [
    "Plan", "bytes_left", "check_plan", "make_plan", "needs", "placement_for", "planned_layout", "request_for", "suitable",
]  # fmt: skip

MEASURE_SIZE = 768
PASS_EFFICIENCY = 0.5
"""SmolLM2's captured pass reached 874 tokens/s here, 235 GFLOP/s, where the product of matrices reached 448."""


class GpuShare(BaseModel):
    """What one GPU holds. `needed_bytes`: the memory it must have for that, with what is kept free."""

    model_config = ConfigDict(frozen=True)

    gpu: int
    layers: str
    """Decoder layers: `0-23`, `7`, or `none`."""
    weight_bytes: int
    work_bytes: int
    needed_bytes: int


class Plan(BaseModel):
    """Numbers of bytes, seconds and parameters; `refusals` is empty where the study fits.

    `ram_bytes`: memory of a machine without GPUs, `host_ram_bytes` of one with. `vram_bytes`: of one GPU that holds the
    whole model; `gpus`: the shares of --gpu-count equal ones. `checkpoint_bytes`: the weights on disk, as they are
    quantized; `download_bytes`: what of it is still on the hub alone.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    architecture: str
    dtype: str
    total_parameters: int
    active_parameters: int
    num_experts: int | None
    num_layers: int
    tokens: int
    weight_bytes: int
    checkpoint_bytes: int
    download_bytes: int
    activation_bytes: int
    ring_bytes: int
    ram_bytes: int
    host_ram_bytes: int
    vram_bytes: int
    gpus: tuple[GpuShare, ...]
    capture_bytes: int
    capture_bytes_left: int
    seconds: dict[str, float]
    assumptions: tuple[str, ...]
    offers: tuple[dict[str, Any], ...]
    refusals: tuple[str, ...]


def planned_layout(spec: StudySpec, info: ModelInfo) -> Layout:
    """The shapes that the capture of a spec would have."""
    return layout_of(spec, info)


def request_for(spec: StudySpec, info: ModelInfo, capture_bytes_left: int) -> MachineRequest:
    """What a machine must have for this study. Where GPUs are left open its memory is the lesser of both ways to compute;
    `suitable` looks again once it is seen whether it has any."""
    memory, count = needs(spec, info), spec.compute.gpu_count
    both = (memory["ram_bytes"], memory["host_ram_bytes"])
    least = min(both) if count is None else both[count > 0]
    disk = capture_bytes_left + (download_bytes(info) if capture_bytes_left and not _cache_is_elsewhere() else 0)
    return MachineRequest.from_spec(spec.compute, needed_ram_bytes=least, needed_disk_bytes=disk)


def download_bytes(info: ModelInfo) -> int:
    """Bytes of weights that a model of the hub still has to bring here; 0 for one that is here, or was never there."""
    if info.source.kind != "hub":
        return 0
    from huggingface_hub import try_to_load_from_cache

    def here(name: str) -> str | None:
        found = try_to_load_from_cache(info.source.path, name, revision=info.source.revision)
        return found if isinstance(found, str) else None

    if here("model.safetensors"):
        return 0
    index = here("model.safetensors.index.json")
    if index is None:
        return info.weights.checkpoint_bytes
    shards_there = map(here, set(json.loads(Path(index).read_text())["weight_map"].values()))
    return 0 if all(shards_there) else info.weights.checkpoint_bytes


def _cache_is_elsewhere() -> bool:
    """Whether the hub's cache was put somewhere, likely on another disk than the workspace: the download checks that one."""
    return bool(os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE"))


def bytes_left(prepared: Prepared, workspace: Workspace) -> int:
    """Bytes that the capture still has to write: none where it is complete, less what is journaled where it was begun."""
    layout = planned_layout(prepared.spec, prepared.model)
    folder = workspace.capture(prepared.capture_id)
    try:
        if is_complete(folder):
            return 0
        done = Journal.open(folder / "journal.jsonl").done
    except CaptureError:
        return layout.total_bytes
    return max(0, layout.total_bytes - sum(int(entry["bytes"]) for entry in done.values()))


def make_plan(spec: StudySpec, info: ModelInfo, provider: Provider, left: int | None = None) -> Plan:
    """The plan of a spec. `left`: bytes of the capture still to write, where that is known."""
    layout = planned_layout(spec, info)
    left = layout.total_bytes if left is None else left
    request = request_for(spec, info, left)
    offers, excluded = suitable(spec, info, provider, request)
    tokens = layout.num_sequences * layout.positions
    seconds, assumptions = _seconds(info, tokens, left, bool(offers and offers[0].facts.gpus))
    return Plan(
        model=info.source.id,
        architecture=info.architecture,
        dtype=info.dtype,
        total_parameters=info.total_parameters,
        active_parameters=info.active_parameters,
        num_experts=info.num_experts,
        num_layers=info.num_layers,
        tokens=tokens,
        weight_bytes=info.weights.memory_bytes,
        checkpoint_bytes=info.weights.checkpoint_bytes,
        download_bytes=download_bytes(info),
        gpus=shares(even_placement(info, spec)),
        capture_bytes=layout.total_bytes,
        capture_bytes_left=left,
        seconds=seconds,
        assumptions=assumptions,
        offers=tuple(_offer(spec, info, offer) for offer in offers),
        refusals=refusals(excluded),
        **needs(spec, info),
    )


def check_plan(spec: StudySpec, info: ModelInfo, provider: Provider, left: int) -> MachineRequest:
    """The request of a study that fits some machine; PlanRefused with every reason where none does."""
    request = request_for(spec, info, left)
    offers, excluded = suitable(spec, info, provider, request)
    if not offers:
        raise PlanRefused("no machine fits: " + "; ".join(refusals(excluded)))
    return request


def suitable(
    spec: StudySpec, info: ModelInfo, provider: Provider, request: MachineRequest
) -> tuple[tuple[Offer, ...], tuple[Excluded, ...]]:
    """A provider's offers, less those whose GPUs don't hold the model, or whose memory doesn't where there are none."""
    offers, excluded = provider.offers(request)
    kept, small = [], []
    for offer in offers:
        try:
            place_on(spec, info, offer)
        except PlanRefused as error:
            small.append(Excluded(offer.name, str(error)))
        else:
            kept.append(offer)
    return tuple(kept), (*excluded, *small)


def place_on(spec: StudySpec, info: ModelInfo, offer: Offer) -> Placement | None:
    """Where the model lies on a machine's GPUs, None where none is used. Raises PlanRefused where it has no room."""
    facts = offer.facts
    gpus = bool(facts.gpus) and spec.compute.gpu_count != 0
    needed, free = needs(spec, info)["host_ram_bytes" if gpus else "ram_bytes"], facts.ram_available_bytes
    if needed > free:
        raise PlanRefused(
            f"the study needs {needed / GB:.2f} GB of memory with{'' if gpus else 'out'} a GPU, {free / GB:.2f} GB is free: "
            "choose a machine with more (--min-cpu-ram)" + ("" if gpus else ", or with GPUs (--gpu-count)")
        )
    return placement_for(info, spec, usable_gpus(spec, facts.gpus)) if gpus else None


def usable_gpus(spec: StudySpec, gpus: tuple[Gpu, ...]) -> tuple[int | None, ...]:
    """Total bytes of each GPU for `placement_for`; None for one that --gpu-filter leaves out."""
    wanted = (spec.compute.gpu_filter or "").lower()
    return tuple(gpu.total_bytes if wanted in gpu.name.lower() else None for gpu in gpus)


def shares(placement: Placement) -> tuple[GpuShare, ...]:
    """A row for each GPU of a placement."""
    return tuple(
        GpuShare(
            gpu=gpu,
            layers=placement.layers(gpu),
            weight_bytes=placement.weight_bytes(gpu),
            work_bytes=placement.work_bytes,
            needed_bytes=total_needed(placement.weight_bytes(gpu) + placement.work_bytes),
        )
        for gpu in placement.gpus
    )


def refusals(excluded: tuple[Excluded, ...]) -> tuple[str, ...]:
    """Why each machine was left out, as sentences."""
    return tuple(f"{item.name}: {item.reason}" for item in excluded)


def _offer(spec: StudySpec, info: ModelInfo, offer: Offer) -> dict[str, Any]:
    facts, placed = offer.facts, place_on(spec, info, offer)
    return {
        "provider": offer.provider,
        "name": offer.name,
        "price_per_hour": offer.price_per_hour,
        "cpus": facts.cpus,
        "ram_bytes": facts.ram_bytes,
        "ram_available_bytes": facts.ram_available_bytes,
        "disk_free_bytes": facts.disk_free_bytes,
        "gpus": [{"name": gpu.name, "total_bytes": gpu.total_bytes} for gpu in facts.gpus],
        "placement": placed.sentence if placed else None,
        "shares": [share.model_dump() for share in shares(placed)] if placed else [],
    }


def _seconds(info: ModelInfo, tokens: int, left: int, gpu: bool) -> tuple[dict[str, float], tuple[str, ...]]:
    """Seconds a step on this machine's processor; nothing is said of a GPU, whose speed was not measured."""
    if gpu or not left:
        return {}, ("no time is estimated for a GPU or for a capture that is complete",) if gpu else ()
    rate = measure_flops(info.dtype)
    work = 2 * info.active_parameters * tokens / (rate * PASS_EFFICIENCY)
    load = info.weights.memory_bytes / 500e6 + 8
    return (
        {"load": round(load, 1), "pass": round(work, 1)},
        (
            f"pass: 2 x active parameters x tokens at {rate * PASS_EFFICIENCY / 1e9:.0f} GFLOP/s, "
            f"{PASS_EFFICIENCY:g} of what a {info.dtype} product of {MEASURE_SIZE} x {MEASURE_SIZE} matrices just reached here",
            "load: 8 s of imports and weights at 500 MB/s",
        ),
    )


def measure_flops(dtype: str) -> float:
    """Floating-point operations a second of a matrix product on this processor, best of a fraction of a second."""
    import torch

    a = torch.randn(MEASURE_SIZE, MEASURE_SIZE).to(getattr(torch, dtype))
    best, until = math.inf, time.monotonic() + 0.4
    while time.monotonic() < until or best is math.inf:
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2 * MEASURE_SIZE**3 / best
