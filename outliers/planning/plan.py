"""What a study would take, before anything is spent: parameters, memory, disk, seconds, and which machine fits.

Bytes of the capture are exact; memory and time are estimates, each with its assumption. Nothing is loaded but a config, and
captures that exist already are not looked for (`remaining` does that).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from outliers.hardware import GB, Gpu, written
from outliers.machines.base import Provider
from outliers.model.describe import ModelInfo
from outliers.planning.download import download_bytes
from outliers.planning.estimate import Step, left_out, price_of, total_seconds
from outliers.planning.hints import hints
from outliers.planning.offers import Candidate, machines_of, refusals, request_for, steps_on, suitable
from outliers.spec import LOCAL_PREFIX, StudySpec, chosen, public_name
from outliers.study.demand import Demand, demand_of
from outliers.study.experts import expert_mode
from outliers.study.placement import Placement, total_needed
from outliers.study.processes import memory_of
from outliers.study.schedule import by_layers, check_schedule, why_by_layers
from outliers.untrusted.visible import visible_name


class GpuShare(BaseModel):
    """What one GPU holds. `needed_bytes`: the memory it must have, with what is kept free."""

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
    of `machines` of its kind, each at `price_per_hour`. `processes` read there side by side, each with a model of its own; they
    need `needed_ram_bytes` of main memory together and leave `idle_gpus` without work; `placement` and `shares` are of the first.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    model_name: str = ""
    """What a person calls it: one of the user's own by its file or folder, a built-in one by its name."""
    architecture: str
    dtype: str
    total_parameters: int
    active_parameters: int
    num_experts: int | None
    num_layers: int
    tokens: int
    shards: int
    spread: str | None
    schedule: str
    """whole, or layers: a layer at a time."""
    schedule_reason: str | None
    """Why auto takes layers here, with both amounts of memory and the time of reading; None where it does not."""
    spool_bytes: int
    """Disk of hidden states between layers, while the capture is made; 0 for a whole pass."""
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
    store: str
    """What of the activations stays on the disk: full, rolling or none."""
    held_bytes: int
    """The most of the capture that is on the disk at once."""
    host_pass_bytes: int
    """Of main memory where no GPU computes, what --store none takes to count in the pass; 0 for the other stores."""
    device_pass_bytes: int
    """The same of the memory of each GPU."""
    experts: str
    """What is read of experts: all, routing or off."""
    experts_reason: str | None
    """Why it can't be all, as the end of a sentence; None where it can, and for a dense model."""
    experts_bytes: int
    """Of `ram_bytes`, what reading the experts takes."""
    counting_bytes: int
    """Memory for counting the experts after the pass, when no model is there."""
    private_bytes: int
    """What `outliers export --full` brings home from another machine, without the sparse counts of single sequences."""
    seconds: dict[str, float]
    assumptions: tuple[str, ...]
    offers: tuple[dict[str, Any], ...]
    refusals: tuple[str, ...]
    hints: tuple[str, ...]
    """What would be faster or cheaper, as sentences."""


def make_plan(spec: StudySpec, info: ModelInfo, provider: Provider, left: int | None = None) -> Plan:
    """The plan of a spec. `left`: bytes of the capture still to write, by all machines, where that is known.

    BadInput where there are more --shards than batches.
    """
    check_schedule(spec, info)
    demand = demand_of(spec, info)
    plan = _plan(demand, provider, left)
    layered = by_layers(demand) if not plan.offers else None
    if layered is None:
        return plan
    other = _plan(layered, provider, left)
    gpus = bool(other.offers and other.offers[0]["gpus"]) and spec.compute.gpu_count != 0
    why = f"{'; '.join(plan.refusals)}: {why_by_layers(demand, layered, gpus=gpus)}"
    return other.model_copy(update={"schedule_reason": why, "refusals": ()}) if other.offers else plan


def _plan(demand: Demand, provider: Provider, left: int | None) -> Plan:
    """The plan of a study in one order of reading."""
    spec, info = demand.spec, demand.model
    left = demand.layout.total_bytes if left is None else left
    each = left if spec.compute.runs_here else min(left, demand.shard_layout.total_bytes)
    request, spread = request_for(demand, each), describe_shards(demand)
    if demand.shares_machine:
        request = replace(request, needed_ram_bytes=0)  # each offer is checked for what all of them need
    found, excluded = suitable(demand, provider, request, each)
    timed = [(candidate, steps_on(demand, candidate, each)) for candidate in found]
    first = timed[0][1] if timed else ()
    return Plan(
        **_model(info),
        tokens=demand.layout.num_sequences * demand.layout.positions,
        shards=spec.compute.shards,
        spread=spread,
        schedule="layers" if demand.layered else "whole",
        schedule_reason=None,
        spool_bytes=demand.spool_bytes,
        download_bytes=download_bytes(info),
        **_memory(demand),
        gpus=shares(demand.place_evenly()),
        capture_bytes=demand.layout.total_bytes,
        capture_bytes_left=left,
        store=spec.capture.store,
        held_bytes=_held(demand, found),
        host_pass_bytes=demand.host_pass_bytes,
        device_pass_bytes=demand.device_pass_bytes,
        experts=expert_mode(spec, info, demand.layout.layers),
        experts_reason=_unread(info),
        experts_bytes=demand.experts_bytes * (spec.compute.shards if spec.compute.runs_here else 1),
        counting_bytes=demand.counting_bytes * (spec.compute.shards if spec.compute.runs_here else 1),
        private_bytes=demand.private_bytes,
        seconds={step.name: step.seconds for step in first if step.seconds is not None},
        assumptions=tuple(f"{step.name}: {step.assumption}" for step in first),
        offers=tuple(_offer(demand, candidate, steps) for candidate, steps in timed),
        refusals=refusals(excluded),
        hints=hints(demand, provider, request, found, each),
    )


def _held(demand: Demand, found: tuple[Candidate, ...]) -> int:
    """The most of the capture on the first offer's disk at once: what is free there decides a window that is left open."""
    free = found[0].offer.facts.disk_free_bytes if found else 0
    return demand.held_with(free)


def _model(info: ModelInfo) -> dict[str, Any]:
    return {
        "model": info.source.id,
        "model_name": visible_name(info.source.name)
        if info.source.id.startswith(LOCAL_PREFIX)
        else public_name(info.source.id),
        "architecture": info.architecture,
        "dtype": info.dtype,
        "total_parameters": info.total_parameters,
        "active_parameters": info.active_parameters,
        "num_experts": info.num_experts,
        "num_layers": info.num_layers,
        "quantization": info.quantization,
        "stored_quantization": info.stored_quantization,
        "weight_bytes": info.weights.memory_bytes,
        "checkpoint_bytes": info.weights.checkpoint_bytes,
    }


def _unread(info: ModelInfo) -> str | None:
    """Why not everything of a mixture's experts can be read, as the end of a sentence."""
    if info.experts is not None:
        return info.experts.reason
    return (
        f"for the router or the shapes of the experts of {info.architecture} are not known"
        if info.anatomy.moe_layers
        else None
    )


def _memory(demand: Demand) -> dict[str, int]:
    """Memory as a plan gives it: main memory is of all processes on one machine."""
    processes = demand.spec.compute.shards if demand.spec.compute.runs_here else 1
    return {
        "activation_bytes": demand.activation_bytes,
        "ring_bytes": demand.ring_bytes,
        "ram_bytes": demand.ram_bytes * processes,
        "host_ram_bytes": demand.host_ram_bytes * processes,
        "vram_bytes": demand.vram_bytes,
    }


def describe_shards(demand: Demand) -> str | None:
    """How the machines or processes of a study share it, for a person; None for one machine. BadInput as `split`."""
    compute, total = demand.spec.compute, demand.spec.corpus.num_sequences
    shards = compute.shards
    if shards == 1:
        return None
    some = f"at most {demand.shard_layout.num_sequences} of the {total} sequences each"
    if compute.runs_here:
        return (
            f"{shards} processes at once on this machine, {some}; memory, disk and times are of all together, which share its "
            "cores, and have a GPU each where there are any"
        )
    fewer = "; where fewer hosts fit, parts share one and take longer" if chosen(compute.provider) == "ssh" else ""
    return (
        f"{shards} machines at once, {some}, of the disk {demand.shard_layout.total_bytes / GB:.2f} GB; memory is of each, "
        f"times are of the longest part, the price is of {shards} machines that last as long{fewer}"
    )


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


def _gpu(gpu: Gpu) -> dict[str, Any]:
    capability = None if gpu.capability is None else written(gpu.capability)
    return {"name": gpu.name, "total_bytes": gpu.total_bytes, "compute_capability": capability}


def _offer(demand: Demand, candidate: Candidate, steps: tuple[Step, ...]) -> dict[str, Any]:
    offer, placed, without = candidate.offer, candidate.placement, left_out(steps)
    facts, machines = offer.facts, machines_of(demand, offer)
    return {
        "provider": offer.provider,
        "name": offer.name,
        "price_per_hour": offer.price_per_hour,
        "machines": machines,
        "seconds": {step.name: step.seconds for step in steps},
        "total_seconds": total_seconds(steps),
        "left_out": list(without),
        "total_price": None if without else price_of(steps, offer.price_per_hour, machines),
        "cpus": facts.cpus,
        "ram_bytes": facts.ram_bytes,
        "ram_available_bytes": facts.ram_available_bytes,
        "disk_free_bytes": facts.disk_free_bytes,
        "gpus": [_gpu(gpu) for gpu in facts.gpus],
        "processes": candidate.processes,
        "needed_ram_bytes": memory_of(candidate.processes, demand.memory_bytes(gpus=placed is not None)),
        "idle_gpus": candidate.idle_gpus,
        "placement": placed.sentence if placed else None,
        "shares": [share.model_dump() for share in shares(placed)] if placed else [],
    }
