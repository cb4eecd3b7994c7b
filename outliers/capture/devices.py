"""Chooses what this machine computes on: the processor, or GPUs to which layers are assigned by their memory.

torch on the machine is asked once, before weights are read: this decision replaces the plan that was made from outside.
Knows devices and bytes; `study.placement` has the arithmetic.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outliers.errors import PlanRefused
from outliers.hardware import Gpu, find_gpus, free_ram_bytes
from outliers.model.describe import ModelInfo, check_place
from outliers.model.quantization import Place, installed_packages
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.placement import Placement, device_map
from outliers.units import amounts

_DECISIVE = ("avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16", "sve", "bf16")
"""oneDNN has different kernels for 16-bit matrices with and without these."""


@dataclass(frozen=True)
class Devices:
    """Where a model computes. `kind` names the hardware in a capture's fingerprint and in results."""

    kind: str
    placement: Placement | None = None
    """None: the processor."""
    others: tuple[Placement, ...] = ()
    """Where further processes have the model."""

    @property
    def first(self) -> str:
        """The torch device that takes the token ids: of the embedding."""
        return f"cuda:{self.placement.devices[0]}" if self.placement else "cpu"

    def map(self, info: ModelInfo) -> dict[str, str | int]:
        """`device_map` for from_pretrained: the whole model, or each part by its name."""
        if self.placement is None:
            return {"": "cpu"}
        if len(self.placement.gpus) == 1:
            return {"": self.placement.gpus[0]}
        weights, anatomy = info.weights, info.anatomy
        layers = f"{anatomy.backbone}.{anatomy.layers}"
        return dict(device_map(weights.embedding_modules, layers, weights.rest_modules, self.placement.devices))


def instructions() -> str:
    """The instruction sets of this processor that decide in which order sums are taken, such as `AVX512 avx512_bf16 amx_bf16`."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux: only torch's own answer
        flags = set()
    return " ".join([torch.backends.cpu.get_cpu_capability(), *(name for name in _DECISIVE if name in flags)])


def choose_devices(
    spec: StudySpec,
    info: ModelInfo,
    cuda: Any = torch.cuda,
    nvidia_smi: str = "nvidia-smi",
    *,
    several: bool = False,
    ram_bytes: int | None = None,
) -> Devices:
    """The processor if no GPU is requested or available, else as few GPUs as hold the model, for each of several processes.

    cuda: `torch.cuda`, or a module with its interface. several: whether the caller can run several processes. ram_bytes: main
    memory that is free for them (default: as it is found). What is free on GPUs is asked where one process computes: of
    several, each asks for itself, since the question takes memory of a GPU for as long as the process lives.

    Raises PlanRefused, with both numbers, if the GPUs don't hold the model or another process uses their memory; also if they
    can't compute with quantized weights, and if torch can't use the GPUs of this machine: a rented GPU must not idle unnoticed.
    """
    devices = _choose(spec, info, cuda, nvidia_smi, (ram_bytes or free_ram_bytes()) if several else None)
    if info.quantization is not None:
        check_place(info, torch_place(devices.placement.gpus if devices.placement else (), cuda))
    return devices


def torch_place(numbers: tuple[int, ...], cuda: Any = torch.cuda) -> Place:
    """This machine with the GPUs of these numbers, as torch finds them, for weights that stay quantized."""
    found = [cuda.get_device_properties(number) for number in numbers]
    return Place(tuple((gpu.name, (int(gpu.major), int(gpu.minor))) for gpu in found), installed_packages())


def _choose(spec: StudySpec, info: ModelInfo, cuda: Any, nvidia_smi: str, ram_bytes: int | None) -> Devices:
    """ram_bytes: main memory that is free for several processes; None for one process."""
    asked = spec.compute.gpu_count
    if asked == 0:
        return Devices("cpu")
    if not cuda.is_available():
        _check_unused(asked, nvidia_smi)
        return Devices("cpu")
    found = [cuda.get_device_properties(number) for number in range(cuda.device_count())]
    gpus, names = [Gpu(gpu.name, int(gpu.total_memory)) for gpu in found], tuple(gpu.name for gpu in found)
    demand = demand_of(spec, info)
    if ram_bytes is None:
        placed = demand.place(gpus, asked)
    else:
        placed, *others = demand.place_all(gpus, asked, ram_bytes)
        if others:
            return Devices(_kind(placed, names), placed, tuple(others))
    for number in placed.gpus:
        free, total = cuda.mem_get_info(number)
        needed = placed.weight_bytes(number) + placed.work_bytes
        if needed > free:
            wanted, left, whole = amounts(needed, free, total, unit="GB")
            raise PlanRefused(
                f"GPU {number} ({found[number].name}) has {left.removesuffix(' GB')} of {whole} free, and the study needs "
                f"{wanted} there: end what else uses it, or name other GPUs with CUDA_VISIBLE_DEVICES"
            )
    return Devices(_kind(placed, names), placed)


def _check_unused(asked: int | None, nvidia_smi: str) -> None:
    """Raise PlanRefused if GPUs are here, or were requested, and torch can't use any."""
    here = find_gpus(nvidia_smi, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not here and not asked:
        return
    there = ", ".join(sorted({gpu.name for gpu in here})) or "no GPU that nvidia-smi knows"
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the processor alone"
    raise PlanRefused(
        f"this machine has {there}, and torch {torch.__version__}, built {built}, can't use one: install a torch for its "
        "driver, or give --gpu-count 0 to compute without"
    )


def _kind(placed: Placement, names: tuple[str, ...]) -> str:
    """`NVIDIA A100` for one or several alike, whose number moves no bit; unlike ones are named with their layers."""
    kinds = {names[number] for number in placed.gpus}
    if len(kinds) == 1:
        return kinds.pop()
    return ", ".join(f"{names[number]} (layers {placed.layers(number)})" for number in placed.gpus)
