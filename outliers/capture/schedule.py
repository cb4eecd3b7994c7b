"""Decides on the machine that computes whether the model is read whole or a layer at a time, and on which device.

`auto` takes the whole model where the memory that is free holds it, else a layer at a time, and says so. A capture that was
begun by layers goes on so.
"""

from __future__ import annotations

import logging
from pathlib import Path

from outliers.capture.devices import Devices, choose_devices
from outliers.errors import PlanRefused
from outliers.hardware import available_ram_bytes
from outliers.model.describe import ModelInfo
from outliers.spec import StudySpec
from outliers.store.captures import LAYER_PLAN, LAYERS
from outliers.study.demand import demand_of
from outliers.study.schedule import by_layers, check_schedule, why_by_layers, with_schedule
from outliers.units import amounts

log = logging.getLogger(__name__)


def decide(spec: StudySpec, info: ModelInfo, capture: Path, free_bytes: int | None = None) -> tuple[StudySpec, Devices]:
    """The spec with `whole` or `layers`, and where that computes.

    capture: folder of the capture. free_bytes: memory that is free (default: asked of the system). Raises what
    `choose_devices` raises, and PlanRefused where `layers` is asked for and can't be.
    """
    check_schedule(spec, info)
    if spec.compute.schedule != "auto":
        return spec, choose_devices(spec, info, several=True)
    whole = with_schedule(spec, "whole")
    layered = by_layers(demand_of(spec, info))
    if layered is None:
        return whole, choose_devices(whole, info, several=True)
    if (capture / LAYERS / LAYER_PLAN).exists():
        log.info("this capture was begun a layer at a time, and goes on so (--schedule whole begins what is left anew)")
        return layered.spec, choose_devices(layered.spec, info)
    try:
        devices = choose_devices(whole, info, several=True)
        why = _too_small(whole, info, free_bytes) if devices.placement is None else None
    except PlanRefused as error:
        if (found := _on_one_gpu(layered.spec, info)) is None:
            raise
        devices, why = found, str(error)
    if why is None:
        return whole, devices
    placed = devices.placement is not None
    log.info("%s: it is read %s", why, why_by_layers(demand_of(whole, info), layered, gpus=placed))
    return layered.spec, devices


def _on_one_gpu(spec: StudySpec, info: ModelInfo) -> Devices | None:
    """Where a model is read by layers that GPUs do not hold; None where one GPU does not hold two layers either."""
    try:
        return choose_devices(spec, info)
    except PlanRefused:
        return None


def _too_small(spec: StudySpec, info: ModelInfo, free_bytes: int | None) -> str | None:
    """Why the whole model does not fit the memory that is free, with the other processes of the study; None where it does."""
    demand = demand_of(spec, info)
    processes = spec.compute.shards if demand.shares_machine else 1
    free = available_ram_bytes() if free_bytes is None else free_bytes
    if demand.ram_bytes * processes <= free:
        return None
    needed, there = amounts(demand.ram_bytes * processes, free, unit="GB")
    return f"{info.source.name} whole needs {needed} of memory, {there} is free"
