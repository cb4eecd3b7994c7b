"""Whether a model is read whole or a layer at a time (`--schedule`), and what that takes: the same bits either way.

It is arithmetic on a description and loads no torch. `demand_of` counts a spec whose schedule is `whole` or `layers`; `auto`
counts as whole, and becomes `layers` where that does not fit: for a plan on an offer, for a capture on the machine it runs on.
"""

from __future__ import annotations

from typing import Literal

from outliers.errors import PlanRefused
from outliers.model.describe import ModelInfo
from outliers.model.families import INPUT
from outliers.spec import StudySpec, chosen
from outliers.study.demand import PROCESS_BYTES, Demand, demand_of
from outliers.units import amounts, format_seconds

READ_BYTES_PER_SECOND = 500e6
"""At which weights are read from a disk. Assumed, as `planning.estimate` does; a laptop's SSD reads three times as fast."""
GIVEN = ("local", "ssh")
"""Providers of machines that are what they are. Of those that are rented, auto takes one that holds the whole model."""


def with_schedule(spec: StudySpec, schedule: Literal["whole", "layers"]) -> StudySpec:
    """The spec in one order of reading; no id depends on it."""
    return spec.model_copy(update={"compute": spec.compute.model_copy(update={"schedule": schedule})})


def why_not_layers(spec: StudySpec, info: ModelInfo) -> str | None:
    """Why a study can't read its model a layer at a time, as far as its description tells; None where it can."""
    name, anatomy = info.source.name, info.anatomy
    if info.source.kind == "gguf":
        return f"{name} is a GGUF file, which is read whole to be dequantized: name a folder or model of the hub in safetensors"
    if info.quantization is not None:
        return (
            f"the weights of {name} stay in {info.quantization}, and a layer is loaded plain: give --quantization none"
        )
    if spec.capture.store != "full":
        return (
            f"--store {spec.capture.store} takes some sequences through all layers at a time, and the weights would be read "
            "again each time: give --store full"
        )
    if spec.probe.asked:
        return "a probe changes the whole model: leave --probe out"
    for site in spec.capture.sites:
        for layer, path in enumerate(anatomy.sites[site]):
            own = f"{anatomy.layers}.{layer}"
            if path and path.removesuffix(INPUT) != own and not path.startswith(f"{own}."):
                return f"the site {site} is read at {path}, which is not in layer {layer}"
    return None


def check_schedule(spec: StudySpec, info: ModelInfo) -> None:
    """Raise PlanRefused where `layers` is asked for and can't be, or weights are not to be kept that a whole pass keeps."""
    compute = spec.compute
    why = why_not_layers(spec, info) if compute.schedule == "layers" else None
    if why is not None:
        raise PlanRefused(f"--schedule layers: {why}; or give --schedule whole")
    if compute.no_keep_weights and compute.schedule != "layers":
        raise PlanRefused(
            "--no-keep-weights deletes each file of the weights after its last layer, which a whole pass can't: give --schedule "
            "layers too, or leave it out"
        )
    if compute.no_keep_weights and info.source.kind != "hub":
        raise PlanRefused(
            f"--no-keep-weights is for a model of the hub, and {info.source.name} is on this machine: leave it out"
        )


def by_layers(demand: Demand) -> Demand | None:
    """What a study takes a layer at a time, where `auto` may choose that; None where it may not, or it would save little."""
    spec = demand.spec
    if spec.compute.schedule != "auto" or chosen(spec.compute.provider) not in GIVEN:
        return None
    layers = demand.model.weights.layer_bytes
    if sum(layers) - max(layers) < PROCESS_BYTES or why_not_layers(spec, demand.model) is not None:
        return None  # less would be saved than what is counted for the process, which is a margin
    return demand_of(with_schedule(spec, "layers"), demand.model)


def reading_seconds(info: ModelInfo) -> float:
    """How long the weights take to be read once."""
    return info.weights.checkpoint_bytes / READ_BYTES_PER_SECOND


def why_by_layers(whole: Demand, layered: Demand, *, gpus: bool) -> str:
    """For a person: both amounts of memory, and what it costs in time."""
    if gpus:
        before, after = amounts(whole.vram_bytes, layered.vram_bytes, unit="GB")
        place = "of one GPU"
    else:
        before, after = amounts(whole.ram_bytes, layered.ram_bytes, unit="GB")
        place = "of memory"
    lasts = format_seconds(reading_seconds(whole.model))
    return (
        f"a layer at a time: {after} {place} instead of {before}, with the same result; the weights are read once, at least "
        f"{lasts} at {READ_BYTES_PER_SECOND / 1e6:.0f} MB/s"
    )
