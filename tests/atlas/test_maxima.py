"""The published maxima: the numbers as they were published, ours beside them, and the sweep that counts the same models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from outliers.atlas.maxima import MAXIMA, maxima_rows, published_maximum
from outliers.atlas.page import render
from outliers.atlas.table import read_atlas
from outliers.sweep.sweep import read_sweep
from tests.support.atlas_store import FINEWEB, MODELS, quick_store, study
from tests.support.html_page import Page

SWEEP = Path(__file__).resolve().parents[2] / "sweeps" / "maximum-activations.toml"

# copied from arXiv 2605.15572 a second time and by hand: model, largest abs(x), layer
PUBLISHED = """
Qwen3-30B-A3B 1512 3 | Qwen3-1.7B 14208 25 | Qwen3-8B 17664 16 | Qwen3-32B 35328 44
Qwen2.5-1.5B 7968 5 | Qwen2.5-1.5B-Instruct 7968 5 | Qwen2.5-7B 13248 13 | Qwen2.5-7B-Instruct 13312 13
Qwen2.5-32B 30848 63 | Qwen2.5-32B-Instruct 22144 42
Qwen2.5-VL-3B-Instruct 3984 30 | Qwen2.5-VL-7B-Instruct 8256 13 | Qwen2.5-VL-32B-Instruct 22144 44
Qwen3.5-0.8B 122 None | Qwen3.5-9B 956 31 | Qwen3.5-27B 1848 63 | Qwen3.5-35B-A3B 132 39
gemma-2b 2992 11 | gemma-2-9b 1664 41 | gemma-2-27b 157696 38 | gemma-3-4b-it 245760 29 | gemma-3-27b-it 696320 46
gpt-oss-20b 145408 23
Ling-mini-base-2.0-5T 7648 14 | Ling-mini-base-2.0-10T 9024 10 | Ling-mini-base-2.0-15T 10112 19 | Ling-mini-base-2.0-20T 11776 19
"""


def with_resid(number, name, layer, value, **changes):
    """A study that read `resid`, whose largest value is in that layer."""
    model = next(model for model in MODELS if model[0] == name)
    made = study(number, model, massive=9, **changes)
    row = made["layers"][0]
    made["layers"] += [
        {**row, "site": "resid", "layer": n, "max_magnitude": value if n == layer else 3.0} for n in range(model[4])
    ]
    made["readings"]["resid"] = {**made["readings"]["attn_in"], "legacy": None}
    made["criteria"]["sites"] = ["attn_in", "mlp_in", "resid"]
    return made


def test_the_published_numbers_are_those_that_were_published():
    told = [f"{row.name} {row.value:g} {row.layer}" for row in MAXIMA]
    assert told == re.split(r"\s*[|\n]\s*", PUBLISHED.strip())
    assert len(MAXIMA) == 27
    assert {row.name: row.place for row in MAXIMA if row.place} == {
        "Qwen3-30B-A3B": "block output",
        "Qwen3.5-0.8B": "final norm",
        "gpt-oss-20b": "MLP output",
    }


def test_the_sweep_has_every_model_whose_code_is_not_in_its_repository():
    swept = {item.spec.model.id: item.spec for item in read_sweep(SWEEP).studies}
    assert swept.keys() == {row.model for row in MAXIMA if not row.model.startswith("inclusionAI/")}
    for spec in swept.values():
        assert spec.capture.sites == ("resid",)
        assert (spec.capture.store, spec.capture.experts) == ("none", "off")
        assert spec.corpus.num_sequences >= 1_000


def test_only_the_very_same_checkpoint_is_set_beside_it():
    assert published_maximum("qwen/qwen3-8b") is published_maximum("Qwen/Qwen3-8B")
    assert published_maximum("Qwen/Qwen3-8B-Base") is None
    assert published_maximum("somebody/Qwen3-8B") is None
    assert published_maximum("local:0123456789ab") is None


def test_ours_stand_beside_them_with_what_differs(tmp_path):
    """One that read `resid` at two sizes, one without it, one of another model."""
    quick_store(
        tmp_path,
        [
            with_resid(1, "Qwen/Qwen3-8B", 16, 17152.0),
            with_resid(2, "Qwen/Qwen3-8B", 17, 16000.0, corpus=(FINEWEB, 10_000, 2048)),
            study(3, MODELS[7]),
            with_resid(4, "Qwen/Qwen3-0.6B", 4, 900.0),
        ],
    )
    atlas = read_atlas(f"file://{tmp_path}")
    assert {row.study_id[-1]: (row.resid_max, row.resid_max_layer) for row in atlas.rows} == {
        "1": (17152.0, 16),
        "2": (16000.0, 17),
        "3": (None, None),
        "4": (900.0, 4),
    }
    first, *others = maxima_rows(atlas.rows)
    assert first["known"].name == "Qwen3-8B"
    assert len(first["studies"]) == 2
    assert not [item for item in others if item["studies"]]
    page = Page(render(atlas))
    rows = [row for row in page.rows if len(row) == 3 and row[0].startswith("Qwen3-8B")]
    assert [row[1:] for row in rows] == [
        ["17,664layer 16", "17,152layer 1697.1% of it"],
        ["17,664layer 16", "16,000layer 1790.6% of it"],
    ]
    assert "32,768 tokens of HuggingFaceFW/fineweb-edu, 0.19% of the published run's text, bfloat16" in rows[0][0]
    assert "20,480,000 tokens of HuggingFaceFW/fineweb-edu, 1.2 times of the published run's text" in rows[1][0]
    assert "26 of them were not read at resid here" in page.text


@pytest.mark.parametrize(("name", "said"), [("openai/gpt-oss-20b", True), ("Qwen/Qwen3-30B-A3B", False)])
def test_a_maximum_that_no_site_reads_is_named(tmp_path, name, said):
    quick_store(tmp_path, [with_resid(1, name, 5, 900.0)])
    text = Page(render(read_atlas(f"file://{tmp_path}"))).text
    assert ("the published one is of the MLP output, which no study reads" in text) == said
