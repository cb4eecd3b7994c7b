"""The table of formats: what each is called, which schemes it knows, and which function makes its files.

`make_export` is the one entry: a study and a request in, the bytes of one or two files and sentences about them out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from outliers.errors import BadInput
from outliers.export import configs, recipes
from outliers.export.imatrix import imatrix_dat, imatrix_gguf
from outliers.export.scales import act_scales, pickle_bytes, safetensors_bytes
from outliers.export.skips import Skips, find_skips
from outliers.export.source import ALL_SITES, Study

PICKLE = ".pt"
"""Ending of --out that asks for a pickle."""


@dataclass(frozen=True)
class ExportRequest:
    """What is asked for. `suffix`: the ending of the file's name. `scheme`: "" for the format's own default."""

    to: str
    suffix: str = ""
    sums: bool = False
    skip_above: float | None = None
    scheme: str = ""
    smoothing: float | None = None


@dataclass
class Exported:
    """What was made: the file, further files by the ending of their names, and what a person must know."""

    content: bytes
    beside: dict[str, bytes] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """One format. `schemes`: the first is the default. `lists`: whether modules can be left alone in it. `bitwise`: whether
    numbers in it are compared with another program's."""

    make: Callable[[Study, ExportRequest, Skips], Exported]
    says: str
    schemes: tuple[str, ...] = ()
    lists: bool = True
    bitwise: bool = False


def make_export(study: Study, request: ExportRequest) -> Exported:
    """The bytes of a study in a format. Raises BadInput for an option that the format has no use for, and for what is missing."""
    target = check_request(request)
    scheme = request.scheme or (target.schemes[0] if target.schemes else "")
    asked = ExportRequest(**(vars(request) | {"scheme": scheme}))
    skips = find_skips(study, request.skip_above) if target.lists else Skips(())
    made = target.make(study, asked, skips)
    if target.lists:
        made.lines += skips.lines()[
            request.to == "llama-quantize" :
        ]  # which has its own rule for the head and for routers
    if target.bitwise and study.prepared.model.dtype != "float32":
        made.lines.append(
            f"the study computed in {study.prepared.model.dtype}: its numbers are not those of a program in float32 "
            "(sums of squares by up to 1%, in single columns of o_in by half); run it with --dtype float32 to compare"
        )
    return made


def check_request(request: ExportRequest) -> Target:
    """The format that is asked for. Raises BadInput for one that is not known, and for an option that it has no use for."""
    target = TARGETS.get(request.to)
    if target is None:
        raise BadInput(f"--to {request.to} is not a format; there is: {', '.join(TARGETS)}")
    if request.scheme and request.scheme not in target.schemes:
        there = f"it knows {', '.join(target.schemes)}" if target.schemes else "it has none"
        raise BadInput(f"--scheme {request.scheme} is not a scheme of {request.to}: {there}")
    if request.skip_above is not None and not target.lists:
        raise BadInput(f"--skip-above has no meaning in {request.to}, which lists no modules")
    if request.sums and request.to != "imatrix":
        raise BadInput(f"--sums is for --to imatrix; {request.to} holds no sums of x")
    if request.smoothing is not None and request.to != "llm-compressor":
        raise BadInput(f"--smoothing is for --to llm-compressor; {request.to} does not smooth")
    if request.smoothing is not None and not 0 <= request.smoothing <= 1:
        raise BadInput(f"--smoothing {request.smoothing:g} is not between 0, which turns it off, and 1")
    return target


def _imatrix(study: Study, request: ExportRequest, skips: Skips) -> Exported:
    content, lines = imatrix_gguf(study, request.sums)
    return Exported(content, lines=lines)


def _dat(study: Study, request: ExportRequest, skips: Skips) -> Exported:
    content, lines = imatrix_dat(study)
    return Exported(content, lines=lines)


def _scales(study: Study, request: ExportRequest, skips: Skips) -> Exported:
    scales, missing = act_scales(study)
    lines = []
    if missing:
        kinds = dict.fromkeys(reader.name.rpartition(".")[2] for reader in missing)
        lines.append(f"without scales, because their input was not captured ({ALL_SITES}): {', '.join(kinds)}")
    if request.suffix == PICKLE:
        lines.append("a .pt file is a pickle: whoever loads it must trust it; .safetensors holds the same")
        return Exported(pickle_bytes(scales), lines=lines)
    return Exported(safetensors_bytes(scales), lines=lines)


def _recipe(study: Study, request: ExportRequest, skips: Skips) -> Exported:
    default = recipes.STRENGTH if request.scheme in recipes.SMOOTHED else 0.0
    strength = default if request.smoothing is None else request.smoothing
    text, ranges = recipes.recipe(study, skips, request.scheme, strength)
    if not ranges:
        return Exported(text.encode())
    lines = [
        "the ranges of the norms that SmoothQuant divides are in a file next to it (docs/export.md says how they get in)"
    ]
    layers = study.prepared.model.anatomy.moe_layers
    if layers:
        lines.append(f"not smoothed: the input of the experts in {len(layers)} layers, which routers read too")
    return Exported(text.encode(), {".smoothquant.safetensors": safetensors_bytes(ranges)}, lines)


def _compressed(study: Study, request: ExportRequest, skips: Skips) -> Exported:
    return _json(recipes.quantization_config(study, skips, request.scheme))


def _bitsandbytes(study: Study, request: ExportRequest, skips: Skips) -> Exported:
    return _json(configs.bitsandbytes(study, skips))


def _modelopt(study: Study, request: ExportRequest, skips: Skips) -> Exported:
    config, amax, unknown = configs.modelopt(study, skips, request.scheme)
    made = _json(config)
    if amax:
        made.beside[".amax.safetensors"] = safetensors_bytes(amax)
        made.lines.append("the range of each input is in a file next to it (docs/export.md says how it gets in)")
    if unknown:
        kinds = dict.fromkeys(reader.name.rpartition(".")[2] for reader in unknown)
        made.lines.append(f"without a range, and to be calibrated: {', '.join(kinds)}")
    return made


def _gptqmodel(study: Study, request: ExportRequest, skips: Skips) -> Exported:
    return _json(configs.gptqmodel(study, skips, request.scheme))


def _autoround(study: Study, request: ExportRequest, skips: Skips) -> Exported:
    return _json(configs.autoround(study, skips, request.scheme))


def _torchao(study: Study, request: ExportRequest, skips: Skips) -> Exported:
    return _json(configs.torchao(study, skips, request.scheme))


def _llama_quantize(study: Study, request: ExportRequest, skips: Skips) -> Exported:
    return Exported(configs.llama_quantize(study, skips, request.scheme).encode())


def _json(content: Mapping[str, Any]) -> Exported:
    return Exported((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


TARGETS: dict[str, Target] = {
    "imatrix": Target(_imatrix, "importance matrix of llama.cpp, GGUF", lists=False, bitwise=True),
    "imatrix-dat": Target(_dat, "the same in its older form", lists=False, bitwise=True),
    "act-scales": Target(_scales, "scales of SmoothQuant's own library", lists=False, bitwise=True),
    "llm-compressor": Target(_recipe, "recipe of llm-compressor", tuple(recipes.SCHEMES), bitwise=True),
    "compressed-tensors": Target(_compressed, "quantization_config of compressed-tensors", tuple(recipes.SCHEMES)),
    "bitsandbytes": Target(_bitsandbytes, "quantization_config of LLM.int8()"),
    "modelopt": Target(_modelopt, "config of ModelOpt, and ranges", tuple(configs.MODELOPT), bitwise=True),
    "gptqmodel": Target(_gptqmodel, "QuantizeConfig of GPTQModel", ("W4A16", "W8A16")),
    "autoround": Target(_autoround, "quantization_config of AutoRound", ("W4A16", "W8A16")),
    "torchao": Target(_torchao, "quantization_config of torchao", tuple(configs.TORCHAO)),
    "llama-quantize": Target(_llama_quantize, "types of tensors for llama-quantize", ("q8_0", "f16", "bf16", "f32")),
}
"""Name of a format, as --to takes it, -> how it is made."""
