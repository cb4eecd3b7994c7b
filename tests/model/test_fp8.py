"""FP8 checkpoints made plain: the product of values and scales, against one written out in numpy, or a refusal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from outliers.capture.load import load_model
from outliers.errors import UnknownModel
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from tests.support import tiny

BLOCK = 16
"""Rows and columns; kv_a_proj_with_mqa of the tiny DeepSeek has 20 rows, 16 and 4, and others are no multiple either."""
QUANTIZATION = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def study_of(folder, workspace, **model):
    model = {"quantization": "none"} | model
    return prepare(StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", model=model)), workspace)


def decode(byte):
    """The value of one e4m3 byte: sign, four bits of exponent with bias 7, three of mantissa (OCP 8-bit floats)."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    value = (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def product(codes, scales, block):
    """float32 weight (row, column), value by value."""
    out = np.empty(codes.shape, np.float32)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            scale = scales[row // block, column // block] if scales.ndim else scales
            out[row, column] = np.float32(decode(int(codes[row, column]))) * np.float32(scale)
    return out


def quantized(
    folder, family="DeepseekV3", suffix="_scale_inv", one=False, scale_dtype=torch.float32, config=QUANTIZATION
):
    """A checkpoint whose projections are FP8 with scales; returns name -> plain weight of these."""
    tiny.make_model(folder, family)
    tensors, plain = load_file(folder / "model.safetensors"), {}
    chance = np.random.default_rng(0)
    for key, value in list(tensors.items()):
        if value.ndim != 2 or "proj" not in key:
            continue
        codes = (
            chance.integers(0, 126, value.shape, dtype=np.uint8)
            | chance.integers(0, 2, value.shape, dtype=np.uint8) << 7
        )
        grid = () if one else tuple(math.ceil(n / BLOCK) for n in value.shape)
        scales = (2.0 ** chance.integers(-9, -5, grid)).astype(np.float32)
        if scale_dtype == torch.float32:
            scales = (scales * 1.25).astype(np.float32)
        tensors[key] = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn)
        tensors[key + suffix] = torch.from_numpy(np.asarray(scales)).to(scale_dtype)
        plain[key] = product(codes, scales, BLOCK)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_block_may_be_smaller(tmp_path, workspace, dtype):
    """Every weight of a DeepSeek: its kv_a_proj_with_mqa has 20 rows, and transformers would share them as 10 and 10."""
    plain = quantized(tmp_path)
    assert plain["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (20, 32)
    loaded = load_model(study_of(tmp_path, workspace, dtype=dtype).model, workspace, "cpu").state_dict()
    checked = 0
    for key, wanted in plain.items():
        layer, _, leaf = key.partition(".mlp.experts.")
        if leaf:
            number, name = leaf.split(".")[:2]
            fused = loaded[f"{layer}.mlp.experts.{'down_proj' if name == 'down_proj' else 'gate_up_proj'}"][int(number)]
            found = fused if name == "down_proj" else fused.chunk(2)[name == "up_proj"]
        else:
            found = loaded[key]
        assert torch.equal(found, torch.from_numpy(wanted).to(getattr(torch, dtype))), key
        checked += 1
    assert checked == len(plain) > 40
    # the router's own, which transformers 5.24 keeps in float32 and 5.17 does not; its bias is in float32 in both
    router = {k for k in loaded if k.endswith(("e_score_correction_bias", "mlp.gate.weight"))}
    assert {t.dtype for k, t in loaded.items() if k not in router} == {getattr(torch, dtype)}
    assert {loaded[k].dtype for k in router} <= {torch.float32, getattr(torch, dtype)}


@pytest.mark.parametrize(
    "kind",
    [
        {"suffix": "_scale_inv", "scale_dtype": torch.bfloat16},
        {"suffix": "_scale_inv", "scale_dtype": torch.float8_e8m0fnu},
        {"one": True, "config": QUANTIZATION | {"weight_block_size": None}},
    ],
)
def test_scales_of_other_dtypes_and_one_for_all(tmp_path, workspace, kind):
    plain = quantized(tmp_path, "Llama", **kind)
    loaded = load_model(study_of(tmp_path, workspace, dtype="float32").model, workspace, "cpu").state_dict()
    for key, wanted in plain.items():
        np.testing.assert_array_equal(loaded[key].numpy(), wanted, err_msg=key)


def dropped_scales(folder):
    path = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "scale" not in k}, path, {"format": "pt"})


def one_scale_gone(folder):
    path = folder / "model.safetensors"
    gone = "model.layers.1.mlp.up_proj.weight_scale_inv"
    save_file({k: v for k, v in load_file(path).items() if k != gone}, path, {"format": "pt"})


def one_scale_cut(folder):
    path, key = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight_scale_inv"
    save_file({k: v[:1].clone() if k == key else v for k, v in load_file(path).items()}, path, {"format": "pt"})


def weight_made_plain(folder):
    """A scale without the FP8 weight that it belongs to."""
    path, key = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file({k: v.float() if k == key else v for k, v in load_file(path).items()}, path, {"format": "pt"})


FIRST = r"model\.layers\.0\.mlp\.down_proj\.weight"


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        (
            {"suffix": "_scale"},
            None,
            rf"21 weights in FP8 without their scale, first {FIRST}.*there is .*weight_scale\)",
        ),
        ({"suffix": "_scales"}, None, "weights in FP8 without their scale"),
        ({}, dropped_scales, rf"21 weights in FP8 without their scale, first {FIRST}"),
        ({}, one_scale_gone, r"1 weights in FP8 without their scale, first model\.layers\.1\.mlp\.up_proj\.weight"),
        ({}, one_scale_cut, r"up_proj\.weight_scale_inv is F32 of shape \[1, 2\], .* has scales of shape \[3, 2\]"),
        (
            {},
            weight_made_plain,
            r"holds model\.layers\.1\.mlp\.up_proj\.weight_scale_inv, which scales or packs weights",
        ),
        ({"config": None}, None, "weights in FP8, first .*has no quantization_config"),
        ({"one": True}, None, r"is F32 of shape \[\]"),
        (
            {"config": QUANTIZATION | {"weight_block_size": [16]}},
            None,
            r"weight_block_size = \[16\]: two whole numbers",
        ),
        ({"config": QUANTIZATION | {"weight_block_size": [0, 16]}}, None, "two whole numbers"),
    ],
)
@pytest.mark.parametrize("quantization", ["none", "auto"])
def test_a_weight_without_the_scale_that_fits_it_is_refused(tmp_path, workspace, kind, damage, message, quantization):
    quantized(tmp_path, "Llama", **kind)
    if damage:
        damage(tmp_path)
    with pytest.raises(UnknownModel, match=message):
        study_of(tmp_path, workspace, dtype="float32", quantization=quantization)


def test_captures_of_the_old_product_are_not_answered(tmp_path, workspace):
    """The same checkpoint once made plain is another capture than before; a plain one keeps its id's payload."""
    from outliers.study.prepare import capture_digest

    quantized(tmp_path, "Llama")
    study = study_of(tmp_path, workspace)
    rest = (study.spec, study.model, study.corpus, study.layers)
    assert (
        capture_digest(*rest, stored="fp8")
        != capture_digest(*rest, stored=None)
        == capture_digest(*rest, stored="mxfp4")
    )
    assert study.capture_id == capture_digest(*rest, stored="fp8")[:16]
