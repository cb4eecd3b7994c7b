"""Quantized checkpoints: made plain, or kept as they are, each its own study; on a processor made plain or refused.

Computing in MXFP4 or FP8 needs a GPU and its kernels: that is not run here.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from outliers.capture.extract import extract
from outliers.capture.load import load_model
from outliers.errors import BadInput, PlanRefused
from outliers.model.describe import describe_model
from outliers.spec import StudySpec
from outliers.study.prepare import capture_digest, prepare
from tests.support import tiny
from tests.support.captured import stored
from tests.support.synthetic import Silent

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of E2M1 (OCP Microscaling Formats 1.0); the fourth bit is the sign."""
SITES = ("attn_in", "mlp_in", "resid")


def study_of(folder, workspace, **model):
    made = tiny.spec_for(folder, "builtin:python-docs", model=model, capture={"sites": SITES})
    return prepare(StudySpec.model_validate(made), workspace)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def packed(shape, seed):
    """Random MXFP4 weights of `shape`, (expert, out, in): (blocks, scales, the same values as bfloat16)."""
    chance = np.random.default_rng(seed)
    codes = chance.integers(0, 16, shape, dtype=np.uint8)
    scales = chance.integers(122, 126, (*shape[:2], shape[2] // 32), dtype=np.uint8)
    magnitudes = np.array(FP4)[codes & 7] * np.where(codes & 8, -1, 1)
    values = magnitudes * 2.0 ** (np.repeat(scales, 32, axis=-1).astype(int) - 127)
    pairs = codes.reshape(*shape[:2], shape[2] // 32, 16, 2)  # the first of two stands in the low bits
    blocks = pairs[..., 0] | pairs[..., 1] << 4
    return torch.from_numpy(blocks), torch.from_numpy(scales), torch.from_numpy(values).to(torch.bfloat16)


def gpt_oss(tmp_path):
    """(a checkpoint in MXFP4 whose config names no dtype, as OpenAI's; the same weights plain)."""
    folders = []
    for name in ("packed", "plain"):
        folder = tmp_path / name
        tiny.make_model(folder, "GptOss", dtype="bfloat16", intermediate_size=64)
        weights = load_file(folder / "model.safetensors")
        for number, (key, tensor) in enumerate(sorted(weights.items())):
            if not key.endswith(("gate_up_proj", "down_proj")):
                continue
            experts, inputs, outputs = tensor.shape  # transposed, as GptOss has them
            blocks, scales, values = packed((experts, outputs, inputs), number)
            del weights[key]
            if name == "plain":
                weights[key] = values.transpose(1, 2).contiguous()
            else:
                weights[f"{key}_blocks"], weights[f"{key}_scales"] = blocks, scales
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    change_config(folders[0], quantization_config=quantization, dtype=None)
    return folders


def test_mxfp4_made_plain_is_the_values_that_were_packed(tmp_path, workspace):
    folder, plain = gpt_oss(tmp_path)
    study, other = study_of(folder, workspace, quantization="none"), study_of(plain, workspace)
    assert (study.model.dtype, study.model.quantization) == ("bfloat16", None)
    assert study.model.weight_bytes == other.model.weight_bytes > study.model.weights.checkpoint_bytes
    for each in (study, other):
        extract(each, workspace, Silent())
    for site in SITES:
        np.testing.assert_array_equal(stored(workspace, study, site), stored(workspace, other, site), err_msg=site)


def fp8(tmp_path):
    folder = tmp_path / "fp8"
    tiny.make_model(folder, "Qwen3")
    change_config(
        folder,
        quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"},
    )
    return folder


@pytest.mark.parametrize(("make", "method"), [(fp8, "fp8"), (lambda place: gpt_oss(place)[0], "mxfp4")])
def test_a_quantized_checkpoint_on_the_processor_is_refused_before_its_weights_are_read(
    tmp_path, workspace, make, method
):
    folder = make(tmp_path)
    plain = study_of(folder, workspace, quantization="none")
    kept = describe_model(plain.model.source, "auto", workspace, quantization="checkpoint")
    assert (kept.quantization, plain.model.quantization) == (method, None)
    assert kept.weight_bytes < plain.model.weight_bytes
    layers = plain.layers
    assert capture_digest(plain.spec, kept, plain.corpus, layers, stored=method)[:16] != plain.capture_id
    # no weight is read: what is there has none of the model's
    save_file({"nothing": torch.zeros(1, dtype=torch.bfloat16)}, folder / "model.safetensors")
    refusals = (
        lambda: study_of(folder, workspace, quantization="checkpoint"),
        lambda: load_model(kept, workspace, "cpu"),
    )
    for refused in refusals:
        with pytest.raises(PlanRefused) as error:
            refused()
        said = str(error.value)
        assert re.search(rf"is stored in {method}, which needs a GPU of compute capability \d\.\d, and kernels>=", said)
        plain_size, stored_size = re.search(r"computes in \S+, with (.*) of weights instead of (.*)$", said).groups()
        assert plain_size != stored_size


@pytest.mark.parametrize("make", [fp8, lambda place: gpt_oss(place)[0]])
def test_what_can_be_made_plain_is_made_plain_by_default_and_is_the_same_study(tmp_path, workspace, make):
    folder = make(tmp_path)
    default, asked = study_of(folder, workspace), study_of(folder, workspace, quantization="none")
    assert default.model.quantization is None
    assert (default.capture_id, default.study_id) == (asked.capture_id, asked.study_id)
    assert default.model.weight_bytes == asked.model.weight_bytes


def test_what_can_not_be_made_plain_is_refused(tmp_path, workspace):
    folder = tmp_path / "gptq"
    tiny.make_model(folder)
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    with pytest.raises(BadInput, match="is stored in gptq, which can't be undone on loading; mxfp4 and fp8 can"):
        study_of(folder, workspace, quantization="none")
