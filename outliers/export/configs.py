"""Settings of quantizers that take names of modules: bitsandbytes, ModelOpt, GPTQModel, AutoRound, torchao, llama-quantize.

Each function returns plain values, as that program reads them from JSON or a text file. How each matches a name differs, and
is written at the function.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.errors import BadInput
from outliers.export.gguf_names import gguf_names
from outliers.export.recipes import check_linear
from outliers.export.skips import GATE, Skips
from outliers.export.source import SITES, Study
from outliers.model.readers import Reader

GROUP = 128
"""Weights that share a scale, the default of GPTQModel and AutoRound."""


def bitsandbytes(study: Study, skips: Skips) -> dict[str, Any]:
    """`quantization_config` of LLM.int8(): the threshold is the study's magnitude.

    transformers takes a name as the beginning of a pattern and as the end of a path (quantizers_utils.should_convert_module),
    and a list replaces its own, which has the head. A whole path fits that module alone, and all experts of a layer.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": study.prepared.spec.criteria.magnitude,
        "llm_int8_skip_modules": [*skips.always, *skips.projections, *skips.experts],
    }


MODELOPT: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "INT8": ({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}, "max"),
    "FP8": ({"num_bits": [4, 3], "axis": None}, {"num_bits": [4, 3], "axis": None}, "max"),
    "NVFP4": ({}, {}, "max"),
    "MXFP4": ({}, {}, None),
    "MXFP8": ({}, {}, None),
}
"""Scheme -> (weights, inputs, algorithm) of ModelOpt 0.47's presets INT8_DEFAULT_CFG and so on."""
_BLOCKS: dict[str, dict[str, Any]] = {
    "NVFP4": {"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}},
    "MXFP4": {"num_bits": [2, 1], "block_sizes": {"-1": 32, "type": "dynamic", "scale_bits": [8, 0]}},
    "MXFP8": {"num_bits": [4, 3], "block_sizes": {"-1": 32, "type": "dynamic", "scale_bits": [8, 0]}},
}


def modelopt(
    study: Study, skips: Skips, scheme: str
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]], list[Reader]]:
    """A config of ModelOpt, the range of each input for it, and the modules whose range is not known.

    Later entries of the list win; a name is matched as a shell pattern, from end to end. Only quantizers of the decoder layers
    are turned on, so that heads, embeddings and vision towers stay. The ranges are `<module>.input_quantizer.amax`, float32 (),
    the largest abs; a scheme whose scales all come from the tensor at hand has none. Raises BadInput.
    """
    weights, inputs, algorithm = MODELOPT[scheme]
    weights, inputs = weights or _BLOCKS[scheme], inputs or _BLOCKS[scheme]
    anatomy = study.prepared.model.anatomy
    layers = f"{anatomy.backbone}.{anatomy.layers}."
    entries: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": f"{layers}*weight_quantizer", "cfg": weights},
        {"quantizer_name": f"{layers}*input_quantizer", "cfg": inputs},
        {"quantizer_name": "*.conv1d.*", "enable": False},
    ]
    off = (*skips.always, *skips.projections, *skips.experts)
    entries += [{"quantizer_name": f"{name}.*", "enable": False} for name in off]
    config = {"quant_cfg": entries, "algorithm": algorithm}
    if algorithm is None:
        return config, {}, []
    layers_of = {site: {r.layer for r in study.readers if r.site == site} for site in SITES}
    whole = set(range(study.prepared.model.num_layers))
    study.check_sites(tuple(site for site in SITES if layers_of[site] == whole), "modelopt")
    wanted = [r for r in study.readers if r.name not in off and r.kind != "router"]
    known = [r for r in wanted if r.kind == "projection" and r.site is not None and study.has(r.site, r.layer)]
    amax = {
        f"{r.name}.input_quantizer.amax": np.array(study.columns(r.site, r.layer).peak, np.float32)
        for r in known
        if r.site is not None
    }
    return config, amax, [r for r in wanted if r not in known]


def gptqmodel(study: Study, skips: Skips, scheme: str) -> dict[str, Any]:
    """A QuantizeConfig: `-:` leaves a module alone. A pattern is matched from the start of a name (`re.match`)."""
    names = [f"-:^{re.escape(name)}$" for name in (*skips.always, *skips.projections)]
    names += [f"-:^{re.escape(name)}\\." for name in skips.experts]
    return {
        "quant_method": "gptq",
        "bits": _BITS[scheme],
        "group_size": GROUP,
        "sym": True,
        "dynamic": {name: {} for name in names},
    }


def autoround(study: Study, skips: Skips, scheme: str) -> dict[str, Any]:
    """`quantization_config` of AutoRound; its tuner takes `extra_config` as the argument layer_config. Names are whole paths."""
    return {
        "quant_method": "auto-round",
        "bits": _BITS[scheme],
        "group_size": GROUP,
        "sym": True,
        "data_type": "int",
        "extra_config": {name: {"bits": 16} for name in (*skips.always, *skips.projections, *skips.experts)},
    }


_BITS = {"W4A16": 4, "W8A16": 8}
"""Weights in 4 or 8 bits, activations in 16: what GPTQModel and AutoRound make."""

_ROWS = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
TORCHAO: dict[str, dict[str, Any]] = {
    "INT8": {
        "_type": "Int8DynamicActivationInt8WeightConfig",
        "_version": 2,
        "_data": {"act_mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}, "granularity": _ROWS},
    },
    "INT8_WEIGHTS": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"granularity": _ROWS}},
    "FP8": {
        "_type": "Float8DynamicActivationFloat8WeightConfig",
        "_version": 2,
        "_data": {"granularity": [_ROWS, _ROWS]},
    },
}
"""Scheme -> a config of torchao 0.18, as torchao.core.config.config_to_dict writes it."""


def torchao(study: Study, skips: Skips, scheme: str) -> dict[str, Any]:
    """`quantization_config` with an FqnToConfig: what has null is left alone. A whole name goes before a pattern, which stands
    behind `re:` and fits from end to end. Experts that are one module are not a torch.nn.Linear, and stay as they are."""
    check_linear(study, "torchao")
    anatomy = study.prepared.model.anatomy
    base = f"{anatomy.backbone}.{anatomy.layers}."
    kinds = dict.fromkeys(
        reader.name.removeprefix(f"{base}{reader.layer}.")
        for reader in study.readers
        if reader.kind == "projection" and reader.name not in skips.always
    )
    table: dict[str, Any] = dict.fromkeys((*skips.always, *skips.projections))
    table[f"re:{re.escape(base)}\\d+\\.({'|'.join(map(re.escape, kinds))})"] = TORCHAO[scheme]
    config = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": table}}
    return {"quant_method": "torchao", "quant_type": {"default": config}}


def llama_quantize(study: Study, skips: Skips, scheme: str) -> str:
    """Lines for `llama-quantize --tensor-type-file`: PATTERN=TYPE. A pattern is searched in the name of a tensor.

    Routers are left in the type that llama-quantize gives them. Raises BadInput where nothing is listed.
    """
    readers = tuple(reader for reader, _ in skips.large if not reader.name.endswith(GATE))
    layers: dict[str, list[int]] = {}
    for reader in sorted(readers, key=lambda found: found.layer):
        if reader.name in skips.always:
            continue
        for name in gguf_names(study, (reader,))[reader.name]:
            # of experts in one module, the input is that of the first two projections
            if not name.endswith("_down_exps.weight"):
                layers.setdefault(name.removeprefix(f"blk.{reader.layer}."), []).append(reader.layer)
    if not layers:
        raise BadInput(
            "there is no module to list for llama-quantize: give --skip-above X, below the largest abs of some input"
        )
    return "".join(
        f"^blk\\.({'|'.join(map(str, numbers))})\\.{re.escape(name)}$={scheme}\n" for name, numbers in layers.items()
    )
