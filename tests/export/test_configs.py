"""Settings of quantizers, read by those programs where they are here, else by their rule of matching, against brute force."""

from __future__ import annotations

import fnmatch
import json
import re

import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.utils import match_modules_set, match_named_modules
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from outliers.errors import BadInput
from outliers.export.configs import MODELOPT
from outliers.export.formats import TARGETS, ExportRequest, make_export
from outliers.export.recipes import SCHEMES
from outliers.export.skips import find_skips
from tests.support import exports

EVERY = 7.0
"""A limit that some inputs of the tiny model are above, and some are not."""


@pytest.fixture(scope="session")
def modules(whole):
    """Every module of the tiny model, by name."""
    with torch.device("meta"):
        return dict(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(whole[1])).named_modules())


@pytest.fixture(scope="session")
def linear(modules):
    return {name for name, module in modules.items() if isinstance(module, torch.nn.Linear)}


@pytest.fixture(scope="session")
def large(inputs):
    """The projections whose input is above EVERY somewhere, by brute force."""
    found = {name for name, x in inputs.items() if np.abs(x).max() > EVERY}
    assert 3 <= len(found) <= len(inputs) - 3
    return found


def made(study, to, **more):
    return make_export(study, ExportRequest(to, **more))


def test_what_is_above_the_limit_is_listed_with_its_magnitude(study, inputs, large):
    skips = find_skips(study, EVERY)
    assert {reader.name for reader, _ in skips.large} == large
    for reader, peak in skips.large:
        assert peak == pytest.approx(np.abs(inputs[reader.name]).max(), rel=2e-5)
    assert [peak for _, peak in skips.large] == sorted((peak for _, peak in skips.large), reverse=True)
    told = made(study, "bitsandbytes", skip_above=EVERY).lines
    assert told[0] == "left alone always: lm_head" and len(told) == 1 + len(large)
    first = skips.large[0]
    assert told[1] == f"left alone: {first[0].name}, the largest abs of its input is {first[1]:,.6g}"


def test_bitsandbytes_leaves_exactly_those_alone(study, linear, large):
    config = json.loads(made(study, "bitsandbytes", skip_above=EVERY).content)
    assert config["quant_method"] == "bitsandbytes" and config["load_in_8bit"] is True
    read = BitsAndBytesConfig.from_dict(config)
    assert read.llm_int8_threshold == study.prepared.spec.criteria.magnitude == 6.0
    left = {name for name in linear if not should_convert_module(name, read.llm_int8_skip_modules)}
    assert left == large | {"lm_head"}
    plain = json.loads(made(study, "bitsandbytes").content)
    assert plain["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_reads_what_was_meant(study, modules, large, scheme):
    config = json.loads(made(study, "compressed-tensors", scheme=scheme, skip_above=EVERY).content)
    read = QuantizationConfig(**config)
    preset = preset_name_to_scheme(scheme, ["Linear"])
    assert read.config_groups["group_0"].model_dump() == preset.model_dump()
    # it accepts a key that it doesn't know in silence: what it writes again has every one of ours
    again = json.loads(read.model_dump_json())

    def within(ours, theirs):
        if isinstance(ours, dict):
            return all(key in theirs and within(value, theirs[key]) for key, value in ours.items())
        return ours == theirs

    assert within(config, again)
    model = torch.nn.Module()
    model.named_modules = lambda *a, **k: iter(modules.items())  # type: ignore[method-assign]
    left = {name for name, _ in match_named_modules(model, read.ignore)}
    assert left == large | {"lm_head"}


def test_the_recipe_of_llm_compressor(study, inputs, modules, large):
    found = made(study, "llm-compressor", skip_above=EVERY)
    recipe = yaml.safe_load(found.content)
    modifiers = recipe["default_stage"]["default_modifiers"]
    assert list(recipe) == ["default_stage"] and list(recipe["default_stage"]) == ["default_modifiers"]
    assert list(modifiers) == ["SmoothQuantModifier", "QuantizationModifier"]
    quantize = modifiers["QuantizationModifier"]
    assert (quantize["targets"], quantize["scheme"]) == (["Linear"], "W8A8")
    assert set(quantize["ignore"]) == large | {"lm_head"}
    smooth = modifiers["SmoothQuantModifier"]
    assert smooth["smoothing_strength"] == 0.5 and len(smooth["mappings"]) == 2
    # the patterns, as compressed-tensors resolves them: each norm with all that reads it
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(study.prepared.model.source.path))
    names = {module: name for name, module in model.named_modules()}
    pairs = {}
    for balance, norm in smooth["mappings"]:
        for *groups, norms in match_modules_set(model, [*balance, norm]):
            pairs[names[norms[0]]] = {names[m].rpartition(".")[2] for group in groups for m in group}
    assert pairs == {
        f"model.layers.{layer}.{norm}": readers
        for layer in range(3)
        for norm, readers in (
            ("input_layernorm", {"q_proj", "k_proj", "v_proj"}),
            ("post_attention_layernorm", {"gate_proj", "up_proj"}),
        )
    }
    ranges = safetensors.numpy.load(found.beside[".smoothquant.safetensors"])
    assert set(ranges) == {f"{norm}.{end}" for norm in pairs for end in ("min", "max")}
    for layer in range(3):
        x = inputs[f"model.layers.{layer}.mlp.up_proj"]
        for end, value in (("min", x.min(axis=0)), ("max", x.max(axis=0))):
            name = f"model.layers.{layer}.post_attention_layernorm.{end}"
            np.testing.assert_allclose(ranges[name], value, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "smoothing", "smoothed"), [("FP8_DYNAMIC", None, None), ("NVFP4", 0.25, 0.25), ("W8A8", 0.0, None)]
)
def test_smoothing_is_on_for_int8_alone_unless_asked(study, scheme, smoothing, smoothed):
    found = made(study, "llm-compressor", scheme=scheme, smoothing=smoothing)
    modifiers = yaml.safe_load(found.content)["default_stage"]["default_modifiers"]
    assert modifiers["QuantizationModifier"]["scheme"] == scheme
    assert modifiers.get("SmoothQuantModifier", {}).get("smoothing_strength") == smoothed
    assert bool(found.beside) == (smoothed is not None)


def last_match(entries, name):
    """What ModelOpt makes of a quantizer: of the entries whose pattern fits, the last one decides."""
    fits = [entry for entry in entries if fnmatch.fnmatchcase(name, entry["quantizer_name"])]
    return fits[-1].get("enable", "cfg" in fits[-1])


@pytest.mark.parametrize("scheme", MODELOPT)
def test_modelopt_turns_on_what_has_a_range(study, modules, linear, inputs, large, scheme):
    found = made(study, "modelopt", scheme=scheme, skip_above=EVERY)
    config = json.loads(found.content)
    assert list(config) == ["quant_cfg", "algorithm"]
    on = {
        name
        for name in modules
        if name and last_match(config["quant_cfg"], f"{name}.input_quantizer") and name in linear
    }
    assert on == linear - large - {"lm_head"}
    assert not last_match(config["quant_cfg"], "lm_head.weight_quantizer")
    if config["algorithm"] is None:
        assert scheme.startswith("MX") and found.beside == {}
        return
    amax = safetensors.numpy.load(found.beside[".amax.safetensors"])
    assert set(amax) == {f"{name}.input_quantizer.amax" for name in on}
    for name in on:
        assert amax[f"{name}.input_quantizer.amax"].shape == ()
        assert amax[f"{name}.input_quantizer.amax"] == pytest.approx(np.abs(inputs[name]).max(), rel=2e-5)


def test_gptqmodel_autoround_and_torchao_leave_exactly_those_alone(study, modules, linear, large):
    wanted = large | {"lm_head"}
    dynamic = json.loads(made(study, "gptqmodel", skip_above=EVERY).content)["dynamic"]
    assert all(key.startswith("-:") and value == {} for key, value in dynamic.items())
    assert {n for n in linear if any(re.match(key.removeprefix("-:"), n) for key in dynamic)} == wanted
    extra = json.loads(made(study, "autoround", skip_above=EVERY).content)["extra_config"]
    assert extra == {name: {"bits": 16} for name in extra} and set(extra) == wanted
    quant = json.loads(made(study, "torchao", skip_above=EVERY).content)["quant_type"]["default"]
    table = quant["_data"]["fqn_to_config"]
    assert {name for name, value in table.items() if value is None} == wanted
    (pattern,) = (name for name in table if name.startswith("re:"))
    assert table[pattern]["_type"] == "Int8DynamicActivationInt8WeightConfig"
    # a whole name goes before the pattern
    assert {name for name in modules if re.fullmatch(pattern[3:], name)} == linear - {"lm_head"}


def test_llama_quantize_gets_a_pattern_for_each_kind(study, large):
    text = made(study, "llama-quantize", skip_above=EVERY, scheme="f16").content.decode()
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    wanted = {f"blk.{n.split('.')[2]}.{names[n.rpartition('.')[2]]}.weight" for n in large}
    every = {f"blk.{layer}.{name}.weight" for layer in range(13) for name in names.values()}
    every |= {"output.weight", "token_embd.weight", "blk.1.ffn_down_exps.weight", "blk.1.attn_q_norm.weight"}
    rules = [line.partition("=") for line in text.splitlines()]
    assert {kind for _, _, kind in rules} == {"f16"} and not any(" " in line for line in text.splitlines())
    # std::regex_search, on the lower case of the pattern
    assert {name for name in every if any(re.search(rule.lower(), name) for rule, _, _ in rules)} == wanted


@pytest.mark.parametrize(
    ("family", "routers"),
    [
        ("Qwen2Moe", ["mlp.gate", "mlp.shared_expert_gate"]),
        ("Mixtral", ["mlp.gate"]),
        ("GptOss", ["mlp.router"]),
        ("Llama4", ["feed_forward.router"]),
    ],
)
def test_routers_are_always_left_alone(tmp_path, workspace, text, family, routers):
    study = exports.named(workspace, tmp_path, text, family)
    moe = study.prepared.model.anatomy.moe_layers
    wanted = ["lm_head", *(f"model.layers.{layer}.{name}" for layer in moe for name in routers)]
    lists = {
        "bitsandbytes": lambda c: c["llm_int8_skip_modules"],
        "compressed-tensors": lambda c: c["ignore"],
        "autoround": lambda c: list(c["extra_config"]),
        "gptqmodel": lambda c: [key[3:-1].replace("\\", "") for key in c["dynamic"]],
        "torchao": lambda c: [
            key for key, v in c["quant_type"]["default"]["_data"]["fqn_to_config"].items() if v is None
        ],
    }
    for to, read in lists.items():
        assert read(json.loads(made(study, to).content)) == wanted, to
    assert "left alone always: lm_head" in made(study, "bitsandbytes").lines[0]


def test_experts_above_the_limit_are_one_module_there_and_many_elsewhere(tmp_path, workspace, text):
    folder = exports.tiny.make_model(tmp_path / "model", "Qwen3Moe")
    study = exports.opened(workspace, exports.counted(workspace, folder, text, sites=("attn_in", "mlp_in", "o_in")))
    peak = max(study.columns("mlp_in", layer).peak for layer in range(3))
    found = made(study, "compressed-tensors", skip_above=peak * 0.999)
    ignore = json.loads(found.content)["ignore"]
    (layer,) = (n for n in range(3) if study.columns("mlp_in", n).peak == peak)
    assert f"re:model\\.layers\\.{layer}\\.mlp\\.experts(\\.|$)" in ignore
    pattern = ignore[-1].removeprefix("re:")
    assert re.match(pattern, f"model.layers.{layer}.mlp.experts.3.gate_proj")
    assert not re.match(pattern, f"model.layers.{layer}.mlp.experts_x")
    dynamic = json.loads(made(study, "gptqmodel", skip_above=peak * 0.999).content)["dynamic"]
    assert any(re.match(key[2:], f"model.layers.{layer}.mlp.experts.0.up_proj") for key in dynamic)
    recipe = made(study, "llm-compressor")
    assert "not smoothed: the input of the experts in 3 layers, which routers read too" in recipe.lines
    mappings = yaml.safe_load(recipe.content)["default_stage"]["default_modifiers"]["SmoothQuantModifier"]["mappings"]
    assert [norm for _, norm in mappings] == ["re:model\\.layers\\.\\d+\\.input_layernorm$"]
    types = made(study, "llama-quantize", skip_above=peak * 0.999).content.decode()
    assert types.endswith("".join(f"^blk\\.({layer})\\.ffn_{n}_exps\\.weight$=q8_0\n" for n in ("gate", "up")))


def test_one_norm_for_attention_and_mlp_is_one_mapping(tmp_path, workspace, text):
    folder = exports.tiny.make_model(tmp_path / "model", "Phi")
    study = exports.opened(workspace, exports.counted(workspace, folder, text, sites=("attn_in", "mlp_in")))
    mappings = yaml.safe_load(made(study, "llm-compressor").content)["default_stage"]["default_modifiers"]
    ((balance, norm),) = mappings["SmoothQuantModifier"]["mappings"]
    assert norm == "re:model\\.layers\\.\\d+\\.input_layernorm$"
    assert [pattern.rpartition(".")[2] for pattern in balance] == ["q_proj$", "k_proj$", "v_proj$", "fc1$"]


def test_two_kinds_of_attention_are_two_mappings(tmp_path, workspace, text):
    folder = exports.tiny.make_model(tmp_path / "model", "Qwen3Next")
    study = exports.opened(workspace, exports.counted(workspace, folder, text, sites=("attn_in", "mlp_in")))
    mappings = yaml.safe_load(made(study, "llm-compressor").content)["default_stage"]["default_modifiers"]
    found = {
        norm: [name.rpartition(".")[2] for name in names] for names, norm in mappings["SmoothQuantModifier"]["mappings"]
    }
    assert found == {
        "re:model\\.layers\\.(0|2)\\.input_layernorm$": ["in_proj_qkvz$", "in_proj_ba$"],
        "re:model\\.layers\\.(1)\\.input_layernorm$": ["q_proj$", "k_proj$", "v_proj$"],
    }


@pytest.mark.parametrize("to", TARGETS)
def test_every_format_is_made_of_the_same_study_twice_alike(study, to):
    asked = ExportRequest(to, ".safetensors", skip_above=EVERY if TARGETS[to].lists else None)
    first, second = make_export(study, asked), make_export(study, asked)
    assert (first.content, first.beside, first.lines) == (second.content, second.beside, second.lines)
    assert first.content


def test_families_without_linear_layers_are_refused(tmp_path, workspace, text):
    study = exports.named(workspace, tmp_path, text, "GPT2")
    for to in ("llm-compressor", "compressed-tensors", "torchao"):
        with pytest.raises(BadInput, match="projections of GPT2LMHeadModel are transformers' Conv1D"):
            made(study, to)
    assert json.loads(made(study, "bitsandbytes").content)["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize(
    ("family", "why"), [("Olmo2", "no norm comes before its projections"), ("Olmo", "its norms have no weight")]
)
def test_families_that_can_not_be_smoothed_are_refused(tmp_path, workspace, text, family, why):
    study = exports.named(workspace, tmp_path, text, family)
    with pytest.raises(BadInput, match=f"{why}: give --smoothing 0"):
        made(study, "llm-compressor")
    assert b"SmoothQuant" not in made(study, "llm-compressor", smoothing=0.0).content
