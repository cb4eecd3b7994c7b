"""What an export needs and a study lacks is refused in words, with the option that captures it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from outliers.errors import BadInput, CaptureError, CorruptCapture
from outliers.export.formats import TARGETS, ExportRequest, make_export
from outliers.export.skips import find_skips
from outliers.export.source import open_study
from outliers.files.sealed import write_sealed
from tests.support import exports

NEEDING = ("imatrix", "imatrix-dat", "act-scales", "llm-compressor", "modelopt")
"""Formats that hold numbers."""


def make(study, to, **more):
    return make_export(study, ExportRequest(to, **more))


@pytest.fixture
def halved(study):
    """The same study as if it had read two of three layers."""
    prepared = study.prepared.model_copy(update={"layers": (0, 2)})
    return replace(study, prepared=prepared)


@pytest.mark.parametrize("to", NEEDING)
def test_layers_that_were_not_read(halved, to):
    with pytest.raises(
        BadInput,
        match="needs every layer, and this study captured 2 of 3; missing are 1: run it again with --layers all",
    ):
        make(halved, to)


@pytest.mark.parametrize("to", NEEDING)
def test_values_that_are_not_finite(study, to):
    summary = study.summary
    assert summary is not None
    summary.sites["mlp_in"].nonfinite[1] = 3
    with pytest.raises(
        BadInput, match="3 values at mlp_in of layer 1 are not: float32 can't hold them; run the study again"
    ):
        make(study, to)


@pytest.mark.parametrize("to", NEEDING)
def test_a_summary_that_is_on_another_machine(study, to):
    with pytest.raises(BadInput, match="not on this computer, where only its results are: --full brings them home"):
        make(replace(study, summary=None), to)


@pytest.mark.parametrize("to", [to for to, target in TARGETS.items() if target.lists and to not in NEEDING])
def test_lists_need_no_summary_unless_magnitudes_are_asked(study, to):
    away = replace(study, summary=None)
    if to != "llama-quantize":
        assert make(away, to).content
    with pytest.raises(BadInput, match="--full brings them home"):
        make(away, to, skip_above=5.0)


def test_sites_that_were_not_captured(tmp_path, workspace, llama, text):
    study = exports.opened(workspace, exports.counted(workspace, llama, text, sites=("attn_in", "mlp_in")))
    for to in ("imatrix", "modelopt"):
        with pytest.raises(
            BadInput, match="site o_in and down_in: run it again with --sites attn_in,mlp_in,o_in,down_in"
        ):
            make(study, to)
    with pytest.raises(BadInput, match="--skip-above needs the input of o_proj and the input of down_proj"):
        make(study, "bitsandbytes", skip_above=5.0)


def test_a_site_that_was_named_by_hand(study):
    prepared = study.prepared
    spec = prepared.spec.model_copy(
        update={
            "capture": prepared.spec.capture.model_copy(update={"site_modules": ("mlp_in=layers.*.input_layernorm",)})
        }
    )
    named = replace(study, prepared=prepared.model_copy(update={"spec": spec}))
    with pytest.raises(BadInput, match=r"read another module in their place \(--site-module mlp_in=layers"):
        make(named, "imatrix")


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (ExportRequest("gguf"), "--to gguf is not a format; there is: imatrix, imatrix-dat"),
        (ExportRequest("modelopt", scheme="W8A8"), "--scheme W8A8 is not a scheme of modelopt: it knows INT8, FP8"),
        (ExportRequest("bitsandbytes", scheme="NF4"), "--scheme NF4 is not a scheme of bitsandbytes: it has none"),
        (ExportRequest("imatrix", skip_above=3.0), "--skip-above has no meaning in imatrix"),
        (ExportRequest("imatrix-dat", sums=True), "--sums is for --to imatrix"),
        (ExportRequest("modelopt", smoothing=0.5), "--smoothing is for --to llm-compressor"),
        (ExportRequest("llm-compressor", smoothing=1.5), "--smoothing 1.5 is not between 0"),
        (ExportRequest("bitsandbytes", skip_above=0.0), "--skip-above 0 is not above 0"),
        (ExportRequest("bitsandbytes", skip_above=float("nan")), "--skip-above nan is not above 0"),
        (ExportRequest("bitsandbytes", skip_above=1e-9), "leaves nothing to quantize"),
        (ExportRequest("llama-quantize"), "no module to list for llama-quantize: give --skip-above X"),
        (ExportRequest("llama-quantize", skip_above=1e9), "no module to list for llama-quantize"),
    ],
)
def test_options_without_a_meaning(study, request_, why):
    with pytest.raises(BadInput, match=why):
        make_export(study, request_)


@pytest.mark.parametrize("to", NEEDING)
def test_a_study_in_bfloat16_says_so(study, to):
    model = study.prepared.model.model_copy(update={"dtype": "bfloat16"})
    rounded = replace(study, prepared=study.prepared.model_copy(update={"model": model}))
    assert any("the study computed in bfloat16" in text for text in make(rounded, to).lines)
    assert not any("float32" in text for text in make(study, to).lines)


def test_modules_whose_input_is_at_no_site_are_named(tmp_path, workspace, text):
    folder = exports.tiny.make_model(tmp_path / "model", "DeepseekV3")
    study = exports.opened(workspace, exports.counted(workspace, folder, text, sites=("attn_in", "mlp_in", "o_in")))
    told = find_skips(study, 1e6).lines()
    assert told[-1] == "not judged: the second projections of the experts of layers 1-2"
    assert told[-2] == (
        "not judged, because no captured site is their input: model.layers.{0-2}.self_attn.q_b_proj, "
        "model.layers.{0-2}.self_attn.kv_b_proj, model.layers.0.mlp.down_proj, model.layers.{1-2}.mlp.shared_experts.down_proj"
    )
    lines = make(study, "modelopt").lines
    assert lines[1] == "without a range, and to be calibrated: q_b_proj, kv_b_proj, down_proj, experts"


@pytest.fixture
def copied(whole, workspace):
    """A workspace with a copy of the study's summary alone."""
    own, _, prepared = whole
    place = workspace.summary(prepared.capture_id, prepared.study_id)
    shutil.copytree(own.summary(prepared.capture_id, prepared.study_id), place)
    return workspace, prepared, place


def test_the_description_comes_from_what_was_sent_where_the_summary_is_elsewhere(copied):
    workspace, prepared, place = copied
    shutil.rmtree(place)
    with pytest.raises(BadInput, match="holds nothing but the results of"):
        open_study(workspace, prepared.study_id, prepared.capture_id)
    (workspace.root / "sent").mkdir()
    write_sealed(workspace.root / "sent" / f"{prepared.study_id}.json", prepared.model_dump(mode="json"))
    found = open_study(workspace, prepared.study_id, prepared.capture_id)
    assert found.summary is None and found.prepared.study_id == prepared.study_id
    assert make(found, "bitsandbytes").content


def test_a_description_of_another_study_or_with_strange_names_is_refused(copied):
    workspace, prepared, place = copied
    shutil.rmtree(place)
    (workspace.root / "sent").mkdir()
    sent = workspace.root / "sent" / f"{prepared.study_id}.json"
    write_sealed(sent, prepared.model_dump(mode="json") | {"study_id": "f" * 16})
    with pytest.raises(CorruptCapture, match="is of the study ffff"):
        open_study(workspace, prepared.study_id, prepared.capture_id)
    content = prepared.model_dump(mode="json")
    content["model"]["anatomy"]["backbone"] = "model\n- evil"
    write_sealed(sent, content)
    with pytest.raises(CorruptCapture, match="is not the name of a module"):
        open_study(workspace, prepared.study_id, prepared.capture_id)


def test_a_summary_of_a_part_is_refused(copied):
    workspace, prepared, place = copied
    corpus = prepared.corpus.model_copy(update={"num_sequences": 5})
    (place / "study.json").write_text(prepared.model_copy(update={"corpus": corpus}).model_dump_json())
    from outliers.files.sealed import seal_folder

    seal_folder(place)
    with pytest.raises(CaptureError, match="is of 3 of 5 sequences"):
        open_study(workspace, prepared.study_id, prepared.capture_id)


def test_a_damaged_summary_is_refused(copied):
    workspace, prepared, place = copied
    data = bytearray((place / "totals.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (place / "totals.npz").write_bytes(data)
    with pytest.raises(CorruptCapture, match="is not what was written there"):
        open_study(workspace, prepared.study_id, prepared.capture_id)


def test_magnitudes_are_the_larger_end(study):
    columns = study.columns("down_in", 2)
    wanted = np.where(-columns.least > columns.largest, -columns.least, columns.largest)
    assert columns.magnitude.tolist() == wanted.tolist() and columns.peak == max(wanted.tolist())
