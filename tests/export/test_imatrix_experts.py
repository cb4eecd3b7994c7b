"""Rows of experts in importance matrices: names as llama.cpp spells them, read back by gguf's reader and by llama-imatrix."""

from __future__ import annotations

import os
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from outliers.corpus.tokens import load_corpus
from outliers.errors import BadInput, CorruptCapture
from outliers.experts.sums import ExpertSums
from outliers.experts.table import ExpertShapes
from outliers.experts.totals import ExpertTotals
from outliers.export.expert_rows import Rows, expert_notes
from outliers.export.formats import ExportRequest, make_export
from outliers.export.gguf_names import gguf_names
from outliers.workspace import open_workspace
from tests.export.test_imatrix import read_dat, read_gguf
from tests.support import exports, tiny
from tests.support.judges import why_not

SITES = ("attn_in", "mlp_in", "o_in")
ATTENTION = {"attn_q", "attn_k", "attn_v", "attn_output"}
DENSE = {"ffn_gate", "ffn_up", "ffn_down"}
EXPERTS = {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
SHARED = {"ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}
LATENT = {"attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_output"}
NAMES = {
    # family: names in a layer of experts, names in a dense layer; from llama.cpp's src/llama-arch.cpp
    "Mixtral": (ATTENTION | EXPERTS, None),
    "Olmoe": (ATTENTION | EXPERTS, None),
    "Qwen2Moe": (ATTENTION | EXPERTS | SHARED | {"ffn_gate_inp_shexp"}, None),
    "Qwen3Moe": (ATTENTION | EXPERTS, None),
    "Glm4Moe": (ATTENTION | EXPERTS | SHARED, ATTENTION | DENSE),
    "DeepseekV3": (LATENT | EXPERTS | SHARED, LATENT | DENSE),
    "GptOss": (ATTENTION | EXPERTS, None),
    "Phimoe": (ATTENTION | EXPERTS, None),
    "Llama4": (ATTENTION | EXPERTS | SHARED, ATTENTION | DENSE),
    "GraniteMoe": (ATTENTION | EXPERTS, None),
}


@pytest.mark.parametrize("family", list(NAMES))
def test_every_weight_has_llama_cpps_name(tmp_path, workspace, text, family):
    study = exports.named(workspace, tmp_path, text, family)
    names = gguf_names(study, study.readers)
    with_experts, dense = NAMES[family]
    for layer in range(3):
        own = [name for reader in study.readers if reader.layer == layer for name in names[reader.name]]
        moe = layer in study.prepared.model.anatomy.moe_layers
        wanted = with_experts if moe else dense
        assert sorted(own) == sorted(f"blk.{layer}.{name}.weight" for name in wanted)
        experts = [names[reader.name] for reader in study.readers if reader.layer == layer and reader.kind == "experts"]
        order = tuple(f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
        assert experts == ([order] if moe else [])


def made_up(study, *, shared=(), seed=0, empty=((1, 2),)):
    """Totals of a study's own shapes with numbers that mean nothing. empty: (row, expert) that no token reached."""
    model, numbers = study.prepared.model, np.random.default_rng(seed)
    shapes = ExpertShapes(model.anatomy.moe_layers, 4, 2, 24, shared, 32)
    sums = ExpertSums.zero(shapes)
    layers, sequences = len(shapes.layers), study.prepared.corpus.num_sequences
    per_sequence = numbers.integers(1, 9, (sequences, layers, shapes.all_experts))
    for row, expert in empty:
        per_sequence[:, row, expert] = 0
    sums.rows = per_sequence.sum(0)
    there = (sums.rows > 0)[..., None]
    sums.sequences = np.arange(sequences)
    for name in ("total", "squares", "shared_total", "shared_squares"):
        values = numbers.random(getattr(sums, name).shape)
        setattr(sums, name, np.where(there[:, : shapes.experts], values, 0) if "shared" not in name else values)
    inputs = np.where(there[:, : shapes.experts], numbers.random((layers, shapes.experts, shapes.hidden)), 0)
    values = {
        "study_id": study.prepared.study_id,
        "shapes": shapes,
        "sequences": np.arange(sequences),
        "per_sequence": per_sequence,
        "sums": sums,
        "input_squares": inputs,
    }
    return ExpertTotals(**{field.name: values.get(field.name) for field in fields(ExpertTotals)})


@pytest.fixture(scope="module")
def world(tmp_path_factory, text):
    """family -> its study with made-up totals of experts; 3 sequences of 20 tokens."""
    workspace = open_workspace(tmp_path_factory.mktemp("experts") / "w")
    found = {}
    for family, shared in (("Qwen3Moe", ()), ("DeepseekV3", (24,))):
        folder = tiny.make_model(tmp_path_factory.mktemp(family) / "model", family)
        study = exports.opened(workspace, exports.counted(workspace, folder, text, sites=SITES))
        found[family] = replace(study, experts=made_up(study, shared=shared))
    return found


def wanted_rows(study, name):
    """(counts, squares) of a weight, from its name."""
    totals, (_, number, part, _) = study.experts, name.split(".")
    row = totals.shapes.layers.index(int(number)) if int(number) in totals.shapes.layers else None
    squares = {
        "ffn_gate_exps": totals.input_squares,
        "ffn_up_exps": totals.input_squares,
        "ffn_down_exps": totals.sums.squares,
        "ffn_down_shexp": totals.sums.shared_squares,
    }
    if part not in squares:
        site = "attn_in" if part.startswith("attn_") else "mlp_in"
        columns = study.columns("o_in" if part == "attn_output" else site, int(number))
        return [60], columns.squares[None]
    of = slice(4, None) if part == "ffn_down_shexp" else slice(0, 4)
    counts = [
        sum(int(totals.per_sequence[s, row, e]) for s in range(3)) for e in range(*of.indices(4 + totals.shapes.shared))
    ]
    return counts, squares[part][row]


@pytest.mark.parametrize("family", ["Qwen3Moe", "DeepseekV3"])
def test_the_file_has_a_row_for_each_expert(world, tmp_path, family):
    study = world[family]
    made = make_export(study, ExportRequest("imatrix", sums=True))
    _, tensors = read_gguf(made.content, tmp_path)
    weights = {name.removesuffix(".counts") for name in tensors if name.endswith(".counts")}
    missing = {"attn_q_b", "attn_kv_b"}  # between two projections, where no site is
    expected = set()
    for layer in range(3):
        names = NAMES[family][0 if layer in study.experts.shapes.layers else 1]
        # a dense layer of a mixture has no down_in
        own = names - missing - (set() if layer in study.experts.shapes.layers else {"ffn_down"})
        expected |= {f"blk.{layer}.{name}.weight" for name in own}
    assert weights == expected
    for name in weights:
        counts, squares = wanted_rows(study, name)
        assert tensors[f"{name}.counts"].shape == (len(counts), 1)
        assert tensors[f"{name}.counts"][:, 0].tolist() == counts, name
        assert tensors[f"{name}.in_sum2"].tobytes() == squares.astype(np.float32).tobytes(), name
        assert (f"{name}.in_sum" in tensors) == (".ffn_gate_exps" not in name and ".ffn_up_exps" not in name)
    down = tensors[f"blk.{study.experts.shapes.layers[1]}.ffn_down_exps.weight.in_sum"]
    assert down.tobytes() == study.experts.sums.total[1].astype(np.float32).tobytes()
    assert tensors[f"blk.{study.experts.shapes.layers[1]}.ffn_down_exps.weight.counts"][2, 0] == 0


def test_the_older_form_takes_an_expert_without_tokens_as_llama_imatrix_does(world, tmp_path):
    """save_imatrix_legacy: mean squares of 1 times the number of chunks, which is that of the expert with most tokens."""
    study = world["Qwen3Moe"]
    entries, chunks, _ = read_dat(make_export(study, ExportRequest("imatrix-dat")).content)
    assert chunks == 3
    for name, (calls, values) in entries.items():
        counts, squares = wanted_rows(study, name)
        assert calls == max(1, -(-max(counts) // 20)) and values.size == squares.size
        for expert, count in enumerate(counts):
            own = values.reshape(squares.shape)[expert]
            if count == 0:
                assert own.tolist() == [float(calls)] * own.size
            else:
                np.testing.assert_allclose(own, squares[expert] / count * calls, rtol=1e-6)


def test_what_to_know_is_said(world):
    lines = make_export(world["DeepseekV3"], ExportRequest("imatrix", sums=True)).lines
    assert lines == [
        "1 of 8 experts got no token: their count is 0, and llama-quantize takes all of their columns as equally important",
        "7 of 8 experts got fewer than 50 tokens; more sequences reach them",
        "without sums of x: ffn_gate_exps and ffn_up_exps, for a study keeps the squares of the experts' input",
        "without rows, because no site is their input: q_b_proj, kv_b_proj, down_proj of layers 0-2",
    ]
    many = Rows(np.array([1 << 25]), np.zeros((1, 4)), None)
    assert (
        "counts above 16,777,216 are rounded"
        in expert_notes(world["Qwen3Moe"], {"blk.0.ffn_up_exps.weight": many}, sums=False)[-1]
    )


class Loops:
    """Sums over the tokens of each expert, a token and an expert at a time, in float64; hooks of this class."""

    def __init__(self, folder, study, workspace):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.counts, self.sums = {}, {}
        for name, module in self.model.named_modules():
            layer = next((part for part in name.split(".") if part.isdigit()), None)
            if name.endswith(".experts"):
                module.register_forward_pre_hook(lambda m, args, at=layer: self.routed(m, args, at))
            if name.endswith("shared_expert.down_proj"):
                module.register_forward_pre_hook(
                    lambda _m, args, at=layer: self.add(f"blk.{at}.ffn_down_shexp.weight", 0, args[0].flatten(0, -2))
                )
        with torch.inference_mode():
            for row in load_corpus(study.corpus, workspace).token_ids:
                self.model(input_ids=torch.from_numpy(row.astype(np.int64))[None])

    def add(self, name, expert, x):
        rows = x.double().numpy().reshape(-1, x.shape[-1])
        self.counts[name, expert] = self.counts.get((name, expert), 0) + len(rows)
        self.sums[name, expert] = self.sums.get((name, expert), 0) + (rows**2).sum(0)

    def routed(self, module, args, layer):
        if len(args) == 1:  # Llama 4: a copy of the tokens for each expert, times their scores
            copies = args[0].reshape(4, -1, args[0].shape[-1])
            pairs = [(x, expert) for expert in range(4) for x in copies[expert] if x.any()]
        else:
            pairs = [(x, expert) for x, row in zip(args[0], args[1].tolist(), strict=True) for expert in row]
        for x, expert in pairs:
            weight = module.gate_up_proj[expert]
            gate, up = (x @ weight if len(args) == 1 else weight @ x).chunk(2)
            self.add(f"blk.{layer}.ffn_gate_exps.weight", expert, x)
            self.add(f"blk.{layer}.ffn_up_exps.weight", expert, x)
            self.add(f"blk.{layer}.ffn_down_exps.weight", expert, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("family", ["Qwen2Moe", "Llama4"])
def test_a_captured_study_gives_what_each_expert_received(tmp_path, workspace, text, family):
    """From the capture to the file, against loops: counts to the token, squares as two runs of one model agree."""
    folder = tiny.make_model(tmp_path / "model", family)
    prepared = exports.counted(workspace, folder, text, sites=SITES)
    _, tensors = read_gguf(make_export(exports.opened(workspace, prepared), ExportRequest("imatrix")).content, tmp_path)
    loops = Loops(folder, prepared, workspace)
    names = {name for name, _ in loops.counts}
    assert names == {
        n.removesuffix(".counts") for n in tensors if n.endswith(".counts") and ("exps" in n or "down_sh" in n)
    }
    for name in names:
        counts, squares = tensors[f"{name}.counts"][:, 0], tensors[f"{name}.in_sum2"]
        assert counts.tolist() == [loops.counts.get((name, expert), 0) for expert in range(len(counts))], name
        for expert, own in enumerate(squares):
            wanted = loops.sums.get((name, expert), np.zeros(own.size))
            np.testing.assert_allclose(own, wanted, rtol=5e-5, atol=1e-9, err_msg=f"{name} {expert}")


def without(study, **changes):
    return replace(study, experts=replace(study.experts, **changes))


def test_what_is_missing_is_refused_with_the_option_that_captures_it(world):
    study = world["Qwen3Moe"]
    again = "run it again with --sites attn_in,mlp_in,o_in --experts all"
    fewer = replace(study.experts.shapes, layers=(0, 2))
    unlike = replace(study.experts.sums, rows=study.experts.sums.rows + 1)
    strange = replace(study.experts.sums, nonfinite=study.experts.sums.nonfinite + 1)
    endless = np.full_like(study.experts.input_squares, np.inf)
    cases = [
        (replace(study, experts=None), BadInput, f"this study has none: the layers with experts are 0-2; {again}"),
        (without(study, sums=None), BadInput, f"which tokens reach which experts alone: {again}"),
        (without(study, input_squares=None), BadInput, f"the experts' input, mlp_in, was not captured: {again}"),
        (without(study, shapes=fewer), BadInput, "captured no experts in layers 1: run it again with --layers all"),
        (without(study, sequences=np.arange(2)), CorruptCapture, "are of 2 of 3 sequences"),
        (without(study, sums=unlike), CorruptCapture, "of other tokens"),
        (without(study, sums=strange), BadInput, "are not finite, the first in layer 0, expert 0: .* --dtype float32"),
        (without(study, input_squares=endless), BadInput, "values of their input are not finite"),
    ]
    for wrong, kind, said in cases:
        for to in ("imatrix", "imatrix-dat"):
            with pytest.raises(kind, match=said):
                make_export(wrong, ExportRequest(to))


def test_a_site_that_is_missing_is_refused_without_naming_down_in(tmp_path, workspace, text):
    folder = tiny.make_model(tmp_path / "model", "Qwen3Moe")
    study = exports.opened(workspace, exports.counted(workspace, folder, text, sites=("mlp_in",)))
    study = replace(study, experts=made_up(study))
    with pytest.raises(BadInput, match=r"site attn_in and o_in: run it again with --sites attn_in,mlp_in,o_in$"):
        make_export(study, ExportRequest("imatrix"))


FOLDER = Path(os.environ.get("OUTLIERS_TEST_EXPORTS", ""))


@pytest.mark.skipif(
    "OUTLIERS_TEST_EXPORTS" not in os.environ or why_not(FOLDER, "llama.cpp") is not None,
    reason="llama.cpp's programs judge: make test-exports",
)
def test_llama_imatrix_reads_it_and_writes_the_same(world, tmp_path):
    """llama-imatrix reads ours and writes it anew: the same rows, and the older form byte for byte but for its ends."""
    program = next((FOLDER / "llama.cpp").glob("llama-imatrix-*"))
    study = world["Qwen3Moe"]
    made = make_export(study, ExportRequest("imatrix"))
    (tmp_path / "ours.gguf").write_bytes(made.content)
    shown = subprocess.run(
        [program, "-m", "none", "--in-file", tmp_path / "ours.gguf", "--show-statistics"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = shown.stdout + shown.stderr
    assert shown.returncode == 0 and "ffn_down_exps" in said, said[-2000:]
    _, ours = read_gguf(made.content, tmp_path)
    for form, to in (("gguf", "imatrix"), ("dat", "imatrix-dat")):
        out = tmp_path / f"theirs.{form}"
        argv = [
            program,
            "-m",
            "none",
            "--in-file",
            tmp_path / "ours.gguf",
            "-o",
            out,
            "--output-format",
            form,
            "-c",
            "20",
        ]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        assert out.exists(), done.stderr[-2000:]
        if form == "gguf":
            _, theirs = read_gguf(out.read_bytes(), tmp_path)
            assert {name: theirs[name].tobytes() for name in ours} == {name: ours[name].tobytes() for name in ours}
        else:
            entries, _, _ = read_dat(out.read_bytes())
            own, _, _ = read_dat(make_export(study, ExportRequest(to)).content)
            assert {n: (c, v.tobytes()) for n, (c, v) in entries.items()} == {
                n: (c, v.tobytes()) for n, (c, v) in own.items()
            }
