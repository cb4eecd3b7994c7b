"""Capture: the right tensors, once a pass, on disk bit for bit, whatever kills the process in between."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
import zarr

from outliers.architectures import FAMILIES
from outliers.capture import extract
from outliers.errors import Busy, CaptureMismatch, CorruptCapture, SiteError
from outliers.models import load_model
from outliers.prepare import prepare
from outliers.spec import StudySpec
from outliers.steps import capture_exists, run_verify
from outliers.store import Journal
from outliers.workspace import open_workspace
from tests import tiny
from tests.synthetic import Silent

SITES = ("attn_in", "mlp_in", "o_in", "resid")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("The quick brown fox — jumps over the lazy dog, “twice”.\n" * 400)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("llama"), "Llama")


def prepared(workspace, folder, text, **parts):
    return prepare(StudySpec.model_validate(tiny.spec_for(folder, text, **parts)), workspace)


def stored(workspace, study, site):
    """The site's array, all of it, through zarr itself; bfloat16 as float32."""
    array = zarr.open_group(workspace.capture(study.capture_id) / "activations.zarr", mode="r")[site]
    values = array[:]
    return (values.astype(np.uint32) << 16).view(np.float32) if array.attrs["dtype"] == "bfloat16" else values


def independent(workspace, study):
    """The same tensors by other means: what attention, its projection and the MLP receive, and what a layer returns."""
    model = load_model(study.model, workspace, "cpu")
    found = {site: [[] for _ in model.base_model.layers] for site in SITES}

    def keep(site, index, pick):
        def hook(_module, args, kwargs, *output):
            value = pick(args, kwargs, output)
            found[site][index].append((value[0] if isinstance(value, tuple) else value).detach().clone())

        return hook

    for index, layer in enumerate(model.base_model.layers):
        layer.self_attn.register_forward_pre_hook(
            keep("attn_in", index, lambda a, k, o: k["hidden_states"] if "hidden_states" in k else a[0]),
            with_kwargs=True,
        )
        layer.mlp.register_forward_pre_hook(
            keep("mlp_in", index, lambda a, k, o: a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        layer.self_attn.o_proj.register_forward_hook(keep("o_in", index, lambda a, k, o: a[0]), with_kwargs=True)
        layer.register_forward_hook(keep("resid", index, lambda a, k, o: o[0]), with_kwargs=True)
    from outliers.corpus import load_corpus

    ids = torch.from_numpy(load_corpus(study.corpus, workspace).token_ids.astype(np.int64))
    step = study.spec.capture.batch_sequences
    with torch.inference_mode():
        for start in range(0, len(ids), step):
            model(input_ids=ids[start : start + step])
    return {site: torch.stack([torch.cat(layer) for layer in layers]) for site, layers in found.items()}


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_in_the_table_gives_what_its_modules_receive(tmp_path, workspace, text, family):
    model = tiny.make_model(tmp_path / "model", family, dtype="bfloat16")
    study = prepared(workspace, model, text, capture={"sites": SITES, "batch_sequences": 2}, sequences=3)
    extract(study, workspace, Silent())
    for site, tensor in independent(workspace, study).items():
        np.testing.assert_array_equal(stored(workspace, study, site), tensor.float().numpy(), err_msg=site)


def test_the_families_tried_are_the_table():
    assert {f"{name}ForCausalLM" for name in tiny.FAMILIES} == set(FAMILIES)


def test_group_holds_ids_lengths_mask_and_described_axes(workspace, llama, text):
    study = prepared(workspace, llama, text, model={"dtype": "bfloat16"}, capture={"layers": (0, 2)})
    extract(study, workspace, Silent())
    group = zarr.open_group(workspace.capture(study.capture_id) / "activations.zarr", mode="r")
    assert group["token_ids"].shape == (4, 24)
    assert group["token_ids"].dtype == np.int32
    assert group["lengths"][:].tolist() == [24] * 4
    assert group["mask"][:].all()
    array = group["mlp_in"]
    assert (array.shape, array.chunks, array.dtype) == ((2, 4, 24, 32), (1, 1, 24, 32), np.uint16)
    assert array.metadata.dimension_names == ("layer", "sequence", "position", "feature")
    assert array.fill_value == 0x7FC0
    assert array.attrs["layers"] == [0, 2]
    fingerprint = json.loads((workspace.capture(study.capture_id) / "capture.json").read_text())
    assert len(fingerprint["sequence_texts"]) == 4


def test_one_forward_pass_a_batch_and_the_head_is_not_called(workspace, llama, text):
    calls = {"base": 0, "head": 0}

    def count(module, _args):
        calls["base"] += isinstance(module, transformers.LlamaModel)
        calls["head"] += isinstance(module, torch.nn.Linear) and module.out_features == tiny.COMMON["vocab_size"]

    study = prepared(workspace, llama, text, sequences=5, capture={"batch_sequences": 2})
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        extract(study, workspace, Silent())
    finally:
        hook.remove()
    assert calls == {"base": 3, "head": 0}


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_codec_changes_no_value_and_is_kept_on_resume(tmp_path, llama, text, codec):
    plain, other = open_workspace(tmp_path / "a"), open_workspace(tmp_path / "b")
    study = prepared(plain, llama, text)
    extract(study, plain, Silent())
    packed = prepared(other, llama, text, capture={"codec": codec})
    assert packed.capture_id == study.capture_id
    extract(packed, other, Silent())
    np.testing.assert_array_equal(stored(plain, study, "mlp_in"), stored(other, packed, "mlp_in"))
    # the same study again with the other codec finds the capture complete
    again = prepared(other, llama, text, capture={"codec": "none" if codec == "zstd" else "zstd"})
    assert extract(again, other, Silent())["sequences"] == 0


def test_finished_capture_is_not_computed_again(workspace, llama, text):
    study = prepared(workspace, llama, text)
    assert extract(study, workspace, Silent())["sequences"] == 4
    assert extract(study, workspace, Silent()) == {"sequences": 0, "of_sequences": 4, "seconds": 0.0}


def content(workspace, study):
    """Every file of the finished arrays, by name."""
    root = workspace.capture(study.capture_id) / "activations.zarr"
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def journal_entries(workspace, study):
    return Journal.open(workspace.capture(study.capture_id) / "journal.jsonl").done


@pytest.mark.servers
def test_sigkill_at_any_instant_then_resume_is_bit_identical(tmp_path, llama, text):
    """The real command, killed at random instants until it gets through."""
    calm, stormy = open_workspace(tmp_path / "calm"), open_workspace(tmp_path / "stormy")
    count = 300
    parts = {"sequences": count, "length": 48, "capture": {"sites": SITES, "batch_sequences": 2}}
    study = prepared(calm, llama, text, **parts)
    extract(study, calm, Silent())
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(tiny.spec_for(llama, text, **parts)))
    chance, killed = random.Random(3), 0
    capture = stormy.capture(study.capture_id)

    def chunks():
        return sum(1 for _ in (capture / "activations.zarr" / "attn_in").glob("c.*"))

    for _ in range(4):
        # strike after a random number of new chunks: three are a sequence, 900 the whole
        target = chunks() + chance.randint(1, 150)
        command = [sys.executable, "-m", "outliers", "extract", str(spec), "--workspace", str(stormy.root)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and chunks() < target:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed == 4
    assert 0 < len(journal_entries(stormy, study)) < count, "killed too early or too late to show anything"
    extract(study, stormy, Silent())
    assert content(stormy, study) == content(calm, study)
    assert sorted(journal_entries(stormy, study)) == list(range(count))


def damaged(tmp_path, llama, text):
    workspace = open_workspace(tmp_path / "ws")
    study = prepared(workspace, llama, text)
    extract(study, workspace, Silent())
    return workspace, study, workspace.capture(study.capture_id)


def test_torn_journal_line_is_redone(tmp_path, llama, text):
    workspace, study, folder = damaged(tmp_path, llama, text)
    whole, files = (folder / "journal.jsonl").read_bytes(), content(workspace, study)
    (folder / "journal.jsonl").write_bytes(whole[:-30])
    assert not capture_exists(study, workspace)
    assert extract(study, workspace, Silent())["sequences"] == 1
    assert (folder / "journal.jsonl").read_bytes() == whole
    assert content(workspace, study) == files


def test_missing_and_short_chunks_are_redone(tmp_path, llama, text):
    workspace, study, folder = damaged(tmp_path, llama, text)
    files = content(workspace, study)
    (folder / "activations.zarr" / "mlp_in" / "c.2.1.0.0").unlink()
    short = folder / "activations.zarr" / "attn_in" / "c.0.3.0.0"
    short.write_bytes(short.read_bytes()[:-4])
    (folder / "activations.zarr" / "attn_in" / ".c.0.0.0.0.tmp").write_bytes(b"torn")
    assert extract(study, workspace, Silent())["sequences"] == 2
    assert content(workspace, study) == files


def test_flipped_bit_and_damaged_journal_are_errors(tmp_path, llama, text):
    workspace, study, folder = damaged(tmp_path, llama, text)
    run_verify(study, workspace, Silent())
    chunk = folder / "activations.zarr" / "mlp_in" / "c.1.2.0.0"
    raw = bytearray(chunk.read_bytes())
    raw[100] ^= 4
    chunk.write_bytes(raw)
    with pytest.raises(CorruptCapture, match=r"c\.1\.2\.0\.0 has checksum"):
        run_verify(study, workspace, Silent())
    from outliers.analyze import analyze

    with pytest.raises(CorruptCapture, match=r"c\.1\.2\.0\.0 has checksum"):
        analyze(study, workspace, Silent())
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"sequence": 1', b'"sequence": 9'))
    with pytest.raises(CorruptCapture, match=r"line 2 of .* is damaged"):
        extract(study, workspace, Silent())


@pytest.mark.parametrize("name", ["torch", "token_sha256", "revision"])
def test_other_conditions_are_refused(tmp_path, llama, text, name):
    workspace, study, folder = damaged(tmp_path, llama, text)
    fingerprint = json.loads((folder / "capture.json").read_text())
    fingerprint["fixed"][name] = "0.0.1"
    (folder / "capture.json").write_text(json.dumps(fingerprint))
    with pytest.raises(CaptureMismatch, match=f"was begun with {name} 0.0.1, now it is"):
        extract(study, workspace, Silent())


def test_two_writers_of_one_capture_are_refused(tmp_path, workspace, llama, text):
    import fcntl

    study = prepared(workspace, llama, text)
    folder = workspace.capture(study.capture_id)
    folder.mkdir(parents=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="another process is writing"):
            extract(study, workspace, Silent())
    assert extract(study, workspace, Silent())["sequences"] == 4


def test_a_writer_that_fails_ends_the_pass_with_its_error(workspace, llama, text):
    study = prepared(workspace, llama, text, sequences=40)
    folder = workspace.capture(study.capture_id)
    extract(study, workspace, Silent())
    (folder / "journal.jsonl").unlink()
    shutil.rmtree(folder / "activations.zarr" / "mlp_in")
    (folder / "activations.zarr" / "mlp_in").write_text("in the way")
    with pytest.raises(NotADirectoryError):
        extract(study, workspace, Silent())
    assert not journal_entries(workspace, study)


def test_a_site_that_runs_twice_is_refused():
    """One tensor a site, layer and pass: anything else would silently be the wrong one."""
    from outliers.architectures import SiteModule
    from outliers.forward import Batch, HookedPass
    from outliers.ring import Ring
    from outliers.store import Layout

    class Twice(torch.nn.Module):
        def __init__(self, times):
            super().__init__()
            self.norm, self.times = torch.nn.Identity(), times

        def forward(self, input_ids, use_cache):
            for _ in range(self.times):
                self.norm(torch.zeros(1, 4, 8))

    layout = Layout(widths={"attn_in": 8}, layers=(0,), num_sequences=1, positions=4, dtype="float32", codec="none")
    for times, message in ((2, "ran twice"), (0, "1 of 1 tensors never came")):
        model = Twice(times)
        with pytest.raises(SiteError, match=message), Ring(128, 4, lambda key, values: None) as ring:
            hooked = HookedPass(model, [SiteModule("attn_in", 0, "norm", "output")], ring, layout, lambda done: None)
            hooked.forward(model, Batch(range(1), 1, None, None), torch.zeros(1, 4))


def test_ring_is_bounded_and_never_mixes_slots():
    """A slow writer: the hook waits for a slot, and each tensor arrives whole."""
    from outliers.ring import Ring

    seen = {}

    def write(key, values):
        time.sleep(0.002)
        seen[key] = values.copy()

    with Ring(64, 4, write) as ring:
        for number in range(60):
            ring.submit(number, torch.full((4, 4), float(number)))
        assert ring.total_bytes == 256
        assert len(seen) >= 60 - 4 - 2
    assert all((seen[number] == number).all() for number in range(60))


def test_environment_of_the_process_is_left_alone(workspace, llama, text):
    before = dict(os.environ)
    extract(prepared(workspace, llama, text), workspace, Silent())
    assert dict(os.environ) == before
