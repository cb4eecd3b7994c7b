"""A checkpoint that lacks weights of its model, or has others, is refused by name; a complete one is not.

What a complete one computes is compared elsewhere (`test_architectures`, `test_quantized`).
"""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from outliers.capture.load import load_model
from outliers.errors import UnknownModel
from outliers.model.complete import check_checkpoint
from outliers.model.describe import describe_model
from outliers.model.source import find_model
from outliers.spec import ModelSpec, StudySpec
from outliers.study.prepare import prepare
from tests.support import tiny


def change(folder, function):
    """Save the tensors of a folder's only file anew, passed through `function`."""
    path = folder / "model.safetensors"
    save_file(function(load_file(path)), path, {"format": "pt"})


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(*names):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in names}


def described(folder, workspace, dtype="auto"):
    return describe_model(find_model(ModelSpec(id=str(folder)), workspace), dtype, workspace)


def refusal(folder, workspace, **capture):
    """What `prepare` says of a folder: before any weight is read, and before a machine."""
    with pytest.raises(UnknownModel) as caught:
        prepare(StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", capture=capture)), workspace)
    return str(caught.value)


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_each_family_is_taken_whole_and_refused_without_one_weight(tmp_path, workspace, family):
    tiny.make_model(tmp_path, family)
    check_checkpoint(described(tmp_path, workspace), workspace, head=True)
    for dtype in ("bfloat16", "float16"):
        load_model(described(tmp_path, workspace, dtype), workspace, "cpu")
    chance = random.Random(family)
    tensors = load_file(tmp_path / "model.safetensors")
    needed = sorted(key for key in tensors if "vision" not in key and "multi_modal" not in key)
    for dropped in chance.sample(needed, 3):
        save_file(without(dropped)(tensors), tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UnknownModel, match=r"lacks [12] weights of its model, first ") as caught:
            check_checkpoint(described(tmp_path, workspace), workspace, head=True)
        # by the checkpoint's own name, or the model's, which the same layer and leaf tell
        place = re.search(r"\.\d+\.", dropped)
        assert (place[0] if place else dropped.split(".")[-2]) in str(caught.value), dropped


def test_the_loader_refuses_what_it_would_make_up(tmp_path, workspace):
    """The last word is the loader's: the header check did not see this file."""
    folder = tmp_path / "whole"
    info = described(tiny.make_model(folder), workspace)
    change(folder, without("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(
        UnknownModel, match=r"lacks 1 weights of its model, first model\.layers\.1\.mlp\.down_proj\.weight"
    ):
        load_model(info, workspace, "cpu")


def test_a_whole_layer_and_another_prefix(tmp_path, workspace):
    tiny.make_model(tmp_path / "layer", "Qwen3Moe")
    change(tmp_path / "layer", lambda t: {k: v for k, v in t.items() if not k.startswith("model.layers.2.")})
    assert "first model.layers.2." in refusal(tmp_path / "layer", workspace)
    tiny.make_model(tmp_path / "prefix")
    change(tmp_path / "prefix", lambda t: {f"transformer.{k}": v for k, v in t.items()})
    assert re.search(
        r"lacks 29 weights .*it holds 30 that the model doesn't know", refusal(tmp_path / "prefix", workspace)
    )


def test_experts_are_not_counted_anew_where_one_is_missing(tmp_path, workspace):
    """Stacked as found, expert 3 would become expert 2; where the last is gone, the stack is too small."""
    tiny.make_model(tmp_path, "Qwen3Moe")
    tensors = load_file(tmp_path / "model.safetensors")
    for expert in (2, 3):
        save_file(
            {k: v for k, v in tensors.items() if f"layers.1.mlp.experts.{expert}." not in k},
            tmp_path / "model.safetensors",
            {"format": "pt"},
        )
        assert "model.layers.1.mlp.experts" in refusal(tmp_path, workspace)
    shifted = {k.replace("layers.1.mlp.experts.2.", "layers.1.mlp.experts.4."): v for k, v in tensors.items()}
    save_file(shifted, tmp_path / "model.safetensors", {"format": "pt"})
    assert "first model.layers.1.mlp.experts.2.down_proj.weight" in refusal(tmp_path, workspace)
    far = tensors | {"model.layers.1.mlp.experts.999999999.down_proj.weight": torch.ones(2)}
    save_file(far, tmp_path / "model.safetensors", {"format": "pt"})
    assert "first model.layers.1.mlp.experts.4.down_proj.weight" in refusal(tmp_path, workspace)


@pytest.mark.parametrize("family", ["Llama", "DeepseekV3", "GptOss", "GPT2"])
def test_a_weight_of_another_shape(tmp_path, workspace, family):
    tiny.make_model(tmp_path, family)
    info = described(tmp_path, workspace)
    layered = sorted(
        k for k in load_file(tmp_path / "model.safetensors") if re.search(r"\.1\..*(o_proj|c_proj)\.weight", k)
    )
    change(tmp_path, lambda t: t | {layered[0]: t[layered[0]][:-1].clone()})
    message = refusal(tmp_path, workspace)
    assert "1 weights of" in message and "have another shape" in message and layered[0] in message
    with pytest.raises(UnknownModel, match="have another shape"):
        load_model(info, workspace, "cpu")


def test_a_head_may_be_missing_where_nothing_asks_for_it(tmp_path, workspace):
    tiny.make_model(tmp_path)
    change(tmp_path, without("lm_head.weight"))
    spec = tiny.spec_for(tmp_path, "builtin:python-docs")
    study = prepare(StudySpec.model_validate(spec), workspace)
    load_model(study.model, workspace, "cpu", head=False)
    with pytest.raises(UnknownModel, match=r"lacks 1 weights of its model, first lm_head\.weight"):
        load_model(study.model, workspace, "cpu")
    assert "first lm_head.weight" in refusal(tmp_path, workspace, perplexity=True)


def test_tied_weights_are_stored_once_under_either_name(tmp_path, workspace):
    tiny.make_model(tmp_path, tie_word_embeddings=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    check_checkpoint(described(tmp_path, workspace), workspace, head=True)
    embedding = stored.pop("model.embed_tokens.weight")
    save_file(stored | {"lm_head.weight": embedding}, tmp_path / "model.safetensors", {"format": "pt"})
    info = described(tmp_path, workspace)
    check_checkpoint(info, workspace, head=True)
    assert torch.equal(load_model(info, workspace, "cpu").model.embed_tokens.weight, embedding)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    assert "model.embed_tokens.weight" in refusal(tmp_path, workspace)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,)),  # of old checkpoints; the model computes it
        ("model.visual.blocks.0.attn.qkv.weight", (8, 8)),  # another modality
        ("mtp.layers.0.mlp.down_proj.weight", (8, 8)),  # predicts further tokens
        ("model.layers.3.mlp.down_proj.weight", (8, 8)),  # the same, as DeepSeek and GLM number it
        ("v_head.summary.weight", (1, 32)),  # a head of some training
    ],
)
def test_weights_of_something_else_are_left_alone(tmp_path, workspace, key, shape):
    tiny.make_model(tmp_path)
    configure(tmp_path, num_nextn_predict_layers=1)
    change(tmp_path, lambda t: t | {key: torch.ones(shape)})
    info = described(tmp_path, workspace)
    check_checkpoint(info, workspace, head=True)
    load_model(info, workspace, "cpu")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.layers.0.mlp.down_proj.weight_scale", "scales or packs weights"),
        ("model.layers.0.mlp.down_proj.input_scale", "scales or packs weights"),
        ("model.layers.0.mlp.down_proj.qweight", "scales or packs weights"),
        ("model.layers.0.mlp.down_proj.weight.absmax", "scales or packs weights"),
        ("model.layers.0.self_attn.q_proj.bias", "has no such weight"),  # the config says that there are no biases
        ("model.layers.3.mlp.down_proj.weight", "has no such weight"),  # the config says three layers
    ],
)
def test_weights_that_nothing_would_apply(tmp_path, workspace, key, message):
    tiny.make_model(tmp_path)
    info = described(tmp_path, workspace)
    change(tmp_path, lambda t: t | {key: torch.ones(8)})
    said = refusal(tmp_path, workspace)
    assert key in said and message in said
    with pytest.raises(UnknownModel, match=message):
        load_model(info, workspace, "cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fnuz])
def test_values_that_are_packed_are_not_cast(tmp_path, workspace, dtype):
    """They have the right name and shape; the numbers are not the weights."""
    tiny.make_model(tmp_path)
    key = "model.layers.1.mlp.down_proj.weight"
    change(tmp_path, lambda t: t | {key: torch.zeros(t[key].shape, dtype=torch.uint8).view(dtype)})
    assert f"1 weights that are not floating-point numbers, first {key}" in refusal(tmp_path, workspace)


@pytest.mark.parametrize("family", ["GPT2", "GPTJ"])
def test_old_masks_of_gpt2_are_left_alone_and_a_bias_is_not(tmp_path, workspace, family):
    """Also where the class has transformers keep both out of its report: GPT-2's does."""
    tiny.make_model(tmp_path, family)
    stored = load_file(tmp_path / "model.safetensors")
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.masked_bias": torch.tensor(-1e9)}
    for form in (dict, without_prefix):  # as published, GPT-2's names lack their first part
        save_file(form(stored | mask), tmp_path / "model.safetensors", {"format": "pt"})
        check_checkpoint(described(tmp_path, workspace), workspace, head=True)
        bias = {"transformer.h.0.attn.bias": torch.ones(32)}
        save_file(form(stored | bias), tmp_path / "model.safetensors", {"format": "pt"})
        assert "h.0.attn.bias, and the model of its config.json has no such weight" in refusal(tmp_path, workspace)


def without_prefix(tensors):
    return {key.removeprefix("transformer."): value for key, value in tensors.items()}


@pytest.mark.parametrize("files", [("adapter_config.json",), ("adapter_config.json", "adapter_model.safetensors")])
def test_an_adapter_beside_a_checkpoint_is_refused(tmp_path, workspace, files):
    tiny.make_model(tmp_path)
    info = described(tmp_path, workspace)
    for file in files:
        (tmp_path / file).write_text("{}")
    said = refusal(tmp_path, workspace)
    assert str(tmp_path) in said and f"LoRA adapter ({', '.join(files)}) next to a checkpoint" in said
    with pytest.raises(UnknownModel, match="LoRA adapter"):
        load_model(info, workspace, "cpu")


def test_a_folder_with_an_adapter_alone(tmp_path, workspace):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/model"}))
    assert "LoRA adapter (adapter_config.json) and no model" in refusal(tmp_path, workspace)
