"""A capture a layer at a time: every file is the whole pass's, whatever interrupts it; what can't be read so is refused."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys

import pytest

from outliers.capture.by_layers.seams import WANTED, find_seams
from outliers.capture.extract import extract
from outliers.capture.schedule import decide
from outliers.errors import CorruptCapture, PlanRefused, UnknownModel
from outliers.files.sealed import write_sealed
from outliers.spec import StudySpec
from outliers.store.captures import LAYERS, list_captures
from outliers.store.chunks import is_complete
from outliers.store.verify import verify
from outliers.study.demand import demand_of
from outliers.study.prepare import model_info
from outliers.study.schedule import by_layers, check_schedule, with_schedule
from outliers.workspace import open_workspace
from tests.model.test_fp8 import quantized
from tests.model.test_quantized import gpt_oss
from tests.support import tiny
from tests.support.captured import prepared
from tests.support.commands import run_command
from tests.support.layered import Stopped, captured, files_of, stop_at, study_of, texts
from tests.support.synthetic import Silent

FEW = ["Llama", "Qwen3Moe, one dense"]
"""A dense one, and experts that are stored one by one, with a layer that has none."""


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return texts(tmp_path_factory.mktemp("documents") / "texts")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("moe"), FEW[1], "bfloat16")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, moe, text):
    """The files of the whole pass over the mixture."""
    return captured(tmp_path_factory.mktemp("whole"), moe, text, "whole")[0]


def equal(tmp_path, family, dtype, text, documents):
    folder = tiny.make_model(tmp_path / "model", family, dtype)
    for packing, source in (("joined", text), ("documents", documents)):
        one, one_id = captured(tmp_path / f"{packing}-whole", folder, source, "whole", packing)
        other, other_id = captured(tmp_path / f"{packing}-layers", folder, source, "layers", packing)
        assert one_id == other_id
        assert one.keys() == other.keys()
        assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.parametrize(("family", "dtype"), list(zip(FEW, ("float32", "bfloat16"), strict=True)))
def test_every_file_is_that_of_the_whole_pass(tmp_path, text, documents, family, dtype):
    equal(tmp_path, family, dtype, text, documents)


@pytest.mark.studies
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_every_family_gives_the_files_of_the_whole_pass(tmp_path, text, documents, family, dtype):
    equal(tmp_path, family, dtype, text, documents)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_weights_that_are_made_plain_give_the_files_of_the_whole_pass(tmp_path, text, method):
    """FP8 with its own product, whose last blocks are smaller, and experts of MXFP4 by transformers' converter."""
    if method == "fp8":
        folder = tmp_path / "model"
        quantized(folder)
    else:
        folder, _ = gpt_oss(tmp_path)
    one, other = (captured(tmp_path / order, folder, text, order)[0] for order in ("whole", "layers"))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_layers_above_the_last_captured_one_are_not_run(tmp_path, llama, text):
    """A layer that is not captured gives no chunks, and without perplexity the last one is not loaded."""
    loaded = []
    workspace = open_workspace(tmp_path / "layers")
    study = study_of(workspace, llama, text, "layers", layers=(1,), perplexity=False)
    extract(study, workspace, Silent(), on_step=lambda done: loaded.append(done) if "loaded" in done else None)
    assert loaded == ["layer 0 is loaded", "layer 1 is loaded"]
    one, _ = captured(tmp_path / "whole", llama, text, "whole", layers=(1,), perplexity=False)
    assert files_of(workspace, study) == one


PLACES = [
    # (name of a step, how often it was reached): in the middle of a layer, before and after its line, at the end
    ("layer 0 is loaded", 1),
    ("batch 1 has run in layer 1", 1),
    ("layer 1 is on the disk", 1),
    ("layer 1 is journaled", 1),
    ("layer 2 is done", 1),
    ("all layers are journaled", 1),
    ("the sums are saved", 1),
    ("batch 1 is journaled", 1),
]


ORDERS = ("layers", "whole")
GOING_ON = [
    # at every other place the same order goes on, and the other one; all of them in `make test-studies`
    pytest.param(*place, then, marks=() if (number + order) % 2 == 0 else pytest.mark.studies)
    for number, place in enumerate(PLACES)
    for order, then in enumerate(ORDERS)
]


@pytest.mark.parametrize(("name", "times", "then"), GOING_ON)
def test_an_interrupted_capture_goes_on_in_either_order(tmp_path, moe, text, whole, name, times, then):
    workspace = open_workspace(tmp_path)
    with pytest.raises(Stopped):
        extract(study_of(workspace, moe, text, "layers"), workspace, Silent(), on_step=stop_at(name, times))
    study = study_of(workspace, moe, text, then)
    folder = workspace.capture(study.capture_id)
    assert (folder / LAYERS).is_dir()
    assert not is_complete(folder)
    held = list_captures(workspace)[0]
    layers, batches = study.model.num_layers, 3
    assert held.of_layer_batches == layers * batches
    if name == "layer 1 is journaled":
        assert (held.done, held.layer_batches) == (0, 2 * batches)
    loaded = []
    extract(study, workspace, Silent(), on_step=lambda done: loaded.append(done) if "loaded" in done else None)
    assert list_captures(workspace)[0].of_layer_batches == 0
    assert files_of(workspace, study) == whole
    if name == "layer 1 is on the disk" and then == "layers":
        assert loaded == ["layer 1 is loaded", "layer 2 is loaded"]


def test_a_capture_begun_whole_is_finished_by_layers(tmp_path, moe, text, whole):
    workspace = open_workspace(tmp_path)
    extract(study_of(workspace, moe, text, "whole"), workspace, Silent(), sequences=range(2))
    study = study_of(workspace, moe, text, "layers")
    assert extract(study, workspace, Silent())["sequences"] == 3
    found = files_of(workspace, study)
    # the sums of two calls lie in two files, as after two whole calls
    sums = {name for name in found if name.startswith("experts/")}
    assert {name: found[name] for name in found.keys() - sums} == {
        name: whole[name] for name in whole.keys() - {"experts/0-5.npz"}
    }
    assert verify(workspace.capture(study.capture_id), Silent()).sound


def test_a_torn_line_is_cut_off(tmp_path, moe, text, whole):
    workspace = open_workspace(tmp_path)
    with pytest.raises(Stopped):
        extract(study_of(workspace, moe, text, "layers"), workspace, Silent(), on_step=stop_at("layer 1 is journaled"))
    study = study_of(workspace, moe, text, "layers")
    lines = workspace.capture(study.capture_id) / LAYERS / "layers.jsonl"
    lines.write_bytes(lines.read_bytes()[:-40])
    extract(study, workspace, Silent())
    assert files_of(workspace, study) == whole


@pytest.mark.servers
def test_the_record_of_layers_is_listed_and_a_damaged_one_as_damaged(tmp_path, moe, text):
    workspace = open_workspace(tmp_path)
    with pytest.raises(Stopped):
        extract(study_of(workspace, moe, text, "layers"), workspace, Silent(), on_step=stop_at("layer 1 is journaled"))
    study = study_of(workspace, moe, text, "layers")
    lines = workspace.capture(study.capture_id) / LAYERS / "layers.jsonl"
    done = run_command(tmp_path, "captures", "list", "--workspace", workspace.root, environment=os.environ)
    assert "0 of 5; by layers 66%" in done.stdout, done.stderr
    lines.write_bytes(lines.read_bytes().replace(b"{", b"[", 1))
    held = list_captures(workspace)[0]
    assert (held.model, held.of_sequences, held.of_layer_batches) == ("damaged", 0, 0)
    # a plan whose checksum is right and whose content is not that of a plan
    lines.unlink()
    write_sealed(lines.with_name("plan.json"), {"version": 1, "layers": "many"})
    assert list_captures(workspace)[0].model == "damaged"


@pytest.mark.parametrize("file", ["hidden-2-1.bin", "table-0-expert.npy", "sums-0.npz"])
def test_a_changed_file_between_layers_is_refused(tmp_path, moe, text, file):
    workspace = open_workspace(tmp_path)
    with pytest.raises(Stopped):
        extract(study_of(workspace, moe, text, "layers"), workspace, Silent(), on_step=stop_at("layer 1 is done"))
    study = study_of(workspace, moe, text, "layers")
    path = workspace.capture(study.capture_id) / LAYERS / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCapture, match="begins again at the first layer"):
        extract(study, workspace, Silent())


@pytest.mark.long
@pytest.mark.parametrize(("name", "times"), PLACES)
def test_a_killed_capture_ends_with_the_same_files(tmp_path, moe, text, whole, name, times):
    script = [sys.executable, "-m", "tests.support.layered", str(tmp_path), moe, str(text), name, str(times)]
    killed = subprocess.run(script, check=False, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    workspace = open_workspace(tmp_path)
    study = study_of(workspace, moe, text, "layers")
    extract(study, workspace, Silent())
    assert files_of(workspace, study) == whole


def test_only_the_perplexity_is_added_to_a_finished_capture(tmp_path, llama, text):
    workspace = open_workspace(tmp_path / "one")
    extract(study_of(workspace, llama, text, "whole", perplexity=False), workspace, Silent())
    study = study_of(workspace, llama, text, "layers")
    extract(study, workspace, Silent())
    other = open_workspace(tmp_path / "other")
    extract(study_of(other, llama, text, "whole", perplexity=False), other, Silent())
    extract(study_of(other, llama, text, "whole"), other, Silent())
    assert files_of(workspace, study) == files_of(other, study)


def test_sequences_of_a_shard_are_read_by_layers(tmp_path, moe, text):
    found = []
    for schedule in ("whole", "layers"):
        workspace = open_workspace(tmp_path / schedule)
        study = study_of(workspace, moe, text, schedule)
        for part in (range(2, 4), range(4, 5)):
            extract(study, workspace, Silent(), sequences=part)
        found.append(files_of(workspace, study))
    assert found[0] == found[1]


# What a stand-in must not hide.


def test_names_that_transformers_moved_are_refused_in_a_sentence():
    assert find_seams().load
    module, name, arguments = WANTED[0]
    with pytest.raises(PlanRefused, match=r"has no gone in .*: install the version .* --schedule whole"):
        find_seams(((module, "gone", ()),))
    with pytest.raises(PlanRefused, match="that takes model, state_dict, load_config"):
        find_seams(((module, name, ("model", "weights")),))
    with pytest.raises(PlanRefused, match=r"has no load in transformers\.nowhere"):
        find_seams((("transformers.nowhere", "load", arguments),))


def test_a_layer_that_the_checkpoint_lacks_is_refused(tmp_path, text):
    from safetensors.torch import load_file, save_file

    workspace = open_workspace(tmp_path / "ws")
    folder = tiny.make_model(tmp_path / "model", "Llama")
    study = study_of(workspace, folder, text, "layers")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    for memo in workspace.models.glob("*/complete-*.json"):
        memo.unlink()
    with pytest.raises(UnknownModel, match=r"lacks 1 weights .*layers\.2\.mlp\.up_proj"):
        extract(study, workspace, Silent())


def test_shared_keys_and_values_are_refused_before_a_layer_runs(tmp_path, text):
    workspace = open_workspace(tmp_path / "ws")
    folder = tiny.make_model(
        tmp_path / "model", "Gemma3", num_kv_shared_layers=1
    )  # the field of Gemma3n, which has it as a count
    with pytest.raises(PlanRefused, match="1 layers that read the keys and values of earlier ones"):
        extract(study_of(workspace, folder, text, "layers"), workspace, Silent())


# Which order is taken.


def spec_of(folder, text, **parts):
    return StudySpec.model_validate(tiny.spec_for(folder, text, **parts))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"probe": {"probe": "check"}}, "a probe changes the whole model"),
        (
            {"capture": {"site_modules": ("attn_in=norm*",)}},
            "the site attn_in is read at norm0, which is not in layer 0",
        ),
    ],
)
def test_what_needs_the_whole_model_is_refused(llama, text, workspace, parts, message):
    spec = spec_of(llama, text, compute={"schedule": "layers"}, **{k: v for k, v in parts.items() if k == "probe"})
    info = model_info(spec, workspace)
    if "capture" in parts:
        sites = info.anatomy.sites | {"attn_in": ("norm0", "norm1", "norm2")}
        info = info.model_copy(update={"anatomy": info.anatomy.model_copy(update={"sites": sites})})
    with pytest.raises(PlanRefused, match=message):
        check_schedule(spec, info)
    check_schedule(with_schedule(spec, "whole"), info)


def test_weights_are_thrown_away_only_by_layers_and_from_the_hub(llama, text, workspace):
    spec = spec_of(llama, text, compute={"no_keep_weights": True})
    info = model_info(spec, workspace)
    with pytest.raises(PlanRefused, match="a whole pass can't: give --schedule layers"):
        check_schedule(spec, info)
    with pytest.raises(PlanRefused, match="is for a model of the hub"):
        check_schedule(with_schedule(spec, "layers"), info)


def test_auto_takes_layers_where_the_whole_does_not_fit(tmp_path, llama, text, workspace, caplog):
    spec = spec_of(llama, text)
    small = model_info(spec, workspace)
    assert by_layers(demand_of(spec, small)) is None  # a tiny model would save kilobytes
    weights = small.weights.model_copy(update={"layer_bytes": (10**9,) * 3})
    info = small.model_copy(update={"weights": weights})
    needed = demand_of(spec, info).ram_bytes
    assert decide(spec, small, tmp_path, free_bytes=0)[0].compute.schedule == "whole"
    caplog.set_level(logging.INFO)
    chosen, _ = decide(spec, info, tmp_path, free_bytes=needed)
    assert (chosen.compute.schedule, caplog.text) == ("whole", "")
    chosen, _ = decide(spec, info, tmp_path, free_bytes=needed - 1)
    assert chosen.compute.schedule == "layers"
    assert "whole needs" in caplog.text
    assert "a layer at a time" in caplog.text
    # what was begun by layers goes on so
    (tmp_path / LAYERS).mkdir()
    (tmp_path / LAYERS / "plan.json").write_text("{}")
    assert decide(spec, info, tmp_path, free_bytes=needed)[0].compute.schedule == "layers"
    assert decide(with_schedule(spec, "whole"), info, tmp_path, free_bytes=0)[0].compute.schedule == "whole"


def test_by_layers_takes_the_memory_of_one(llama, text, workspace):
    spec = spec_of(llama, text)
    info = model_info(spec, workspace)
    whole, layered = demand_of(spec, info), demand_of(with_schedule(spec, "layers"), info)
    weights = info.weights
    assert whole.ram_bytes - layered.ram_bytes == sum(weights.layer_bytes) - max(weights.layer_bytes)
    assert layered.parts == (weights.embedding_bytes, max(weights.layer_bytes), weights.rest_bytes)
    # 4 sequences of 24 tokens, 32 features of float32, twice
    assert (whole.spool_bytes, layered.spool_bytes) == (0, 2 * 4 * 24 * 32 * 4)


@pytest.mark.studies
def test_smollm2_by_layers_is_the_whole_capture(tmp_path, smollm2_workspace):
    """Real weights in bfloat16, from the folder that the built-in model is dequantized into."""
    from outliers.model.gguf import gguf_weights

    spec = StudySpec.model_validate(tiny.spec_for("builtin:smollm2", "builtin:python-docs"))
    folder = gguf_weights(model_info(spec, smollm2_workspace).source, smollm2_workspace)
    found = []
    for schedule in ("whole", "layers"):
        workspace = open_workspace(tmp_path / schedule)
        study = prepared(
            workspace,
            folder,
            "builtin:python-docs",
            sequences=3,
            length=128,
            model={"dtype": "bfloat16"},
            capture={"sites": ("attn_in", "mlp_in", "down_in", "resid"), "batch_sequences": 2, "perplexity": True},
            compute={"schedule": schedule},
        )
        extract(study, workspace, Silent())
        found.append(files_of(workspace, study))
    assert found[0] == found[1]
