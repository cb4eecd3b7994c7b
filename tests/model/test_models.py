"""Models: which one exactly, what is counted from the config alone, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from outliers.capture.load import load_model
from outliers.errors import BadInput, UnknownModel
from outliers.model.describe import describe_model
from outliers.model.source import find_model
from outliers.spec import ModelSpec, StudySpec
from outliers.study.demand import demand_of
from outliers.study.prepare import layout_of, model_info, prepare
from tests.support import tiny


def describe(workspace, folder, dtype="auto"):
    return describe_model(find_model(ModelSpec(id=str(folder)), workspace), dtype, workspace)


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_parameters_are_those_of_the_real_model(tmp_path, workspace, family):
    """Counted without weights from the config, and again from the model as it is loaded, expert by expert."""
    info = describe(workspace, tiny.make_model(tmp_path, family))
    model = load_model(info, workspace, "cpu")
    weights = dict(model.named_parameters())  # tied ones once
    assert info.total_parameters == sum(p.numel() for p in weights.values())
    assert info.weight_bytes == 4 * info.total_parameters
    resting = 0
    for name, weight in weights.items():
        if name.split(".")[-2] == "experts":  # shared experts are called otherwise, and are always active
            resting += weight.numel() // info.num_experts * (info.num_experts - info.experts_per_token)
    assert info.active_parameters == info.total_parameters - resting
    assert (resting > 0) == (info.num_experts is not None) == bool(info.anatomy.moe_layers)


def test_o_in_has_the_width_of_the_heads(tmp_path, workspace):
    info = describe(workspace, tiny.make_model(tmp_path, "Qwen3"))
    assert (info.hidden_size, info.anatomy.widths["o_in"]) == (32, 64)


def test_dtype_auto_is_the_checkpoints_own(tmp_path, workspace):
    assert describe(workspace, tiny.make_model(tmp_path, dtype="bfloat16")).dtype == "bfloat16"
    assert describe(workspace, tmp_path, "float16").dtype == "float16"


def test_dtype_of_a_config_that_names_none_is_read_from_the_weights(tmp_path, workspace):
    tiny.make_model(tmp_path, dtype="bfloat16")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(workspace, tmp_path).dtype == "bfloat16"
    # packed weights are bytes, and most of the file: they are not what is computed in
    save_file(
        {"a": torch.zeros(9, dtype=torch.uint8), "b": torch.zeros(2, dtype=torch.float16)},
        tmp_path / "model.safetensors",
    )
    assert describe(workspace, tmp_path).dtype == "float16"
    save_file({"a": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownModel, match="names no dtype, and only U8 among its weights: give --dtype"):
        describe(workspace, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    source = find_model(ModelSpec(id=str(tmp_path)), workspace, weights=False)
    with pytest.raises(UnknownModel, match="names no dtype, and there are no weights to see it from: give --dtype"):
        describe_model(source, "auto", workspace)


def test_revision_of_a_folder_is_the_hash_of_its_files(tmp_path, workspace):
    one = find_model(ModelSpec(id=tiny.make_model(tmp_path / "a", seed=1)), workspace)
    same = find_model(ModelSpec(id=tiny.make_model(tmp_path / "b", seed=1)), workspace)
    other = find_model(ModelSpec(id=tiny.make_model(tmp_path / "c", seed=2)), workspace)
    assert one.revision == same.revision != other.revision
    assert one.id == f"local:{one.revision[:12]}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:gpt5", "built in: builtin:smollm2"),
        ("/no/such/folder", "there is no model at"),
        ("./nothing", "there is no model at"),
        ("model.gguf", "there is no file"),
        ("Org/NotCached", "the hub is switched off"),
        ("Org/Not Cached", "no name that the hub could have"),
        ("name with blanks", "no name that the hub could have"),
        ("nul\0", "no name that the hub could have"),
        ("x" * 5000, "there is no model at xxx"),
        ("~nobody_of_that_name/model", "there is no model at ~nobody"),
    ],
)
def test_models_that_are_not_there(workspace, name, message):
    with pytest.raises(UnknownModel, match=message):
        find_model(ModelSpec(id=name), workspace)


def test_pickled_weights_are_never_loaded(tmp_path, workspace):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnknownModel, match="pickled weights"):
        find_model(ModelSpec(id=str(tmp_path)), workspace)


def test_remote_code_is_not_run(tmp_path, workspace):
    folder = tiny.make_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "mystery"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(UnknownModel):
        describe(workspace, folder)
    assert not (tmp_path / "ran").exists()


def test_not_a_gguf_and_a_revision_for_files(tmp_path, workspace):
    (tmp_path / "x.gguf").write_bytes(b"nope")
    with pytest.raises(UnknownModel, match="is not a GGUF file"):
        find_model(ModelSpec(id=str(tmp_path / "x.gguf")), workspace)
    with pytest.raises(UnknownModel, match="known by its files' hash"):
        find_model(ModelSpec(id=tiny.make_model(tmp_path / "m"), revision="main"), workspace)


def test_positions_and_layers_beyond_the_model_are_refused(tmp_path, workspace):
    folder = tiny.make_model(tmp_path)
    for part, message in (
        ({"corpus": {"sequence_length": 600}}, "--sequence-length 600 is more than the 512 positions"),
        ({"capture": {"layers": (0, 3)}}, "layer 3 was asked, and .* has layers 0 to 2"),
    ):
        spec = StudySpec.model_validate(
            {"model": folder, "corpus": {"source": "builtin:python-docs", "sequence_length": 8}} | part
        )
        with pytest.raises(BadInput, match=message):
            model_info(spec, workspace)


@pytest.mark.parametrize("length", [64, 100])
def test_planned_bytes_are_the_bytes_on_disk(tmp_path, workspace, length):
    from outliers.capture.extract import extract
    from tests.support.synthetic import Silent

    spec = StudySpec.model_validate(
        tiny.spec_for(
            tiny.make_model(tmp_path), "builtin:python-docs", 3, length, capture={"sites": ("attn_in", "o_in", "resid")}
        )
        | {"criteria": {"site": "attn_in"}}
    )
    prepared = prepare(spec, workspace)
    extract(prepared, workspace, Silent())
    root = workspace.capture(prepared.capture_id) / "activations.zarr"
    found = sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and p.name != "zarr.json")
    assert found == layout_of(spec, prepared.model).total_bytes


def test_memory_grows_with_what_it_is_made_of(tmp_path, workspace):
    folder = tiny.make_model(tmp_path)

    def ram(**corpus):
        spec = StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", **corpus))
        return demand_of(spec, model_info(spec, workspace)).ram_bytes

    assert ram(sequences=4, length=64) == ram(sequences=4000, length=64), "memory does not grow with the corpus"
    assert ram(length=64) < ram(length=512)


def test_a_gpu_that_is_too_small_is_refused_with_both_numbers(tmp_path, workspace):
    """A machine with one GPU of 1 MiB, as its nvidia-smi tells; without the GPU the study fits."""
    from outliers.errors import PlanRefused
    from outliers.machines.local import LocalProvider
    from outliers.planning.offers import check_plan

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU-1, Toy 1, 1'\n")
    smi.chmod(0o755)
    provider = LocalProvider(workspace.root, str(smi))
    made = tiny.spec_for(tiny.make_model(tmp_path / "m"), "builtin:python-docs", length=512)
    spec = StudySpec.model_validate(made | {"capture": {"batch_sequences": 64}})
    info = model_info(spec, workspace)
    needed = f"{demand_of(spec, info).vram_bytes / 1e9:.1f}"
    with pytest.raises(PlanRefused, match=rf"needs {needed} GB on one GPU, the largest has 0\.0 GB"):
        check_plan(demand_of(spec, info), provider, 0)
    without = StudySpec.model_validate(made | {"compute": {"gpu_count": 0}})
    assert check_plan(demand_of(without, model_info(without, workspace)), provider, 0).gpu_count == 0


@pytest.mark.servers
@pytest.mark.studies
def test_the_builtin_model_keeps_the_values_of_its_file(smollm2_workspace):
    """The converted copy computes what the GGUF file computes, and its tokenizer has the file's special tokens."""
    from pathlib import Path

    from outliers.model.pretrained import load_tokenizer

    workspace = smollm2_workspace
    source = find_model(ModelSpec(id="builtin:smollm2"), workspace)
    info = describe_model(source, "float32", workspace)
    assert (info.total_parameters, info.num_layers, info.hidden_size) == (134_515_008, 30, 576)
    assert describe_model(source, "auto", workspace).dtype == "bfloat16"
    model = load_model(info, workspace, "cpu")
    tokenizer = load_tokenizer(source, workspace)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    path = Path(source.path)
    direct = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.inference_mode():
        ours, theirs = model(ids).logits, direct(ids).logits
    assert torch.equal(ours, theirs)
    assert tokenizer.decode(int(ours[0, -1].argmax())).strip() == "Paris"
