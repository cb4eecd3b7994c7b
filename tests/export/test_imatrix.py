"""Importance matrices and scales, read back by other programs' readers, against sums over what each projection received."""

from __future__ import annotations

import io
import struct

import gguf
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from outliers.errors import BadInput
from outliers.export.formats import ExportRequest, make_export
from outliers.export.gguf_names import GGUF_ARCHITECTURES, gguf_names
from outliers.export.imatrix import gguf_bytes
from outliers.model.families import FAMILIES
from tests.support import exports, tiny

GGUF = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Name of a weight in a block of a llama's GGUF file -> its module in transformers."""


def read_gguf(data: bytes, tmp_path):
    """(key -> value, name -> array in numpy's order) by the package's reader."""
    path = tmp_path / "read.gguf"
    path.write_bytes(data)
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {tensor.tensor_type for tensor in reader.tensors} <= {gguf.GGMLQuantizationType.F32}
    return values, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def read_dat(data: bytes):
    """(name -> (calls, values), chunks, data set) of the older form, written from llama.cpp's loader."""
    at = 0

    def number():
        nonlocal at
        at += 4
        return struct.unpack_from("<i", data, at - 4)[0]

    def text():
        nonlocal at
        length = number()
        at += length
        return data[at - length : at].decode()

    entries = {}
    for _ in range(number()):
        name, calls, count = text(), number(), number()
        entries[name] = (calls, np.frombuffer(data, "<f4", count, at))
        at += 4 * count
    chunks, source = number(), text()
    assert at == len(data)
    return entries, chunks, source


def test_the_gguf_file_holds_the_sums_that_each_projection_received(study, inputs, tmp_path):
    made = make_export(study, ExportRequest("imatrix"))
    values, tensors = read_gguf(made.content, tmp_path)
    corpus = study.prepared.corpus
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": [corpus.source],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 20,
    }
    assert len(tensors) == 3 * 7 * 2
    for layer in range(3):
        for name, module in GGUF.items():
            x = inputs[f"model.layers.{layer}.{module}"]
            squares, counts = (tensors[f"blk.{layer}.{name}.weight.{kind}"] for kind in ("in_sum2", "counts"))
            assert squares.shape == (1, x.shape[1]) and counts.tolist() == [[60.0]]
            # two runs of one model on one machine: batches of other sizes round otherwise
            np.testing.assert_allclose(squares[0], (x**2).sum(axis=0), rtol=2e-5)
    assert made.beside == {} and made.lines == []


def test_sums_are_there_where_they_are_asked_for(study, inputs, tmp_path):
    _, plain = read_gguf(make_export(study, ExportRequest("imatrix")).content, tmp_path)
    _, summed = read_gguf(make_export(study, ExportRequest("imatrix", sums=True)).content, tmp_path)
    assert set(summed) - set(plain) == {name.replace("in_sum2", "in_sum") for name in plain if "in_sum2" in name}
    x = inputs["model.layers.2.mlp.down_proj"]
    scale = np.abs(x).sum(axis=0)
    assert (np.abs(summed["blk.2.ffn_down.weight.in_sum"][0] - x.sum(axis=0)) <= 1e-5 * scale).all()


def test_the_older_form_says_the_same(study, tmp_path):
    _, tensors = read_gguf(make_export(study, ExportRequest("imatrix")).content, tmp_path)
    entries, chunks, source = read_dat(make_export(study, ExportRequest("imatrix-dat")).content)
    assert (chunks, source) == (3, study.prepared.corpus.source)
    assert list(entries) == sorted(entries) and set(entries) == {n[: -len(".counts")] for n in tensors if "counts" in n}
    for name, (calls, values) in entries.items():
        assert calls == 3
        np.testing.assert_allclose(values, tensors[f"{name}.in_sum2"][0] / 60 * 3, rtol=1e-6)


def test_scales_are_the_largest_abs_of_each_column(study, inputs):
    made = make_export(study, ExportRequest("act-scales", ".safetensors"))
    found = safetensors.numpy.load(made.content)
    assert set(found) == set(inputs)
    for name, x in inputs.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], np.abs(x).max(axis=0), rtol=2e-5)
    pickled = make_export(study, ExportRequest("act-scales", ".pt"))
    tensors = torch.load(io.BytesIO(pickled.content), weights_only=True)
    assert "pickle" in pickled.lines[0]
    assert {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} == {
        name: array.tobytes() for name, array in found.items()
    }


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("OPT", ("self_attn.q_proj", "fc1")),
        ("Bloom", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
    ],
)
def test_scales_have_the_names_that_smoothquants_library_looks_up(tmp_path, workspace, text, family, module):
    """smooth_lm of mit-han-lab/smoothquant (commit 0c727bc1) reads scales[name of a decoder layer + these], a tensor with as
    many values as the projection has inputs, from what torch.load gives of a file."""
    folder = tiny.make_model(tmp_path / "model", family)
    study = exports.opened(workspace, exports.counted(workspace, folder, text, sites=("attn_in", "mlp_in")))
    made = make_export(study, ExportRequest("act-scales", ".pt"))
    scales = torch.load(io.BytesIO(made.content), weights_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    layers = [name for name, one in model.named_modules() if type(one).__name__ in ("OPTDecoderLayer", "BloomBlock")]
    assert len(layers) == len(study.prepared.layers)
    for layer in layers:
        for own in module:
            projection = model.get_submodule(f"{layer}.{own}")
            assert scales[f"{layer}.{own}"].shape == (projection.in_features,)
            assert (scales[f"{layer}.{own}"] > 0).all()


def test_scales_of_a_study_without_the_other_sites_say_so(tmp_path, workspace, llama, text):
    study = exports.opened(workspace, exports.counted(workspace, llama, text, sites=("attn_in", "mlp_in")))
    made = make_export(study, ExportRequest("act-scales", ".safetensors"))
    names = {name.rpartition(".")[2] for name in safetensors.numpy.load(made.content)}
    assert names == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert made.lines == [
        "without scales, because their input was not captured (--sites attn_in,mlp_in,o_in,down_in): o_proj, down_proj"
    ]
    with pytest.raises(
        BadInput, match="needs the input of o_proj and the input of down_proj, and this study did not capture"
    ):
        make_export(study, ExportRequest("imatrix"))


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=20
)


@settings(max_examples=60, deadline=None)
@given(
    values=st.dictionaries(
        NAMES, NAMES | st.integers(0, 2**32 - 1) | st.lists(NAMES, min_size=1, max_size=3), max_size=4
    ),
    tensors=st.dictionaries(
        NAMES,
        arrays(
            np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.floats(width=32, allow_nan=False)
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_any_gguf_file_reads_back(tmp_path_factory, values, tensors):
    found, arrays_ = read_gguf(gguf_bytes(values, tensors), tmp_path_factory.mktemp("gguf"))
    assert found == values
    assert {name: array.tolist() for name, array in arrays_.items()} == {n: a.tolist() for n, a in tensors.items()}


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_names_of_every_family(tmp_path, workspace, text, family):
    """Every projection has its own name in GGUF, or the family is refused in words."""
    study = exports.named(workspace, tmp_path, text, family)
    architecture = study.prepared.model.architecture
    readers = tuple(reader for reader in study.readers if reader.kind == "projection")
    if architecture not in GGUF_ARCHITECTURES:
        with pytest.raises(BadInput, match=f"no names for the weights of {architecture}: llama.cpp does not read"):
            gguf_names(study, readers)
        return
    if family == "Qwen3Moe, one dense":  # GGUF's Qwen3-MoE has experts in every layer
        with pytest.raises(BadInput, match=r"no name for the weights of model.layers.1.mlp.gate_proj of Qwen3MoeFor"):
            gguf_names(study, readers)
        return
    names = gguf_names(study, readers)
    flat = [name for own in names.values() for name in own]
    assert len(flat) == len(set(flat)) == len(readers)
    for reader in readers:
        (name,) = names[reader.name]
        assert name.startswith(f"blk.{reader.layer}.") and name.endswith(".weight")
        role = name.split(".")[2]
        expected = {"o_in": ("attn_output",), "down_in": ("ffn_down",)}.get(reader.site or "")
        assert expected is None or role in expected
        if reader.site == "attn_in":
            assert role in ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_a", "attn_kv_a_mqa")
        if reader.site == "mlp_in":
            assert role.startswith(("ffn_gate", "ffn_up"))


def test_every_architecture_is_one_of_the_table():
    assert set(GGUF_ARCHITECTURES) <= set(FAMILIES)
    assert set(FAMILIES) - set(GGUF_ARCHITECTURES) == {"OPTForCausalLM", "GPTJForCausalLM", "Qwen3NextForCausalLM"}
