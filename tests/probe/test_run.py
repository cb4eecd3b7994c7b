"""A probe as a whole: its checks can fail, bad input is refused, and what was stopped ends with the same bits."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

import outliers.probe.engine as engine
import outliers.probe.run as run
from outliers.capture.extract import extract
from outliers.capture.load import load_model
from outliers.corpus.tokens import load_corpus
from outliers.counting.analyze import analyze
from outliers.errors import BadInput, Busy, ProbeMismatch
from outliers.locks import acquire
from outliers.probe.prefix import prefix_ids
from outliers.probe.run import probe
from outliers.quantization.emulate import emulate
from outliers.spec.formats import parse_format
from outliers.store.journal import sealed_line
from outliers.study.demand import demand_of
from outliers.study.prepare import layout_of
from outliers.study.probe_memory import probe_memory
from outliers.study.probes import probe_folder, probe_id
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.captured import prepared
from tests.support.probe_oracle import (
    DENSE,
    Oracle,
    assert_same,
    made,
    measures,
    numbers_of,
    study_of,
    zero,
)
from tests.support.synthetic import Silent

REFUSED = [
    # asked, what is said
    ({}, "nothing is asked of the probe"),
    ({"zero": ("32",)}, "has the features 0 to 31"),
    ({"quantize": ("int8_token",), "hold": ("random=3",)}, "give systematic, or numbers"),
    ({"weight": ("3.mlp.down_proj[0,0]",)}, "has layers 0 to 2"),
    ({"weight": ("1.mlp[0,0]",)}, "has no such module with a matrix: give one of self_attn.q_proj"),
    ({"weight": ("1.mlp.down_proj[32,0]",)}, "32 outputs and 48 inputs"),
    ({"weight": ("1.proj[0,0]",)}, "no such module"),
    ({"quantize": ("had64+nvfp4",)}, "rotates blocks of 64 features, and attn_in has 32"),
    ({"prefix": "260"}, "ids of .* end at 259"),
    ({"prefix": "auto"}, "knows no massive activation here"),
    ({"smooth": (0.5,), "map": "int8_token"}, "go with formats"),
]


class Stopped(Exception):
    """What ends a probe in the middle of the next test."""


def test_float32_finds_what_the_study_captured_in_bfloat16(world, tmp_path):
    """The model again, in float32: its losses are not compared with the capture's, and the numbers are those of float32."""
    _, folder, text = world
    workspace = open_workspace(tmp_path / "w")
    parts = {"model": {"dtype": "bfloat16"}}
    study = study_of(workspace, folder, text, {"zero": ("7",), "probe_dtype": "float32"}, **parts)
    extract(study, workspace, Silent())
    probe(study, workspace, Silent())
    found, _ = numbers_of(study, workspace)
    assert found.dtype == "float32" and not found.gates.reference.compared
    assert "dtype bfloat16" in found.gates.reference.reason
    plain = study_of(workspace, folder, text, {"zero": ("7",)}, **parts)
    probe(plain, workspace, Silent())
    rounded, _ = numbers_of(plain, workspace)
    assert rounded.gates.reference.compared and rounded.gates.reference.value == 0
    assert rounded.gates.floor.value > 1e6 * found.gates.floor.value
    exact = study_of(world[0], folder, text, {"zero": ("7",)})
    probe(exact, world[0], Silent())
    assert numbers_of(exact, world[0])[0].changes[0].kl == found.changes[0].kl


def test_padding_and_a_last_batch_that_is_cut(workspace, llama, tmp_path):
    """Documents of unequal length, 3 of 5 sequences: the batch of the last one is whole, its second sequence is not measured."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text("abcdefgh" * (1 + number % 3))
    study = study_of(workspace, llama, folder, {"zero": ("7",), "probe_sequences": 3}, corpus={"packing": "documents"})
    extract(study, workspace, Silent())
    probe(study, workspace, Silent())
    found, _ = numbers_of(study, workspace)
    corpus = load_corpus(study.corpus, workspace)
    lengths = corpus.lengths[:3]
    assert len(set(lengths.tolist())) > 1
    assert (found.sequences, found.tokens) == (3, int((lengths - 1).sum()))
    oracle = Oracle(study, workspace)
    kl, nll = 0.0, 0.0
    for sequence, length in enumerate(lengths):
        ids = torch.from_numpy(corpus.token_ids[sequence : sequence + 1, :length].astype(np.int64))
        oracle.ids = ids
        p = torch.log_softmax(oracle.logits(), -1)
        q = torch.log_softmax(oracle.logits(oracle.everywhere(("attn_in", "mlp_in"), lambda s, n: zero((7,)))), -1)
        kl += float((p.exp() * (p - q)).sum())
        nll -= float(q.gather(-1, ids[:, 1:, None]).sum())
    assert found.changes[0].kl == pytest.approx(kl / found.tokens, rel=1e-5)
    assert found.changes[0].perplexity == pytest.approx(math.exp(nll / found.tokens), rel=1e-5)


def test_a_capture_with_another_loss_ends_the_probe(workspace, llama, text):
    study = study_of(workspace, llama, text, {"zero": ("3",)})
    extract(study, workspace, Silent())
    path = workspace.capture(study.capture_id) / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    lines[1]["nll"] = float(np.nextafter(lines[1]["nll"], np.inf))
    path.write_bytes(b"".join(sealed_line(line) for line in lines))
    with pytest.raises(ProbeMismatch, match=r"sequence 1 has a loss of .* nats here, and .* in the capture's journal"):
        probe(study, workspace, Silent())
    assert not (probe_folder(study, workspace) / "numbers").exists()


def test_a_model_whose_passes_differ_ends_the_probe(workspace, llama, text, monkeypatch):
    """The identity's KL is exactly 0, or there are no numbers."""
    study = study_of(workspace, llama, text, {"zero": ("3",)}, capture=DENSE | {"perplexity": False})
    extract(study, workspace, Silent())
    passes = []

    def restless(info, *args, **options):
        model = load_model(info, *args, **options)
        model.model.norm.register_forward_hook(lambda _m, _a, out: out * (1 + 1e-6 * (passes.append(0) or len(passes))))
        return model

    monkeypatch.setattr(run, "load_model", restless)
    with pytest.raises(ProbeMismatch, match="changes nothing"):
        probe(study, workspace, Silent())


def test_a_capture_without_losses_is_said(workspace, llama, text):
    study = study_of(workspace, llama, text, {"zero": ("3",)}, capture=DENSE | {"perplexity": False})
    extract(study, workspace, Silent())
    probe(study, workspace, Silent())
    found, _ = numbers_of(study, workspace)
    assert found.gates.reference.reason == "the capture has no losses (--perplexity)"
    assert found.gates.identity.value == 0 and found.gates.reference.value is None


@pytest.mark.parametrize(("asked", "said"), REFUSED)
def test_what_is_refused_before_a_model_is_loaded(world, monkeypatch, asked, said):
    workspace, folder, text = world
    monkeypatch.setattr(run, "load_model", lambda *_args, **_options: pytest.fail("a model was loaded"))
    with pytest.raises(BadInput, match=said):
        probe(study_of(workspace, folder, text, asked), workspace, Silent())


def test_a_study_that_was_not_counted_is_refused_for_its_features(workspace, llama, text):
    study = study_of(workspace, llama, text, {"probe": "check"})
    with pytest.raises(BadInput, match="has no results on this machine"):
        probe(study, workspace, Silent())


def test_two_at_once_are_refused(workspace, llama, text):
    study = study_of(workspace, llama, text, {"zero": ("3",)})
    folder = probe_folder(study, workspace)
    folder.mkdir(parents=True)
    handle = acquire(folder / "lock")
    try:
        with pytest.raises(Busy, match="another process makes the probe"):
            probe(study, workspace, Silent())
    finally:
        os.close(handle)


def test_a_finished_probe_is_not_made_again_and_a_changed_one_is(world, monkeypatch):
    workspace = world[0]
    study, _, _ = made(world, {"zero": ("3",)})
    real = run.load_model
    monkeypatch.setattr(run, "load_model", lambda *_args, **_options: pytest.fail("a model was loaded"))
    assert probe(study, workspace, Silent()) == {"probe_id": probe_id(study), "seconds": 0.0}
    path = probe_folder(study, workspace) / "numbers" / "probes.json"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"perplexity", b"perplexitx", 1))
    monkeypatch.setattr(run, "load_model", real)
    probe(study, workspace, Silent())
    assert path.read_bytes() == data


@pytest.mark.parametrize("attempts", [2, pytest.param(7, marks=pytest.mark.studies)])
def test_a_probe_that_is_stopped_anywhere_ends_with_the_same_bits(world, monkeypatch, attempts):
    """An error at the start of any pass, and a torn journal: what is left is measured, and every file is the same."""
    workspace = world[0]
    asked = {"zero": ("3",), "quantize": ("int8_token",), "map": "int8_token", "prefix": "256"}
    study, _, _ = made(world, asked)
    place = probe_folder(study, workspace)
    wanted = {path.name: path.read_bytes() for path in (place / "numbers").iterdir()}
    journal = sorted((place / "journal.jsonl").read_bytes().splitlines())
    whole = engine.Engine.forward
    counted = []

    def counting(self, *args, **options):
        counted.append(0)
        return whole(self, *args, **options)

    shutil.rmtree(place)
    monkeypatch.setattr(engine.Engine, "forward", counting)
    probe(study, workspace, Silent())
    passes = len(counted)
    random = np.random.RandomState(3)
    for attempt in range(attempts):
        shutil.rmtree(place)
        stops = random.randint(1, passes // 2, 3).tolist()
        while stops:
            counted.clear()
            stop = stops.pop()

            def stopping(self, *args, stop=stop, **options):
                counted.append(0)
                if len(counted) >= stop:
                    raise Stopped
                return whole(self, *args, **options)

            monkeypatch.setattr(engine.Engine, "forward", stopping)
            try:
                probe(study, workspace, Silent())
                break
            except Stopped:
                path = place / "journal.jsonl"
                if path.exists():
                    path.write_bytes(path.read_bytes() + b'{"change": "zero 3", "seq')
        monkeypatch.setattr(engine.Engine, "forward", whole)
        probe(study, workspace, Silent())
        assert {path.name: path.read_bytes() for path in (place / "numbers").iterdir()} == wanted, attempt
        assert sorted((place / "journal.jsonl").read_bytes().splitlines()) == journal


@pytest.mark.parametrize("moments", [(4_000,), pytest.param((1, 4_000, 12_000), marks=pytest.mark.studies)])
def test_a_probe_that_is_killed_goes_on(workspace, llama, text, moments):
    """A real process, ended by SIGKILL as soon as its journal has a given number of bytes."""
    study = study_of(workspace, llama, text, {"zero": ("3", "4"), "map": "int8_token"})
    extract(study, workspace, Silent())
    spec = workspace.root / "spec.json"
    spec.write_text(study.model_dump_json())
    place = probe_folder(study, workspace)
    path = place / "journal.jsonl"
    for least in moments:
        command = [sys.executable, "-m", "outliers", "probe", str(spec), "--workspace", str(workspace.root)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (path.exists() and path.stat().st_size >= least) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    probe(study, workspace, Silent())
    wanted = {file.name: file.read_bytes() for file in (place / "numbers").iterdir()}
    shutil.rmtree(place)
    probe(study, workspace, Silent())
    assert {file.name: file.read_bytes() for file in (place / "numbers").iterdir()} == wanted


def test_a_prefix_is_a_text_ids_or_the_token_of_the_largest_massive_activation(world):
    workspace, folder, text = world
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    def ids(prefix, massive=None, **parts):
        return prefix_ids(study_of(workspace, folder, text, {"prefix": prefix}, **parts), workspace, massive)

    assert ids("ab") == (alphabet.index("a"), alphabet.index("b"))
    assert ids("7,9") == (7, 9) and ids("auto", 5) == (5,)
    long = prepared(workspace, folder, text, sequences=1, length=511, probe={"prefix": "ab"})
    with pytest.raises(BadInput, match=r"makes sequences of 513 tokens, and .* was made for 512 positions"):
        prefix_ids(long, workspace, None)


def test_what_a_probe_takes_grows_with_what_it_is_asked(world):
    """Every term of the memory shows: bytes that are known here from the shapes."""
    workspace, folder, text = world
    plain = study_of(workspace, folder, text, {"zero": ("3",)}, model={"dtype": "bfloat16"})
    info = plain.model

    def taken(**asked):
        spec = study_of(workspace, folder, text, asked, model={"dtype": "bfloat16"}).spec
        return probe_memory(spec, info, layout_of(spec, info), demand_of(spec, info).activation_bytes)

    base = taken(zero=("3",))
    wide = taken(zero=("3",), probe_dtype="float32")
    assert base.model == info.weights.memory_bytes and wide.model == 2 * base.model and wide.work > base.work
    # 2 sequences of 24 tokens of 32 features in 2 bytes, of 3 layers
    assert taken(map="int8_token").work - base.work == 3 * 2 * 24 * 32 * 2
    copies = taken(quantize=("int8_token",), weights="int8_channel").work - taken(quantize=("int8_token",)).work
    assert copies == 3 * max(info.weights.layer_bytes)
    assert base.work >= 7 * (32 * 1024 * 1024 // (8 * 260)) * 260 * 8


def test_layers_are_computed_where_more_than_the_hidden_state_passes_between_them(workspace, llama, text, monkeypatch):
    """A model whose last MLP uses what its first one left: no layer is left out, and the map is right."""
    study = study_of(workspace, llama, text, {"map": "int4_token"}, capture=DENSE | {"perplexity": False})
    extract(study, workspace, Silent())

    def carrying(info, *args, **options):
        model = load_model(info, *args, **options)
        left = {}
        first, last = model.model.layers[0].mlp, model.model.layers[2].mlp
        first.register_forward_hook(lambda _m, _a, out: left.update(value=out.abs().mean()))
        last.register_forward_hook(lambda _m, _a, out: out + left.pop("value", 0))
        return model

    monkeypatch.setattr(run, "load_model", carrying)
    probe(study, workspace, Silent())
    found, _ = numbers_of(study, workspace)
    assert not found.gates.prefix_sharing and found.gates.identity.value == 0
    monkeypatch.setattr("tests.support.probe_oracle.load_model", carrying)
    oracle = Oracle(study, workspace)
    untouched = oracle.logits()
    for change in found.changes:
        form = parse_format("int4_token")
        hooks = oracle.at(change.sites[0], change.layers[0], lambda x, own=form: emulate(x, own))
        assert_same(change, measures(untouched, oracle.logits(hooks), oracle.ids))


def test_the_list_of_a_study_whose_summary_is_elsewhere_comes_from_its_results(workspace, llama, text):
    """Results that are here without the private summary give the list; ranges are then the probe's own."""
    study = study_of(workspace, llama, text, {"zero": ("systematic",), "mean": ("systematic",)})
    extract(study, workspace, Silent())
    folder = workspace.study(study.study_id)
    folder.mkdir(parents=True)
    content = {"study_id": "0" * 16, "systematic": [{"feature": 7}, {"feature": 2}]}
    (folder / "summary.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="has no results on this machine"):
        probe(study, workspace, Silent())
    (folder / "summary.json").write_text(json.dumps(content | {"study_id": study.study_id}))
    probe(study, workspace, Silent())
    found, _ = numbers_of(study, workspace)
    names = [change.name for change in found.changes]
    assert names[:3] == ["zero systematic", "zero systematic 7", "zero systematic 2"]
    assert [change.group for change in found.changes] == ["systematic", "each", "each"] * 2
    assert found.changes[0].features == [7, 2]
    assert {change.ranges_of for change in found.changes if change.kind == "mean"} == {"probe"}


def test_auto_is_the_token_of_the_largest_massive_activation(workspace, text, tmp_path):
    """A model that carries a value of 5,000 wherever it reads a q."""
    folder = tiny.make_model(tmp_path / "model", "Llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    letter = sorted(pre_tokenizers.ByteLevel.alphabet()).index("q")
    with torch.no_grad():
        model.model.embed_tokens.weight[letter, 4] = 5_000
    model.save_pretrained(folder)
    sites = {"sites": ("attn_in", "mlp_in", "resid")}
    study = study_of(workspace, folder, text, {"prefix": "auto"}, capture=sites)
    extract(study, workspace, Silent())
    analyze(study, workspace, Silent())
    probe(study, workspace, Silent())
    found, _ = numbers_of(study, workspace)
    assert [(change.name, change.prefix) for change in found.changes] == [("prefix", [letter])]
