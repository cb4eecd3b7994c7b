"""Folders and files that are no model, or not all of one: refused by `prepare` in seconds, in our words, with a remedy."""

from __future__ import annotations

import contextlib
import json
import struct
import time

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from outliers.errors import UnknownModel
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from tests.support import tiny

SECONDS = 20
"""More than any of them takes on a busy machine; a billion layers would take hours and all memory."""


def refusal(folder, workspace):
    began = time.monotonic()
    with pytest.raises(UnknownModel) as caught:
        prepare(StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs")), workspace)
    assert time.monotonic() - began < SECONDS
    return str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of a whole model, by name: bytes."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.make_model(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def config_with(**changes):
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def config_lacking(*names):
    return lambda data: json.dumps({k: v for k, v in json.loads(data).items() if k not in names}).encode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is not JSON"),
        (lambda data: data[: len(data) // 2], "is not JSON"),
        (lambda data: b"{" * 100_000, "is not JSON"),
        (lambda data: b"[" * 100_000, "is not JSON"),
        (lambda data: b"\xff\xfe" + data, "is not UTF-8 text"),
        (lambda data: "é".encode("latin-1") + data, "is not UTF-8 text"),
        (lambda data: b"[" + data + b"]", "holds a JSON list, not an object"),
        (lambda data: b"3", "holds a JSON int, not an object"),
        (lambda data: b"null", "holds a JSON NoneType, not an object"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", "run `git lfs pull`"),
        (config_lacking("model_type"), "has no model_type"),
        (config_with(model_type=3), "has no model_type"),
        (config_with(model_type="no-such-family"), "can't be read"),
        (config_with(dtype="torch.bfloat16"), 'a name such as "bfloat16" stands there'),
        (config_with(dtype=16), "has dtype = 16"),
        (config_with(dtype="float99"), "float99"),
        (config_with(num_hidden_layers=0), "num_hidden_layers = 0, which is not a whole number from 1 to 1,000"),
        (config_with(num_hidden_layers=10**9), "num_hidden_layers = 1000000000, which is not"),
        (config_with(num_hidden_layers=10**30), "num_hidden_layers = 1000000000000000000000000000000, which is not"),
        (config_with(num_hidden_layers=-3), "num_hidden_layers = -3, which is not"),
        (config_with(num_hidden_layers="3"), "num_hidden_layers = '3', which is not"),
        (config_with(num_hidden_layers=3.0), "num_hidden_layers = 3.0, which is not"),
        (config_with(num_hidden_layers=True), "num_hidden_layers = True, which is not"),
        (config_with(num_hidden_layers=[3]), r"num_hidden_layers = [3], which is not"),
        (config_with(num_hidden_layers=4), "lacks 9 weights of its model, first model.layers.3."),
        (config_with(num_hidden_layers=2), "holds model.layers.2."),
        (config_with(hidden_size=-32), "hidden_size = -32, which is not"),
        (config_with(hidden_size="big"), "hidden_size = 'big', which is not"),
        (config_with(hidden_size=10**12), "hidden_size = 1000000000000, which is not"),
        (config_with(hidden_size=64), "have another shape"),
        (config_with(vocab_size=0), "vocab_size = 0, which is not"),
        (config_with(vocab_size=259), "have another shape"),
        (config_with(num_attention_heads=5, head_dim=None), "5 num_attention_heads, which 2 num_key_value_heads can't"),
        (config_with(num_attention_heads=6, head_dim=None), "is not a multiple of its 6 num_attention_heads"),
        (config_with(num_attention_heads=0), "num_attention_heads = 0, which is not"),
        (config_with(hidden_act="no-such-function"), "can't build its config"),
        (config_with(rms_norm_eps="small"), "can't be read"),
        (config_with(rope_parameters={"rope_type": "no-such-kind", "rope_theta": 1e4}), "no-such-kind"),
        (config_with(quantization_config=[1]), "quantization_config = [1], not an object"),
        (config_with(text_config=3), "text_config = 3, not an object"),
        (config_with(architectures=3), None),
    ],
)
def test_a_config_that_is_none(tmp_path, workspace, whole, damage, message):
    folder = written(tmp_path, whole | {"config.json": damage(whole["config.json"])})
    if message is not None:
        assert message in refusal(folder, workspace)
        return
    with contextlib.suppress(UnknownModel):  # read or refused, as the library likes; never a traceback
        prepare(StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs")), workspace)


def test_a_multimodal_config_is_looked_into(tmp_path, workspace):
    tiny.make_model(tmp_path, "Gemma3, multimodal")
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["text_config"]["num_hidden_layers"] = 10**9
    path.write_text(json.dumps(content))
    assert "text_config has num_hidden_layers = 1000000000" in refusal(tmp_path, workspace)


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def relabelled(change):
    """A header passed through `change`, before the same data."""

    def damage(data):
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        return header(entries) + data[8 + length :]

    return damage


NAME = "model.layers.0.mlp.up_proj.weight"
LAST = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is not a safetensors file, or only its beginning (0 bytes)"),
        (lambda data: data[:5], "or only its beginning (5 bytes)"),
        (lambda data: data[:300], "is cut off: its header alone takes"),
        (lambda data: data[: len(data) // 2], "is cut off: its header names"),
        (lambda data: data[:-1], "is cut off: its header names"),
        (lambda data: data + b"\0", "the header of"),
        (lambda data: bytes(len(data)), "is not a safetensors file"),
        (lambda data: data[:8] + bytes(len(data) - 8), "its header is not JSON"),
        (lambda data: struct.pack("<Q", 2**63) + data[8:], "is not a safetensors file"),
        (lambda data: struct.pack("<Q", 5) + data[8:], "its header is not JSON"),
        (lambda data: struct.pack("<Q", 10**6) + b"[" * 10**6, "its header is not JSON"),
        (lambda data: header([1, 2]), "its header names no tensors"),
        (lambda data: header({}), "hold no tensor"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 123456\n",
            "is a pointer of git-lfs, not the file itself: run `git lfs pull`",
        ),
        (lambda data: b"<!DOCTYPE html><html>" + bytes(900), "is not a safetensors file"),
        (relabelled(lambda h: h[NAME].update(shape=[48, 33])), f"lies: {NAME} of shape [48, 33] in F32 does not take"),
        (relabelled(lambda h: h[NAME].update(shape=[-48, -32])), f"lies: {NAME} has no dtype, shape and offsets"),
        (relabelled(lambda h: h[NAME].update(shape="48x32")), "has no dtype, shape and offsets"),
        (relabelled(lambda h: h[NAME].update(shape=[2**40, 2**40])), "does not take"),
        (relabelled(lambda h: h[NAME].update(dtype="F16")), "does not take"),
        (relabelled(lambda h: h[NAME].update(dtype="Q7")), "in Q7, which is not a dtype"),
        (relabelled(lambda h: h[NAME].update(data_offsets=[0, 48 * 32 * 4])), "overlap or leave gaps"),
        (relabelled(lambda h: h[NAME].update(data_offsets=[9, 3])), "does not take"),
        (relabelled(lambda h: h.update({NAME: 3})), "has no dtype, shape and offsets"),
        (relabelled(lambda h: h[NAME].update(shape=[32, 48])), "have another shape"),
    ],
)
def test_weights_that_are_none(tmp_path, workspace, whole, damage, message):
    folder = written(tmp_path, whole | {"model.safetensors": damage(whole["model.safetensors"])})
    said = refusal(folder, workspace)
    assert message in said
    assert "another shape" in message or str(folder / "model.safetensors") in said or str(folder) in said


def sharded(folder, whole):
    """The same model in two shards and an index; returns the index."""
    written(folder, whole)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = {key: value for key, value in tensors.items() if ("layers.2" in key) == (number == 2)}
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


SECOND = "model-00002-of-00002.safetensors"


def moved(folder, index):
    """Every weight of the second shard said to be in the first."""
    index["weight_map"] = dict.fromkeys(index["weight_map"], "model-00001-of-00002.safetensors")
    index["weight_map"][LAST] = SECOND


def doubled(folder, index):
    tensors = load_file(folder / SECOND) | {LAST: load_file(folder / "model-00001-of-00002.safetensors")[LAST]}
    save_file(tensors, folder / SECOND, {"format": "pt"})


def outside(folder, index):
    index["weight_map"][LAST] = "../other/model.safetensors"


def unmapped(folder, index):
    index["weight_map"] = None


def numbered(folder, index):
    index["weight_map"][LAST] = 3


def dropped(folder, index):
    """A shard that the index no longer names: its weights are not read."""
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if file != SECOND}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder, index: (folder / SECOND).unlink(),
            f"names 2 files, and 1 of them are not there, first {SECOND}",
        ),
        (
            lambda folder, index: (folder / SECOND).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "git lfs pull",
        ),
        (moved, "weights that are not in the file it says, first"),
        (doubled, f"{LAST} is in model-00001-of-00002.safetensors and in {SECOND}"),
        (outside, "names the file '../other/model.safetensors', which is not one of its own folder"),
        (unmapped, "has no weight_map"),
        (numbered, "has no weight_map"),
        (
            lambda folder, index: index.pop("metadata"),
            'has no metadata, which transformers needs: add "meta',
        ),
        (dropped, "lacks 9 weights of its model, first model.layers.2."),
    ],
)
def test_shards_that_are_not_those_of_the_index(tmp_path, workspace, whole, damage, message):
    index = sharded(tmp_path, whole)
    damage(tmp_path, index)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refusal(tmp_path, workspace)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"version https://git-lfs.github.com/spec/v1\n"])
def test_an_index_that_is_none(tmp_path, workspace, whole, data):
    sharded(tmp_path, whole)
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    assert str(tmp_path / "model.safetensors.index.json") in refusal(tmp_path, workspace)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_in_the_place_of_a_tokenizer(tmp_path, workspace, whole, name):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 17210084\n"
    written(tmp_path, whole | {name: pointer.encode()})
    assert f"{name} is a pointer of git-lfs, not the file itself: run `git lfs pull`" in refusal(tmp_path, workspace)


def test_weights_under_a_name_that_is_not_looked_for(tmp_path, workspace, whole):
    written(tmp_path, whole)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert "neither model.safetensors nor model.safetensors.index.json, only weights.safetensors" in refusal(
        tmp_path, workspace
    )


def test_shards_are_read_as_one_file_is(tmp_path, workspace, whole):
    sharded(tmp_path, whole)
    prepare(StudySpec.model_validate(tiny.spec_for(tmp_path, "builtin:python-docs")), workspace)


def gguf(path, layers=2, drop=(), block_count=None):
    """A GGUF file of a tiny Llama, written by the gguf package; its tensors are float32."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers if block_count is None else block_count)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    shapes = {"token_embd.weight": (260, 32), "output_norm.weight": (32,), "output.weight": (260, 32)}
    for n in range(layers):
        shapes |= {f"blk.{n}.{norm}_norm.weight": (32,) for norm in ("attn", "ffn")}
        shapes |= {f"blk.{n}.attn_{which}.weight": (32 if which in ("q", "output") else 16, 32) for which in "qkv"}
        shapes |= {f"blk.{n}.attn_output.weight": (32, 32), f"blk.{n}.ffn_down.weight": (32, 48)}
        shapes |= {f"blk.{n}.ffn_{which}.weight": (48, 32) for which in ("gate", "up")}
    for name, shape in shapes.items():
        if not name.startswith(drop or ("none",)):
            writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:3], "is not a GGUF file"),
        (lambda data: data[:10], "is cut off, or is not a GGUF file that can be read"),
        (lambda data: data[:200], "is cut off, or is not a GGUF file that can be read"),
        (lambda data: data[:-1], "is cut off: its table names"),
        (lambda data: data[: len(data) // 2], "is cut off: its table names"),
        (lambda data: data[:24] + b"\xff" * 200, "is cut off, or is not a GGUF file that can be read"),
        (lambda data: data[:8] + struct.pack("<QQ", 2**60, 2**60) + data[24:], "is cut off, or is not"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "is GGUF v9"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", "git lfs pull"),
    ],
)
def test_a_gguf_that_is_none(tmp_path, workspace, damage, message):
    path = gguf(tmp_path / "whole.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(path.read_bytes()))
    said = refusal(bad, workspace)
    assert message in said and str(bad) in said


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"drop": ("blk.1.",)}, "lacks 1 of its 2 layers, first blk.1"),
        ({"block_count": 4}, "lacks 2 of its 4 layers, first blk.2, blk.3"),
        ({"block_count": 10**9}, "says that it has 1000000000 layers"),
        ({"block_count": 0}, "says that it has 0 layers"),
    ],
)
def test_a_gguf_that_lacks_layers(tmp_path, workspace, made, message):
    assert message in refusal(gguf(tmp_path / "bad.gguf", **made), workspace)


def test_a_gguf_that_lacks_a_tensor_is_refused_by_the_loader(tmp_path, workspace):
    """transformers would make it up, and what it made up would be kept for every later study."""
    from outliers.files.sealed import seal_folder
    from outliers.model.gguf import FOLDER, gguf_weights
    from outliers.model.source import ModelSource

    for name, drop in (("whole", ()), ("lacking", ("blk.1.ffn_down",))):
        path = gguf(tmp_path / f"{name}.gguf", drop=drop)
        source = ModelSource(kind="gguf", id=name, name=name, revision=name, path=str(path))
        # its config and tokenizer, as they were read from the file before
        folder = workspace.models / source.key / FOLDER
        folder.mkdir(parents=True)
        tiny.make_model(folder, num_hidden_layers=2)
        (folder / "model.safetensors").unlink()
        seal_folder(folder)
        if not drop:
            assert len(load_file(gguf_weights(source, workspace) / "model.safetensors")) == 21
            continue
        with pytest.raises(
            UnknownModel, match=r"lacks 1 weights of its model, .*first model\.layers\.1\.mlp\.down_proj\.weight"
        ):
            gguf_weights(source, workspace)
        assert not (folder / "model.safetensors").exists()
