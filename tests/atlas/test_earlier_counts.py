"""The numbers of others on the atlas: LLM.int8()'s table, and the earlier pipeline's counts beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from outliers.atlas.page import earlier_rows, render
from outliers.atlas.reference import EARLIER, PAPER, earlier
from outliers.atlas.table import read_atlas
from outliers.sweep.sweep import read_sweep
from tests.support.atlas_store import FINEWEB, MODELS, dozen, edited, quick_store, store, study
from tests.support.html_page import Page

__all__ = ["store"]  # fixtures, found by name

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"


def test_the_earlier_pipeline_stands_beside_our_legacy(store):
    page = Page(render(read_atlas(store)))
    rows = [row for row in page.rows if len(row) == 9]
    assert {row[0] for row in rows[1:]} == {model.model for model in EARLIER}
    ours = [row for row in rows if row[0] == "Qwen3-30B-A3B"]
    assert [row[2] for row in ours] == ["110", "110"]
    pairs = [s["readings"]["block"]["legacy"]["feature_sequence_pairs"] for s in dozen() if "30B" in s["model"]["id"]]
    assert [row[5] for row in ours] == [f"{pairs[0]}3 features", f"{pairs[1]}5 features"]
    assert "not alike" not in ours[0][8]
    assert "not known" not in ours[0][8]
    assert ours[1][8].endswith("not alike: another corpus, another sizenot known of the earlier run: float16")
    (alone,) = [row for row in rows if row[0] == "GLM-4.5-Air"]
    assert alone[8] == "not in this atlas"
    # magnitude 3 counts other things: of Qwen3-4B's three studies the two under the pipeline's criteria are compared with it
    assert len([row for row in rows if row[0] == "Qwen3-4B"]) == 2


@pytest.mark.parametrize("name", ["moe", "qwen3-dense"])
def test_every_model_of_a_ready_made_sweep_stands_beside_the_earlier_count(name):
    found = [earlier(study.spec.model.id) for study in read_sweep(SWEEPS / f"{name}.toml").studies]
    assert None not in found
    assert len(set(found)) == len(found)
    assert earlier("Qwen/Qwen3-0.6B-Base") is None


def earlier_of(tmp_path, **changes):
    """The row that compares one study with the earlier pipeline; None where the page does not compare it."""
    quick_store(tmp_path, [study(1, MODELS[0], **changes)])
    rows = earlier_rows(read_atlas(f"file://{tmp_path}").rows)
    assert [row["known"] for row in rows] == list(EARLIER)
    (found,) = [row["studies"] for row in rows if row["known"].model == "Qwen3-0.6B"]
    return found[0] if found else None


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({}, True),
        ({"reading": "union"}, True),  # legacy is the same whatever decides
        ({"dtype": "float32"}, False),
        ({"corpus": (FINEWEB, 8, 2048)}, False),
        ({"corpus": (FINEWEB, 16, 1024)}, False),
        ({"corpus": ("allenai/c4", 16, 2048)}, False),
        ({"magnitude": 8.0}, None),
        ({"layer_fraction": 0.5}, None),
        ({"position_fraction": 0.1}, None),
    ],
)
def test_only_what_was_counted_as_the_earlier_pipeline_did_stands_beside_it(tmp_path, changes, alike):
    found = earlier_of(tmp_path, **changes)
    assert (None if found is None else not found["unlike"] and not found["unsure"]) == alike


@pytest.mark.parametrize(
    ("change", "unlike", "unsure"),
    [
        (lambda made, spec: made["layers"].__delitem__(slice(5, 28)), "", ""),  # every layer at the other site
        (lambda made, spec: made.update(layers=made["layers"][:5]), "layers 0-4 of 28", ""),
        (lambda made, spec: spec["corpus"].update(subset="CC-MAIN-2013-20"), "", "subset CC-MAIN-2013-20"),
        (lambda made, spec: spec["corpus"].update(seed=9, packing="documents"), "", "seed 9, packing documents"),
        (lambda made, spec: spec["capture"].update(site_modules=["mlp_in=h.*.x"]), "modules named by hand", ""),
        (lambda made, spec: spec["capture"].update(site_modules=["resid=h.*"]), "", ""),
        (lambda made, spec: made["model"].update(dtype="float16"), "", "float16"),
        (lambda made, spec: made["model"].update(quantization="mxfp4"), "", "mxfp4"),
    ],
)
def test_what_is_not_as_the_earlier_pipeline_was_is_named(tmp_path, change, unlike, unsure):
    made, spec = study(1, MODELS[0]), {"corpus": {"source": FINEWEB}, "capture": {}}
    change(made, spec)
    quick_store(tmp_path, [made])
    edited(tmp_path, 1, spec=spec)
    atlas = read_atlas(f"file://{tmp_path}")
    (found,) = [row["studies"] for row in earlier_rows(atlas.rows) if row["studies"]]
    assert (found[0]["unlike"], found[0]["unsure"]) == (unlike, unsure)
    text = Page(render(atlas)).text
    assert ("not alike: " in text) == bool(unlike)
    assert ("not known of the earlier run: " in text) == bool(unsure)


def test_a_study_of_one_site_is_not_set_beside_the_earlier_one(tmp_path):
    """Its legacy has every hook as a layer: with half of the hooks it is another number."""
    summary = study(1, MODELS[0])
    summary["criteria"]["sites"] = ["attn_in"]
    quick_store(tmp_path, [summary])
    rows = earlier_rows(read_atlas(f"file://{tmp_path}").rows)
    assert not [row for row in rows if row["studies"]]


# copied from LLM.int8()'s Table 4 and the earlier pipeline's page, a second time and by hand
TABLE_4 = """
GPT2-117M 33.5 1/1 25% 6%
GPT2-345M 26.0 2/1 29% 18%
FSEQ-125M 25.7 2/2 25% 22%
GPT2-762M 22.6 2/0 31% 16%
GPT2-1.5B 21.0 2/1 41% 35%
FSEQ-1.3B 15.9 4/3 64% 47%
FSEQ-2.7B 14.4 5/5 52% 18%
GPT-J-6B 13.8 6/6 62% 28%
FSEQ-6.7B 13.3 6/6 100% 75%
FSEQ-13B 12.5 7/6 100% 73%
"""
PIPELINE = """
OLMoE-1B-7B-0125 7/1.3 49 29.5 13.6
gpt-oss-20b 21/3.6 1465 38.1 45.4
Qwen3-30B-A3B 30.5/3.3 110 35.5 45.1
Mixtral-8x7B-v0.1 47/12.9 4635 50.2 37.4
Qwen3-Next-80B-A3B 80/3 504 57.5 35.1
GLM-4.5-Air 106/12 459 63.3 45.7
gpt-oss-120b 117/5.1 1695 33.1 50.0
Qwen3-0.6B 0.6/0.6 9212 32.7 66.5
Qwen3-1.7B 1.7/1.7 16563 30.3 78.4
Qwen3-4B 4/4 1042 34.8 68.8
Qwen3-8B 8/8 777 32.3 70.8
Qwen3-14B 14/14 985 31.4 79.0
"""


def test_the_published_numbers_are_those_that_were_published():
    told = [
        f"{m.model} {m.perplexity} {m.num_features}/{m.one_sided} {m.layer_fraction:.0%} {m.position_fraction:.0%}"
        for m in PAPER
    ]
    assert told == TABLE_4.strip().splitlines()
    scale = {"M": 1_000_000, "B": 1_000_000_000}
    for m in PAPER:
        size = m.model.rpartition("-")[2]
        assert m.parameters == round(float(size[:-1]) * scale[size[-1]]), m.model
    told = [
        f"{m.model} {m.total_billions:g}/{m.active_billions:g} {m.pairs} "
        f"{100 * m.layer_fraction:.1f} {100 * m.position_fraction:.1f}"
        for m in EARLIER
    ]
    assert told == PIPELINE.strip().splitlines()


def test_a_model_of_another_name_says_so(tmp_path):
    quick_store(tmp_path, [study(1, ("Qwen/Qwen3-Next-80B-A3B-Instruct", 80.0, 3.0, 512, 48, 2048))])
    rows = [row for row in Page(render(read_atlas(f"file://{tmp_path}"))).rows if row[0] == "Qwen3-Next-80B-A3B"]
    (row,) = rows
    assert row[2] == "504"
    assert row[8].startswith("Qwen/Qwen3-Next-80B-A3B-Instruct: HuggingFaceFW/fineweb-edu, 16 × 2,048 tokens")
