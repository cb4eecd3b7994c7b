"""What a study would take, computed before anything is spent: parameters, memory, disk, seconds, and which machine fits.

Bytes of the capture are exact; memory and time are estimates, each with its assumption beside it. Nothing is loaded
but a config. Before it: `prepare`'s model_info. After it: a refusal with both numbers, or the flow.
"""

from __future__ import annotations

import math
import time
from typing import Any

from pydantic import BaseModel, ConfigDict

from outliers.errors import CaptureError, PlanRefused
from outliers.machines.base import GB, Excluded, MachineRequest, Offer, Provider
from outliers.models import ModelInfo
from outliers.prepare import Prepared, resolve_layers
from outliers.ring_size import ring_slots
from outliers.spec import StudySpec
from outliers.store import Journal, Layout, is_complete
from outliers.workspace import Workspace

PROCESS_BYTES = 1_000_000_000
"""For the process itself: a forward pass of a tiny Llama took 0.37 GB here (ru_maxrss, torch 2.13, transformers 5.17), and
the rest is a margin that was chosen, not measured."""
ACTIVATION_WIDTHS = 24
"""Temporary tensors of one layer, in hidden sizes a token: attention, MLP and their inputs. An estimate, not measured."""
MEASURE_SIZE = 768
PASS_EFFICIENCY = 0.5
"""SmolLM2's captured pass reached 874 tokens/s here, 235 GFLOP/s, where the product of matrices reached 448."""


class Plan(BaseModel):
    """Numbers of bytes, seconds and parameters; `refusals` is empty where the study fits."""

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
    activation_bytes: int
    ring_bytes: int
    ram_bytes: int
    vram_bytes: int
    capture_bytes: int
    capture_bytes_left: int
    seconds: dict[str, float]
    assumptions: tuple[str, ...]
    offers: tuple[dict[str, Any], ...]
    refusals: tuple[str, ...]


def planned_layout(spec: StudySpec, info: ModelInfo) -> Layout:
    """The shapes that the capture of a spec would have."""
    return Layout(
        widths={site: info.site_widths[site] for site in spec.capture.sites},
        layers=resolve_layers(spec, info),
        num_sequences=spec.corpus.num_sequences,
        positions=spec.corpus.sequence_length,
        dtype=info.dtype,
        codec=spec.capture.codec,
    )


def needs(spec: StudySpec, info: ModelInfo) -> dict[str, int]:
    """Bytes of memory a study takes: weights, ring, one layer's temporaries, and their sum with the process."""
    layout = planned_layout(spec, info)
    batch = spec.capture.batch_sequences * layout.positions
    slot = batch * max(layout.widths.values()) * layout.itemsize
    ring = slot * ring_slots(slot)
    activations = batch * info.hidden_size * ACTIVATION_WIDTHS * layout.itemsize
    # a GGUF file is dequantized to float32 before it is cast
    weights = info.weight_bytes + (info.total_parameters * 4 if info.source.kind == "gguf" else 0)
    return {
        "ring_bytes": ring,
        "activation_bytes": activations,
        "vram_bytes": info.weight_bytes + activations,
        "ram_bytes": weights + activations + ring + PROCESS_BYTES,
    }


def request_for(spec: StudySpec, info: ModelInfo, capture_bytes_left: int) -> MachineRequest:
    """What a machine must have for this study."""
    return MachineRequest.from_spec(
        spec.compute, needed_ram_bytes=needs(spec, info)["ram_bytes"], needed_disk_bytes=capture_bytes_left
    )


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
    memory = needs(spec, info)
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
        weight_bytes=info.weight_bytes,
        capture_bytes=layout.total_bytes,
        capture_bytes_left=left,
        seconds=seconds,
        assumptions=assumptions,
        offers=tuple(_offer(offer) for offer in offers),
        refusals=refusals(excluded),
        **memory,
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
    """A provider's offers, less those whose GPU is too small: this version does not split a model over several."""
    offers, excluded = provider.offers(request)
    needed = needs(spec, info)["vram_bytes"]
    kept, small = [], []
    for offer in offers:
        largest = max((gpu.total_bytes for gpu in offer.facts.gpus), default=0)
        # a driver that doesn't tell its memory (0) is not refused for it
        if spec.compute.gpu_count != 0 and 0 < largest < needed:
            reason = (
                f"the study needs {needed / GB:.1f} GB on one GPU, the largest has {largest / GB:.1f} GB: choose a larger one "
                "(--min-vram), or --gpu-count 0 to compute without"
            )
            small.append(Excluded(offer.name, reason))
        else:
            kept.append(offer)
    return tuple(kept), (*excluded, *small)


def refusals(excluded: tuple[Excluded, ...]) -> tuple[str, ...]:
    """Why each machine was left out, as sentences."""
    return tuple(f"{item.name}: {item.reason}" for item in excluded)


def _offer(offer: Offer) -> dict[str, Any]:
    facts = offer.facts
    return {
        "provider": offer.provider,
        "name": offer.name,
        "price_per_hour": offer.price_per_hour,
        "cpus": facts.cpus,
        "ram_bytes": facts.ram_bytes,
        "ram_available_bytes": facts.ram_available_bytes,
        "disk_free_bytes": facts.disk_free_bytes,
        "gpus": [{"name": gpu.name, "total_bytes": gpu.total_bytes} for gpu in facts.gpus],
    }


def _seconds(info: ModelInfo, tokens: int, left: int, gpu: bool) -> tuple[dict[str, float], tuple[str, ...]]:
    """Seconds a step on this machine's processor; nothing is said of a GPU, whose speed was not measured."""
    if gpu or not left:
        return {}, ("no time is estimated for a GPU or for a capture that is complete",) if gpu else ()
    rate = measure_flops(info.dtype)
    work = 2 * info.active_parameters * tokens / (rate * PASS_EFFICIENCY)
    load = info.weight_bytes / 500e6 + 8
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
