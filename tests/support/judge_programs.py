"""What quantizers make of exported files, as JSON: run by an interpreter that has the quantizer, without this package.

`PYTHON judge_programs.py NAME FOLDER`; the folder has model/ (config, weights), ids.json, and the files of one export, which
begin with the format's name. Each function returns what `tests/export/test_judges.py` compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def model_of(folder, **more):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", **({"dtype": torch.float32} | more)).eval()


def ids_of(folder):
    import torch

    return torch.tensor(json.loads((folder / "ids.json").read_text()))


def config_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def linear_of(model):
    import torch

    return sorted(name for name, module in model.named_modules() if type(module) is torch.nn.Linear)


def bitsandbytes(folder):
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig.from_dict(config_of(folder, "bitsandbytes"))
    model = model_of(folder, quantization_config=config, device_map="cpu")
    with torch.inference_mode():
        logits = model(input_ids=ids_of(folder)[:1, :16]).logits
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    thresholds = {m.state.threshold for n, m in model.named_modules() if kinds[n] == "Linear8bitLt"}
    return {"plain": linear_of(model), "thresholds": sorted(thresholds), "finite": bool(torch.isfinite(logits).all())}


def llmcompressor(folder):
    from llmcompressor.recipe import Recipe

    path = folder / "llm-compressor.yaml"
    found = {"modifiers": [type(m).__name__ for m in Recipe.create_instance(str(path)).modifiers]}
    wrong = folder / "wrong.yaml"
    wrong.write_text(path.read_text().replace("smoothing_strength", "smoothing_power"))
    try:
        Recipe.create_instance(str(wrong))
        found["refuses"] = False
    except ValueError as error:  # of pydantic
        found["refuses"] = "smoothing_power" in str(error)
    return found | smoothed(folder, path)


def smoothed(folder, path):
    """Weights that SmoothQuant makes with our ranges, and with its own calibration over the same ids."""
    import torch
    from llmcompressor.modifiers.transform.smoothquant.base import SmoothQuantScale
    from llmcompressor.recipe import Recipe
    from safetensors.torch import load_file

    def modifier(model):
        (made,) = (m for m in Recipe.create_instance(str(path)).modifiers if "SmoothQuant" in type(m).__name__)
        made.ignore = []
        made.resolved_mappings_ = made._resolve_mappings(model)
        made.scales_ = {}
        return made

    ours, theirs = model_of(folder), model_of(folder)
    own = modifier(theirs)
    own._setup_scale_hooks()
    with torch.inference_mode():
        for row in ids_of(folder):
            theirs(input_ids=row[None])
    own.remove_hooks()
    own._apply_smoothing(theirs)
    given, ranges = modifier(ours), load_file(folder / "llm-compressor.smoothquant.safetensors")
    norms = {mapping.smooth_name for mapping in given.resolved_mappings_}
    given.scales_ = {name: SmoothQuantScale(ranges[f"{name}.min"], ranges[f"{name}.max"]) for name in norms}
    given._apply_smoothing(ours)
    untouched = model_of(folder).state_dict()
    pairs = [(a, theirs.state_dict()[name], untouched[name]) for name, a in ours.state_dict().items()]
    return {
        "norms": len(norms),
        "weights": len(pairs),
        "equal": sum(bool(torch.equal(a, b)) for a, b, _ in pairs),
        "changed": sum(not torch.equal(a, c) for a, _, c in pairs),
        "worst": max(float(((a - b).abs() / b.abs().clamp_min(1e-12)).max()) for a, b, _ in pairs),
    }


def modelopt(folder):
    import modelopt.torch.quantization as mtq
    import torch
    from safetensors.torch import load_file

    config, ids = config_of(folder, "modelopt"), ids_of(folder)

    def forward(model):
        for row in ids:
            model(input_ids=row[None])

    with torch.no_grad():
        theirs = mtq.quantize(model_of(folder), config, forward)
        ours = mtq.quantize(model_of(folder), config, lambda model: model(input_ids=ids[:1, :4]))
        amax = load_file(folder / "modelopt.amax.safetensors")
        modules = dict(ours.named_modules())
        for name, value in amax.items():
            modules[name.removesuffix(".amax")].amax = value
        quantizers = {
            name: module
            for name, module in theirs.named_modules()
            if name.endswith("input_quantizer") and module.is_enabled
        }
        worst = max(float((amax[f"{name}.amax"] - q.amax).abs() / q.amax) for name, q in quantizers.items())
        logits = [model(input_ids=ids[:1]).logits for model in (ours, theirs)]
    return {
        "quantizers": len(quantizers),
        "same_names": {f"{name}.amax" for name in quantizers} == set(amax),
        "worst": worst,
        "logits": float((logits[0] - logits[1]).abs().max()),
    }


def gptqmodel(folder):
    from gptqmodel import QuantizeConfig

    config = config_of(folder, "gptqmodel")
    config.pop("quant_method")
    read = QuantizeConfig(**config)
    names = linear_of(model_of(folder))
    return {"bits": read.bits, "plain": [name for name in names if read.dynamic_get(name) is False]}


def autoround(folder):
    from auto_round import AutoRound
    from transformers import AutoRoundConfig, AutoTokenizer

    config = config_of(folder, "autoround")
    read = AutoRoundConfig.from_dict(dict(config))
    model = model_of(folder)
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder / "model"),
        scheme="W4A16",
        layer_config=config["extra_config"],
        iters=0,
    )
    return {"read": read.extra_config, "bits": read.bits, "tuner": sorted(tuner.layer_config)}


def torchao(folder):
    import torch
    from torchao.quantization import quantize_
    from transformers import TorchAoConfig

    read = TorchAoConfig.from_dict(config_of(folder, "torchao"))
    model = model_of(folder)
    quantize_(model, read.quant_type, filter_fn=None)
    with torch.inference_mode():
        logits = model(input_ids=ids_of(folder)[:1, :16]).logits
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight.data) is torch.Tensor
    ]
    return {"plain": sorted(plain), "finite": bool(torch.isfinite(logits).all())}


if __name__ == "__main__":
    print("\n" + json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
