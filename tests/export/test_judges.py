"""The real programs load what is exported of a real model, and agree with its numbers: `make test-exports`.

Each has an environment of its own (tests/support/judges.py). What is not there is skipped with the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest

from outliers.corpus.tokens import load_corpus
from outliers.export.formats import ExportRequest, make_export
from outliers.export.source import SITES, open_study
from outliers.model.gguf import gguf_folder
from outliers.model.pretrained import load_tokenizer
from outliers.spec import StudySpec
from outliers.steps import run_analyze, run_extract
from outliers.study.prepare import prepare
from tests.support import judge_programs, llama_cpp
from tests.support.judges import python_of, why_not
from tests.support.synthetic import Silent

FOLDER = Path(os.environ.get("OUTLIERS_TEST_EXPORTS", ""))
pytestmark = pytest.mark.skipif(
    "OUTLIERS_TEST_EXPORTS" not in os.environ, reason="programs of other projects judge: make test-exports"
)
LARGE = 500.0
"""Two inputs of SmolLM2 are larger: of layers 11 and 28, at down_proj."""
ABOVE = ["model.layers.11.mlp.down_proj", "model.layers.28.mlp.down_proj"]
COLUMN = 5e-5
"""Largest relative difference of one column's sum of squares: 2.1e-5 was seen with llama.cpp built for AVX2."""


@pytest.fixture(scope="module")
def real(smollm2_workspace, tmp_path_factory):
    """(folder for `judge_programs`, study, llama-imatrix' text): SmolLM2 in float32, 4 sequences of 128 tokens."""
    spec = {
        "model": {"id": "builtin:smollm2", "dtype": "float32"},
        "corpus": {"source": "builtin:python-docs", "num_sequences": 4, "sequence_length": 128},
        "capture": {"sites": SITES},
    }
    prepared = prepare(StudySpec.model_validate(spec), smollm2_workspace)
    run_extract(prepared, smollm2_workspace, Silent())
    run_analyze(prepared, smollm2_workspace, Silent())
    study = open_study(smollm2_workspace, prepared.study_id, prepared.capture_id)
    folder = tmp_path_factory.mktemp("judged")
    ids = load_corpus(prepared.corpus, smollm2_workspace).token_ids
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    (folder / "model").symlink_to(gguf_folder(prepared.model.source, smollm2_workspace))
    tokenizer = load_tokenizer(prepared.model.source, smollm2_workspace)
    text = tokenizer.decode(ids.reshape(-1).tolist(), clean_up_tokenization_spaces=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids.reshape(-1).tolist()
    (folder / "text.txt").write_text(text)
    return folder, study


def test_the_numbers_of_smollm2(real):
    """Sums of squares that an independent forward pass gave for these ids (sha256 1ef7582d...)."""
    _, study = real
    assert study.prepared.corpus.token_sha256.startswith("1ef7582d")
    for site, layer, wanted in (
        ("attn_in", 0, 729.692071),
        ("o_in", 14, 18331.37498),
        ("mlp_in", 14, 5933.197918),
        ("down_in", 11, 38332630.04),
    ):
        assert study.columns(site, layer).squares.sum() == pytest.approx(wanted, rel=1e-6)
    columns = study.columns("down_in", 11)
    assert columns.squares.argmax() == 1229
    assert columns.squares[1229] == pytest.approx(34251016.93, rel=1e-6)
    assert columns.peak == pytest.approx(2993.85962, rel=1e-6)


def judged(name, real, *exports):
    """What a program says of exported files: pairs of a format and its options."""
    if (why := why_not(FOLDER, name)) is not None:
        pytest.skip(why)
    folder, study = real
    for request in exports:
        made = make_export(study, request)
        ending = ".yaml" if request.to == "llm-compressor" else ".json"
        for end, data in {ending: made.content, **made.beside}.items():
            (folder / f"{request.to}{end}").write_bytes(data)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [python_of(FOLDER, name), judge_programs.__file__, name, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_bitsandbytes(real):
    found = judged("bitsandbytes", real, ExportRequest("bitsandbytes", skip_above=LARGE))
    assert found == {"plain": ["lm_head", *ABOVE], "thresholds": [6.0], "finite": True}


def test_llm_compressor(real):
    found = judged("llmcompressor", real, ExportRequest("llm-compressor", skip_above=LARGE))
    assert found["modifiers"] == ["SmoothQuantModifier", "QuantizationModifier"] and found["refuses"]
    # our ranges and its own calibration give the same weights, bit for bit
    assert (found["norms"], found["changed"], found["equal"]) == (60, 210, found["weights"])


def test_modelopt(real):
    found = judged("modelopt", real, ExportRequest("modelopt", skip_above=LARGE))
    assert found == {"quantizers": 208, "same_names": True, "worst": 0.0, "logits": 0.0}


def test_torchao(real):
    found = judged("torchao", real, ExportRequest("torchao", skip_above=LARGE))
    assert found == {"plain": ["lm_head", *ABOVE], "finite": True}


def test_gptqmodel(real):
    found = judged("gptqmodel", real, ExportRequest("gptqmodel", skip_above=LARGE))
    assert found == {"bits": 4, "plain": ["lm_head", *ABOVE]}


def test_autoround(real):
    found = judged("autoround", real, ExportRequest("autoround", skip_above=LARGE))
    names = ["lm_head", *ABOVE]
    assert found == {"bits": 4, "read": {name: {"bits": 16} for name in names}, "tuner": names}


@pytest.fixture(scope="module")
def llama_tools(real):
    """A function that runs one of llama.cpp's programs, and SmolLM2 with float32 weights for it."""
    if (why := why_not(FOLDER, "llama.cpp")) is not None:
        pytest.skip(why)
    folder, study = real

    def run(name, *arguments):
        command = [FOLDER.absolute() / "llama.cpp" / f"{name}-{llama_cpp.BUILD}", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    run("llama-quantize", "--allow-requantize", study.prepared.model.source.path, "f32.gguf", "F32")
    for to, name in (("imatrix", "ours.gguf"), ("imatrix-dat", "ours.dat")):
        (folder / name).write_bytes(make_export(study, ExportRequest(to, sums=to == "imatrix")).content)
    return folder, study, run


def read(path):
    return {tensor.name: np.array(tensor.data).ravel() for tensor in gguf.GGUFReader(path).tensors}


def test_llama_imatrix_counts_the_same(llama_tools):
    folder, _, run = llama_tools
    options = ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "-c", "128", "-b", "128", "-ub", "128", "--parse-special"]
    run("llama-imatrix", "-m", "f32.gguf", "-f", "text.txt", "-o", "theirs.gguf", *options)
    ours, theirs = read(folder / "ours.gguf"), read(folder / "theirs.gguf")
    names = {name for name in theirs if name.endswith((".in_sum2", ".counts", ".in_sum"))}
    assert names == set(ours) and len(names) == 3 * 210
    for name in names:
        if name.endswith(".counts"):
            assert ours[name].tolist() == theirs[name].tolist() == [512.0]
        elif name.endswith(".in_sum2"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=COLUMN)
        else:  # a sum of signs that cancel, against the largest that it could be
            assert (np.abs(ours[name] - theirs[name]) <= COLUMN * np.sqrt(512 * theirs[f"{name}2"])).all()


def test_llama_imatrix_shows_ours(llama_tools):
    _, _, run = llama_tools
    said = run("llama-imatrix", "-m", "f32.gguf", "--in-file", "ours.gguf", "--show-statistics")
    assert "ffn_down" in said and "attn_q" in said


def test_llama_quantize_makes_the_same_of_both_forms(llama_tools):
    folder, _, run = llama_tools
    for name, matrix in (("a", "ours.gguf"), ("b", "ours.dat"), ("c", None)):
        run("llama-quantize", *(("--imatrix", matrix) if matrix else ()), "f32.gguf", f"{name}.gguf", "IQ4_NL")
    a, b, c = (read(folder / f"{name}.gguf") for name in "abc")
    assert all(a[name].tobytes() == b[name].tobytes() for name in a) and len(a) == len(b)
    assert sum(a[name].tobytes() != c[name].tobytes() for name in a) >= 200  # and it was used


def test_llama_quantize_takes_the_types(llama_tools):
    folder, study, run = llama_tools
    (folder / "types.txt").write_bytes(make_export(study, ExportRequest("llama-quantize", skip_above=LARGE)).content)
    run("llama-quantize", "--tensor-type-file", "types.txt", "f32.gguf", "typed.gguf", "Q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "typed.gguf").tensors}
    down = {name: kind for name, kind in kinds.items() if "ffn_down" in name}
    assert {name for name, kind in down.items() if kind == "Q8_0"} == {f"blk.{n}.ffn_down.weight" for n in (11, 28)}
    assert set(down.values()) == {"Q4_0", "Q8_0"}
