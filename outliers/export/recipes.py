"""A recipe of llm-compressor, and the quantization_config of compressed-tensors: schemes, and what to leave alone.

SmoothQuant in llm-compressor takes the range of a norm's output, column by column, from a calibration of its own. A study has
that range: it is written next to the recipe. Source: llm-compressor 0.14, modifiers/transform/smoothquant/base.py; the schemes
are presets of compressed-tensors 0.20, quantization/quant_scheme.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.errors import BadInput
from outliers.export.skips import Skips
from outliers.export.source import Study
from outliers.model.families import INPUT
from outliers.model.readers import TRANSPOSED

SMOOTHED = ("W8A8",)
"""Schemes with int8 activations, for which smoothing is on by default."""
STRENGTH = 0.5
"""SmoothQuant's alpha (section 4, arXiv 2211.10438), and llm-compressor's default."""
UNWEIGHTED = ("OlmoForCausalLM",)
"""Families whose norms have no weight that could be divided."""


def _int(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False} | more


def _float(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return _int(bits, strategy) | {"type": "float"} | more


_NV: dict[str, Any] = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
_MX: dict[str, Any] = {"group_size": 32, "scale_dtype": "torch.uint8"}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "W8A8": (
        "int-quantized",
        {"weights": _int(8, "channel"), "input_activations": _int(8, "token", dynamic=True)},
    ),
    "W8A16": ("pack-quantized", {"weights": _int(8, "group", group_size=128)}),
    "W4A16": ("pack-quantized", {"weights": _int(4, "group", group_size=128)}),
    "FP8": (
        "float-quantized",
        {
            "weights": _float(8, "tensor"),
            "input_activations": _float(8, "tensor", observer="static_minmax"),
        },
    ),
    "FP8_DYNAMIC": (
        "float-quantized",
        {"weights": _float(8, "channel"), "input_activations": _float(8, "token", dynamic=True)},
    ),
    "NVFP4": (
        "nvfp4-pack-quantized",
        {
            "weights": _float(4, "tensor_group", **_NV),
            "input_activations": _float(4, "tensor_group", **_NV, dynamic="local", observer="static_minmax"),
        },
    ),
    "NVFP4A16": ("nvfp4-pack-quantized", {"weights": _float(4, "tensor_group", **_NV)}),
    "MXFP4": (
        "mxfp4-pack-quantized",
        {"weights": _float(4, "group", **_MX), "input_activations": _float(4, "group", **_MX, dynamic=True)},
    ),
    "MXFP4A16": ("mxfp4-pack-quantized", {"weights": _float(4, "group", **_MX)}),
}
"""Scheme -> (how its weights are stored, its arguments)."""


def check_linear(study: Study, program: str) -> None:
    """BadInput for a family without a torch.nn.Linear: `program` would quantize nothing of it."""
    architecture = study.prepared.model.architecture
    if architecture in TRANSPOSED:
        raise BadInput(
            f"{program} quantizes torch.nn.Linear, and the projections of {architecture} are transformers' Conv1D: it would "
            "leave the whole model as it is"
        )


def ignored(skips: Skips) -> list[str]:
    """What compressed-tensors and llm-compressor leave alone: names, and patterns behind `re:`, which match from the start."""
    # a module of experts is taken apart into projections before it is quantized
    experts = [f"re:{re.escape(name)}(\\.|$)" for name in skips.experts]
    return [*skips.always, *skips.projections, *experts]


def quantization_config(study: Study, skips: Skips, scheme: str) -> dict[str, Any]:
    """`quantization_config` of a checkpoint, as compressed-tensors reads it."""
    check_linear(study, "compressed-tensors")
    stored, arguments = SCHEMES[scheme]
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "initialized",
        "config_groups": {"group_0": {"targets": ["Linear"]} | arguments},
        "ignore": ignored(skips),
    }


def recipe(study: Study, skips: Skips, scheme: str, strength: float) -> tuple[str, dict[str, NDArray[np.float32]]]:
    """A recipe as YAML, and the ranges of the norms that it smooths; no ranges where `strength` is 0.

    Raises BadInput where the ranges were not captured, and for a family whose norms can't be smoothed.
    """
    check_linear(study, "llm-compressor")
    modifiers: dict[str, Any] = {}
    ranges: dict[str, NDArray[np.float32]] = {}
    if strength:
        mappings, ranges = smoothing(study)
        modifiers["SmoothQuantModifier"] = {"smoothing_strength": strength, "mappings": mappings}
    modifiers["QuantizationModifier"] = {"targets": ["Linear"], "scheme": scheme, "ignore": ignored(skips)}
    return dump_yaml({"default_stage": {"default_modifiers": modifiers}}), ranges


def smoothing(study: Study) -> tuple[list[list[Any]], dict[str, NDArray[np.float32]]]:
    """Mappings [[patterns of projections], pattern of a norm], and `<norm>.min`, `<norm>.max` float32 (W) of its output.

    Layers of experts keep their second norm: what divides it would have to multiply routers and experts too. Raises BadInput.
    """
    model = study.prepared.model
    anatomy = model.anatomy
    if anatomy.sites["attn_in"][0].endswith(INPUT) or model.architecture in UNWEIGHTED:
        why = "its norms have no weight" if model.architecture in UNWEIGHTED else "no norm comes before its projections"
        raise BadInput(f"SmoothQuant divides a norm's weight, and of {model.architecture} {why}: give --smoothing 0")
    study.check_sites(("attn_in", "mlp_in"), "SmoothQuant")
    ranges: dict[str, NDArray[np.float32]] = {}
    groups: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for layer in range(model.num_layers):
        base = f"{anatomy.backbone}.{anatomy.layers}.{layer}."
        shared = anatomy.sites["attn_in"][layer] == anatomy.sites["mlp_in"][layer]
        for site in ("attn_in",) if shared else ("attn_in", "mlp_in"):
            readers = [*study.reads(site, layer), *(study.reads("mlp_in", layer) if shared else ())]
            if any(reader.kind != "projection" for reader in readers):
                continue
            norm = f"{anatomy.backbone}.{anatomy.sites[site][layer]}"
            columns = study.columns(site, layer)
            ranges |= {f"{norm}.min": columns.least, f"{norm}.max": columns.largest}
            key = (tuple(reader.name.removeprefix(base) for reader in readers), norm.removeprefix(base))
            groups.setdefault(key, []).append(layer)
    begin = re.escape(f"{anatomy.backbone}.{anatomy.layers}.")
    return [_mapping(begin, *key, layers, model.num_layers) for key, layers in groups.items()], ranges


def _mapping(begin: str, readers: Iterable[str], norm: str, layers: list[int], of: int) -> list[Any]:
    number = r"\d+" if len(layers) == of else f"({'|'.join(map(str, layers))})"
    return [
        [f"re:{begin}{number}\\.{re.escape(name)}$" for name in readers],
        f"re:{begin}{number}\\.{re.escape(norm)}$",
    ]


def dump_yaml(content: dict[str, Any], indent: int = 0) -> str:
    """YAML of nested dicts; what is inside of them is written as JSON, which is YAML too."""
    lines = []
    for key, value in content.items():
        begin = f"{' ' * indent}{key}:"
        lines.append(
            f"{begin}\n{dump_yaml(value, indent + 2)}" if isinstance(value, dict) else f"{begin} {json.dumps(value)}\n"
        )
    return "".join(lines)
