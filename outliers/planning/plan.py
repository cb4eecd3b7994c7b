"""What a study would take, computed before anything is spent: parameters, memory, disk, seconds, and which machine fits.

Bytes of the capture are exact; memory and time are estimates, each with its assumption beside it. Nothing is loaded
but a config, and what is there already is not looked for. Before it: `prepare`'s model_info, `memory`, `estimate`. After it:
`remaining`, and a refusal with both numbers, or the flow.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from outliers.errors import PlanRefused
from outliers.files.atomic import size_of
from outliers.hardware import GB, Gpu, written
from outliers.machines.base import Excluded, MachineRequest, Offer, Provider
from outliers.model.describe import ModelInfo, check_place
from outliers.model.quantization import DEQUANTIZABLE, Place, installed_packages
from outliers.model.weights import ITEM_BYTES
from outliers.planning.estimate import LOCAL, Step, estimate, left_out, longest_part, over_budget, price_of, total_seconds
from outliers.spec import StudySpec, chosen
from outliers.study.layout import Layout
from outliers.study.memory import even_placement, needs, placement_for
from outliers.study.placement import Placement, total_needed, usable
from outliers.study.prepare import layout_of
from outliers.units import amounts

__all__ = [
    "Plan", "check_plan", "make_plan", "needs", "placement_for", "planned_layout", "request_for", "suitable",
]  # fmt: skip


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

    `shards`: machines, or processes on this one, that share the sequences, and `spread` says how; null for one.
    `ram_bytes`: memory of a machine without GPUs, `host_ram_bytes` of one with; of all processes on it. `vram_bytes`: of one
    GPU that holds the whole model; `gpus`: the shares of --gpu-count equal ones. `quantization`: the method in which weights stay
    in memory, null for plain ones; `stored_quantization`: that of the checkpoint. `checkpoint_bytes`: the weights on disk, as
    they are quantized; `download_bytes`: what of it is still on the hub alone. `seconds` and `assumptions`, as `name: text`, are
    of the first offer's steps. Each of `offers` has its own: `seconds` (null where a step's speed is not known),
    `total_seconds` without the steps that `left_out` names, and `total_price`, dollars or null where a step is left out:
    of `machines` of its kind, each at `price_per_hour`.
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
    shards: int
    spread: str | None
    quantization: str | None
    stored_quantization: str | None
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
    disk = capture_bytes_left
    if capture_bytes_left and chosen(spec.compute.provider) != LOCAL:
        disk += info.weights.checkpoint_bytes
    elif capture_bytes_left and not _cache_is_elsewhere():
        disk += download_bytes(info)
    return MachineRequest.from_spec(spec.compute, needed_ram_bytes=least, needed_disk_bytes=disk)


def download_bytes(info: ModelInfo) -> int:
    """Bytes of weights that a model of the hub still has to bring here, less what a broken download left; 0 for one that is
    here, or was never there."""
    if info.source.kind != "hub":
        return 0
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=info.source.path, repo_type="model")
    snapshot = cache / "snapshots" / info.source.revision
    index = snapshot / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    if all((snapshot / name).exists() for name in names):
        return 0
    # what grows bears another name until it is whole
    parts = (*snapshot.glob("*.safetensors"), *cache.glob("blobs/*.incomplete"))
    return max(0, info.weights.checkpoint_bytes - sum(map(size_of, parts)))


def _cache_is_elsewhere() -> bool:
    """Whether the hub's cache was put somewhere, likely on another disk than the workspace: the download checks that one."""
    return bool(os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE"))


def make_plan(spec: StudySpec, info: ModelInfo, provider: Provider, left: int | None = None) -> Plan:
    """The plan of a spec. `left`: bytes of the capture still to write, by all machines, where that is known.

    BadInput where there are more --shards than batches.
    """
    layout, memory = planned_layout(spec, info), needs(spec, info)
    left = layout.total_bytes if left is None else left
    each = left if runs_here(spec) else min(left, planned_layout(longest_part(spec), info).total_bytes)
    request, beside = request_for(spec, info, each), spread(spec, info)
    if beside and runs_here(spec):
        request = replace(request, needed_ram_bytes=0)  # what all of them need is asked of the offers
    offers, excluded = suitable(spec, info, provider, request, each)
    timed = [(offer, steps_on(spec, info, offer, each)) for offer in offers]
    first = timed[0][1] if timed else ()
    processes = spec.compute.shards if runs_here(spec) else 1
    memory |= {name: memory[name] * processes for name in ("ram_bytes", "host_ram_bytes")}
    return Plan(
        model=info.source.id,
        architecture=info.architecture,
        dtype=info.dtype,
        total_parameters=info.total_parameters,
        active_parameters=info.active_parameters,
        num_experts=info.num_experts,
        num_layers=info.num_layers,
        tokens=layout.num_sequences * layout.positions,
        shards=spec.compute.shards,
        spread=beside,
        quantization=info.quantization,
        stored_quantization=info.stored_quantization,
        weight_bytes=info.weights.memory_bytes,
        checkpoint_bytes=info.weights.checkpoint_bytes,
        download_bytes=download_bytes(info),
        gpus=shares(even_placement(info, one_gpu(spec))),
        capture_bytes=layout.total_bytes,
        capture_bytes_left=left,
        seconds={step.name: step.seconds for step in first if step.seconds is not None},
        assumptions=tuple(f"{step.name}: {step.assumption}" for step in first),
        offers=tuple(_offer(spec, info, offer, steps) for offer, steps in timed),
        refusals=refusals(excluded),
        **memory,
    )


def runs_here(spec: StudySpec) -> bool:
    """Whether the study runs on this computer, its parts as processes beside each other."""
    return chosen(spec.compute.provider) == LOCAL


def spread(spec: StudySpec, info: ModelInfo) -> str | None:
    """How the parts of a study that is spread share it, for a person; None for one machine. BadInput as `split`."""
    shards, total = spec.compute.shards, spec.corpus.num_sequences
    if shards == 1:
        return None
    part = longest_part(spec)
    some = f"at most {part.corpus.num_sequences} of the {total} sequences each"
    if runs_here(spec):
        return (
            f"{shards} processes at once on this machine, {some}; memory, disk and times are of all together, which share its "
            "cores, and have a GPU each where there are any"
        )
    disk, fewer = planned_layout(part, info).total_bytes, ""
    if chosen(spec.compute.provider) == "ssh":
        fewer = "; where fewer hosts fit, parts share one and take longer"
    return (
        f"{shards} machines at once, {some}, of the disk {disk / GB:.2f} GB; memory is of each, times are of the longest part, "
        f"the price is of {shards} machines that last as long{fewer}"
    )


def check_plan(
    spec: StudySpec, info: ModelInfo, provider: Provider, left: int, ram_bytes: int | None = None
) -> MachineRequest:
    """The request of a study, among the offers that hold it; PlanRefused with every reason where none does.

    left: bytes of the capture that one machine still has to write. ram_bytes: memory that the rest of the study takes where
    it loads no model any more; None where it does. Processes that share this machine are asked for neither: what they take
    together is checked once, by `remaining`.
    """
    request = request_for(spec, info, left)
    beside = runs_here(spec) and spec.compute.shards > 1
    if beside:
        request = replace(request, needed_ram_bytes=0, needed_disk_bytes=0)
    elif ram_bytes is not None:
        request = replace(request, needed_ram_bytes=ram_bytes)
    loads = ram_bytes is None
    offers, excluded = suitable(spec, info, provider, request, left, loads=loads, holds=loads and not beside)
    if not offers:
        why = refusals(excluded)
        raise PlanRefused("no machine fits: " + why[0] if len(why) == 1 else "no machine fits:\n  " + "\n  ".join(why))
    return replace(request, among=tuple(offer.name for offer in offers))


def suitable(
    spec: StudySpec,
    info: ModelInfo,
    provider: Provider,
    request: MachineRequest,
    left: int | None = None,
    *,
    loads: bool = True,
    holds: bool = True,
) -> tuple[tuple[Offer, ...], tuple[Excluded, ...]]:
    """A provider's offers, less those whose GPUs don't hold the model (where it `loads` one), or whose free memory doesn't
    (where it must, `holds`), and those on which the study would cost more than --max-total-price. `left`: as in `check_plan`.
    """
    offers, excluded = provider.offers(request)
    if loads:
        large = made_plain(info)
        excluded = tuple(replace(item, reason=item.reason + large * _is_of_memory(item.reason)) for item in excluded)
    kept, small = [], []
    for offer in offers:
        try:
            if loads:
                _check_methods(spec, info, offer)
            _check_room(spec, info, offer, loads=loads, holds=holds)
            _check_budget(spec, info, offer, left)
        except PlanRefused as error:
            small.append(Excluded(offer.name, str(error)))
        else:
            kept.append(offer)
    return tuple(kept), (*excluded, *small)


def _is_of_memory(reason: str) -> bool:
    """Whether an offer was left out for what the study takes of memory (`base.fits`)."""
    return "the study needs" in reason and "of memory," in reason


def _check_methods(spec: StudySpec, info: ModelInfo, offer: Offer) -> None:
    """PlanRefused where an offer's GPUs or packages can't compute with the weights as they stay."""
    if info.quantization is None:
        return
    gpus = offer.facts.gpus if _uses_gpus(spec, offer) else ()
    try:
        placed = place_on(spec, info, offer)
    except PlanRefused:  # too small as well: of that when the method is right
        placed = None
    used = tuple(gpus[number] for number in placed.gpus) if placed else gpus
    place = Place(
        tuple((gpu.name, gpu.capability) for gpu in used), installed_packages() if offer.provider == LOCAL else None
    )
    try:
        check_place(info, place)
    except PlanRefused as error:
        raise PlanRefused(f"{error}{_plain_is_too_large(info, offer, gpus)}") from error


def _plain_is_too_large(info: ModelInfo, offer: Offer, gpus: tuple[Gpu, ...]) -> str:
    """What to add where --quantization none is the way out, and its weights would not fit the offer either."""
    if info.quantization not in DEQUANTIZABLE:
        return ""
    plain = info.total_parameters * ITEM_BYTES[info.dtype]
    has = sum(usable(gpu.total_bytes) for gpu in gpus) if gpus else offer.facts.ram_available_bytes
    if plain <= has or not all(gpu.total_bytes for gpu in gpus):
        return ""
    needed, free = amounts(plain, has)
    where = "its GPUs have" if gpus else "its memory has"
    return (
        f"; {where} {free} for that, not {needed}: choose more or larger GPUs (--gpu-count, --min-vram), or memory "
        "(--min-cpu-ram) and --gpu-count 0"
    )


def _check_room(spec: StudySpec, info: ModelInfo, offer: Offer, *, loads: bool, holds: bool) -> None:
    """PlanRefused where an offer's memory (`holds`) or its GPUs (`loads`) don't take the study, and why it is as large."""
    try:
        if holds:
            _check_memory(spec, info, offer)
        if loads:
            place_on(spec, info, offer)
    except PlanRefused as error:
        raise PlanRefused(f"{error}{made_plain(info)}") from error


def made_plain(info: ModelInfo) -> str:
    """What to add to a refusal for want of memory, where the checkpoint is smaller than what it becomes."""
    if info.quantization or info.stored_quantization is None:
        return ""
    plain, stored = amounts(info.weight_bytes, info.weights.checkpoint_bytes)
    return (
        f" (the weights take {plain}: they are stored in {info.stored_quantization}, {stored}, and made plain {info.dtype} on "
        "loading)"
    )


def _check_budget(spec: StudySpec, info: ModelInfo, offer: Offer, left: int | None) -> None:
    most, price = spec.compute.max_total_price, offer.price_per_hour
    if most is None or not price:
        return  # nothing is measured for a machine that costs nothing
    if left is None:
        left = planned_layout(longest_part(spec), info).total_bytes
    reason = over_budget(steps_on(spec, info, offer, left), price, most, machines_of(spec, offer))
    if reason is not None:
        raise PlanRefused(reason)


def machines_of(spec: StudySpec, offer: Offer) -> int:
    """How many machines of an offer's kind a study takes: processes on this one are one."""
    return 1 if offer.provider == LOCAL else spec.compute.shards


def steps_on(spec: StudySpec, info: ModelInfo, offer: Offer, left: int) -> tuple[Step, ...]:
    """What a study would do on an offer, with seconds. `left`: bytes of the capture still to write."""
    placed = place_on(spec, info, offer)
    gpus = tuple(offer.facts.gpus[gpu].name for gpu in placed.gpus) if placed else ()
    return estimate(spec, info, offer, gpus, left, download_bytes(info) if offer.provider == LOCAL else 0)


def place_on(spec: StudySpec, info: ModelInfo, offer: Offer) -> Placement | None:
    """Where the model lies on a machine's GPUs, None where none is used. Raises PlanRefused where it has no room there."""
    gpus = offer.facts.gpus
    return placement_for(info, one_gpu(spec), usable_gpus(spec, gpus)) if _uses_gpus(spec, offer) else None


def one_gpu(spec: StudySpec) -> StudySpec:
    """What a process has of the GPUs that it is given: processes that share this machine have one each."""
    if not runs_here(spec) or spec.compute.shards == 1 or spec.compute.gpu_count == 0:
        return spec
    return spec.model_copy(update={"compute": spec.compute.model_copy(update={"gpu_count": 1})})


def _uses_gpus(spec: StudySpec, offer: Offer) -> bool:
    return bool(offer.facts.gpus) and spec.compute.gpu_count != 0


def _check_memory(spec: StudySpec, info: ModelInfo, offer: Offer) -> None:
    """PlanRefused where an offer's free memory does not hold the study, or its processes together."""
    gpus, processes = _uses_gpus(spec, offer), spec.compute.shards if offer.provider == LOCAL else 1
    one, free = needs(spec, info)["host_ram_bytes" if gpus else "ram_bytes"], offer.facts.ram_available_bytes
    if one * processes <= free:
        return
    if processes > 1:
        raise PlanRefused(too_many(processes, one * processes, free))
    needed, there = amounts(one, free, unit="GB")
    raise PlanRefused(
        f"the study needs {needed} of memory with{'' if gpus else 'out'} a GPU, {there} is free: "
        "choose a machine with more (--min-cpu-ram)" + ("" if gpus else ", or with GPUs (--gpu-count)")
    )


def too_many(processes: int, needed_bytes: int, free_bytes: int) -> str:
    """Why processes don't fit beside each other."""
    needed, free = amounts(needed_bytes, free_bytes, unit="GB")
    return f"{processes} processes need {needed} of memory, {free} is free: ask for fewer --shards"


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


def _gpu(gpu: Gpu) -> dict[str, Any]:
    capability = None if gpu.capability is None else written(gpu.capability)
    return {"name": gpu.name, "total_bytes": gpu.total_bytes, "compute_capability": capability}


def _offer(spec: StudySpec, info: ModelInfo, offer: Offer, steps: tuple[Step, ...]) -> dict[str, Any]:
    facts, placed, without = offer.facts, place_on(spec, info, offer), left_out(steps)
    return {
        "provider": offer.provider,
        "name": offer.name,
        "price_per_hour": offer.price_per_hour,
        "machines": machines_of(spec, offer),
        "seconds": {step.name: step.seconds for step in steps},
        "total_seconds": total_seconds(steps),
        "left_out": list(without),
        "total_price": None if without else price_of(steps, offer.price_per_hour, machines_of(spec, offer)),
        "cpus": facts.cpus,
        "ram_bytes": facts.ram_bytes,
        "ram_available_bytes": facts.ram_available_bytes,
        "disk_free_bytes": facts.disk_free_bytes,
        "gpus": [_gpu(gpu) for gpu in facts.gpus],
        "placement": placed.sentence if placed else None,
        "shares": [share.model_dump() for share in shares(placed)] if placed else [],
    }
