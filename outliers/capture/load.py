"""Loads the weights of a described model onto the machine's devices. Only this module reads weights.

Weights of the hub are first downloaded into the hub's cache. Only safetensors are read, and no remote code is run. An
incomplete checkpoint is refused (`model.complete`), and FP8 is dequantized by our own product (`model.fp8`). If the machine
can't compute as the description says (a quantization that needs a GPU, a missing implementation), that is an error: it never
silently changes the arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliers.capture.devices import torch_place
from outliers.capture.library_errors import explained
from outliers.errors import PlanRefused
from outliers.hub.headers import Tensor, read_checkpoint
from outliers.model.complete import (
    check_checkpoint,
    check_promised,
    check_report,
    promised_weights,
    without_quantization,
)
from outliers.model.describe import ModelInfo, build_empty, check_place, method_of, quantization_of
from outliers.model.foreign import foreign
from outliers.model.fp8 import LazyWeight, pairs, plain_shapes
from outliers.model.loading import read_report
from outliers.model.pretrained import load_config
from outliers.units import amounts
from outliers.workspace import Workspace

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MEMORY = "end what else uses it, choose a machine with more (--min-cpu-ram, --min-vram), or more GPUs (--gpu-count)"
PLAIN = "give --quantization none, where the weights were to stay quantized"
"""Remedies for exhausted memory and for a missing package."""

DeviceMap = Mapping[str, str | int]
"""Module's name ("" for the whole model) -> torch device, or number of a GPU."""


def load_model(
    info: ModelInfo, workspace: Workspace, devices: str | DeviceMap, *, head: bool = True
) -> torch.nn.Module:
    """The model with its weights on `devices` (one, or a device map), ready for inference, in the arithmetic that `info` names.

    head: whether its head is used; if not, a checkpoint may lack it. Every other weight comes from the checkpoint. Raises
    UnknownModel if the weights can't be read, PlanRefused if this machine can't compute with them, MemoryFull, and
    HubUnavailable and DiskFull of a download.
    """
    options = loading_options(info, workspace, devices)
    place = Path(fetch_weights(info, workspace))
    check_checkpoint(info, workspace, head=head)
    config = load_config(info.source, workspace)
    what = f"loading {info.source.name} ({amounts(info.weight_bytes)[0]} of weights)"
    with foreign(f"the weights of {info.source.name} can't be read"), explained(what, MEMORY, PLAIN):
        model, report = _from_files(place, config, info, options)
    check_report(read_report(report), info, config, head=head)
    if info.quantization is None:
        check_promised(model, info, promised_weights(info, config))
    check_arithmetic(model, info)
    return model.eval()


def loading_options(info: ModelInfo, workspace: Workspace, devices: str | DeviceMap) -> dict[str, Any]:
    """Options of `from_pretrained` for the arithmetic that `info` names. Raises PlanRefused."""
    import torch

    where = {"": devices} if isinstance(devices, str) else dict(devices)
    options: dict[str, Any] = {
        "dtype": getattr(torch, info.dtype),
        "attn_implementation": info.attention_implementation,
        "use_safetensors": True,
        "device_map": where,
        "output_loading_info": True,
    }
    if info.experts_implementation:
        options["experts_implementation"] = info.experts_implementation
    return options | _quantization(info, workspace, where)


def _from_files(
    place: Path, config: Any, info: ModelInfo, options: dict[str, Any]
) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """The model of a folder and what its loader reports. FP8 that is made plain is multiplied by its scales here."""
    from transformers import AutoModelForCausalLM

    quantization = quantization_of(config)
    loaded: Any
    if info.source.kind == "gguf" or info.quantization is not None or method_of(quantization) != "fp8":
        loaded = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=False, **options)
        return loaded[0], loaded[1]
    plain = {key: value for key, value in options.items() if key != "quantization_config"}
    with ExitStack() as opened:
        weights = _plain_weights(read_checkpoint(place), quantization, info.source.name, opened)
        model_class = type(build_empty(config, info.dtype, info.source.name))
        config = without_quantization(config)
        loaded = model_class.from_pretrained(None, trust_remote_code=False, config=config, state_dict=weights, **plain)
        return loaded[0], loaded[1]


def _plain_weights(
    tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None, name: str, opened: ExitStack
) -> dict[str, Any]:
    """Name -> an object that gives the weight without scales when it is sliced, so that one weight at a time is in memory."""
    from safetensors import safe_open

    files = {tensor.file for tensor in tensors.values()}
    readers = {file: opened.enter_context(safe_open(file, framework="pt")) for file in files}
    slices = {key: readers[tensor.file].get_slice(key) for key, tensor in tensors.items()}
    found: dict[str, Any] = {key: slices[key] for key in plain_shapes(tensors, quantization, name)}
    for pair in pairs(tensors, quantization, name):
        found[pair.weight] = LazyWeight(slices[pair.weight], slices[pair.scale], pair.block)
    return found


def fetch_weights(info: ModelInfo, workspace: Workspace, progress: Callable[[int, int], None] | None = None) -> str:
    """The folder of the weights on this machine; missing weights of the hub are downloaded.

    progress: called with (done_bytes, total_bytes) of a download. Raises what `download_model` raises.
    """
    from outliers.hub.download import download_model
    from outliers.model.gguf import gguf_weights

    source = info.source
    if source.kind == "hub":
        return str(download_model(source.path, source.revision, progress=progress))
    return str(gguf_weights(source, workspace)) if source.kind == "gguf" else source.path


def _quantization(info: ModelInfo, workspace: Workspace, where: DeviceMap) -> dict[str, Any]:
    """Options that dequantize a checkpoint if that is requested; refuses what this device would dequantize by itself."""
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    stored = method_of(quantization_of(load_config(info.source, workspace)))
    if info.source.kind == "gguf" or stored is None:
        return {}
    if info.quantization is None:
        configs = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
        return {"quantization_config": configs[stored](dequantize=True)}
    numbers = () if "cpu" in where.values() else tuple(int(device) for device in dict.fromkeys(where.values()))
    check_place(info, torch_place(numbers))
    return {}


def check_arithmetic(model: Any, info: ModelInfo) -> None:
    """Check that the loaded model is the described one: transformers may fall back with only a warning. Raises PlanRefused."""
    quantizer = getattr(model, "hf_quantizer", None)
    undone = quantizer is not None and getattr(quantizer.quantization_config, "dequantize", False)
    if info.quantization is not None and undone:
        raise PlanRefused(
            f"{info.source.name} is stored in {info.quantization}, and the libraries of this machine made it plain although it "
            "was to stay: give --quantization none, which is another study"
        )
    found = str(model.config._attn_implementation)
    if found != info.attention_implementation:
        raise PlanRefused(
            f"attention runs as {found} here, the study was described with {info.attention_implementation}: "
            "other values would come out"
        )
    experts = getattr(model.config, "_experts_implementation", None)
    if info.experts_implementation is not None and str(experts) != info.experts_implementation:
        raise PlanRefused(
            f"experts run as {experts} here, the study was described with {info.experts_implementation}: other values would "
            "come out"
        )
