"""Studies side by side: like with like, and in what they differ."""

from __future__ import annotations

import io

import pytest

from flows.cli.answers import Answers
from flows.cli.runs import show_comparison
from outliers.atlas.compare import compare
from outliers.errors import BadInput, PublishRefused
from outliers.publish.shelf import read_store, read_study
from tests.support.atlas_store import FINEWEB, MODELS, dozen, edited, own, place_of, quick_store, store, study

__all__ = ["own", "store"]  # fixtures, found by name


def of(store, *numbers):
    urls = {item.manifest["study_id"]: item.url for item in read_store(store, summaries=False).studies}
    return [urls[f"{number:016x}"] for number in numbers]


def compared(store, *numbers):
    return compare([read_study(url) for url in of(store, *numbers)])


def test_like_is_compared_with_like(store):
    found = compared(store, 2, 10)
    assert found.criteria == ("reading",)
    assert found.conditions == ()
    assert not found.alike
    assert found.differs == {"reading": ["pooled", "union"]}
    assert found.unlike() == "reading (pooled, union)"
    assert found.features is None  # the lists were made by different rules
    assert found.counts is not None
    assert found.counts.magnitude == 6.0
    assert found.counts.counts["block"]["union"] == [4, 7]


def test_other_magnitudes_are_compared_at_a_common_one(store):
    found = compared(store, 11, 2)
    assert found.criteria == ("magnitude",)
    assert found.counts is not None
    assert found.counts.magnitude == 3.0  # the first study's, which the other's ladder has
    wanted = [next(s for s in dozen() if s["study_id"] == f"{n:016x}")["sweep"] for n in (11, 2)]
    for reading in ("pooled", "union", "per_layer", "affected"):
        counts = [line["counts"]["block"][reading][line["magnitudes"].index(3.0)] for line in wanted]
        assert found.counts.counts["block"][reading] == counts


@pytest.mark.parametrize("share", ["layer_fraction", "position_fraction"])
def test_other_shares_leave_nothing_to_compare(tmp_path, share):
    quick_store(tmp_path, [study(1, MODELS[0]), study(2, MODELS[0], **{share: 0.5})])
    found = compared(f"file://{tmp_path}", 1, 2)
    assert found.criteria == (f"min_{share}",)
    assert found.counts is None
    assert found.features is None


def test_other_tokens_and_layers_of_one_model_are_not_alike(tmp_path):
    """Another model's tokenizer gives other ids for the same text: that is not a difference of the corpora."""
    one, two, three = study(1, MODELS[0]), study(2, MODELS[0]), study(3, MODELS[1])
    two["corpus"]["token_sha256"] = three["corpus"]["token_sha256"] = "e" * 64
    two["layers"] = [row for row in two["layers"] if row["layer"] < 5]
    quick_store(tmp_path, [one, two, three])
    assert compared(f"file://{tmp_path}", 1, 2).conditions == ("layers", "token_sha256")
    assert compared(f"file://{tmp_path}", 1, 3).alike


def of_layers(number, first, stop, model=MODELS[0]):
    made = study(number, model)
    made["layers"] = [row for row in made["layers"] if first <= row["layer"] < stop]
    return made


@pytest.mark.parametrize(("first", "stop", "said"), [(5, 10, "5-9 of 28"), (0, 4, "0-3 of 28"), (0, 28, None)])
def test_other_layers_of_one_model_are_not_alike(tmp_path, first, stop, said):
    """As many layers are not the same layers."""
    quick_store(tmp_path, [of_layers(1, 0, 5), of_layers(2, first, stop), of_layers(3, 0, 5)])
    found = compared(f"file://{tmp_path}", 1, 2)
    assert found.conditions == ("layers",)
    assert found.differs["layers"] == ["0-4 of 28", said]
    assert compared(f"file://{tmp_path}", 1, 3).alike


def test_part_of_the_layers_of_models_of_two_depths_is_not_alike(tmp_path):
    quick_store(tmp_path, [of_layers(1, 0, 5), of_layers(2, 0, 5, MODELS[2]), of_layers(3, 0, 36, MODELS[2])])
    assert compared(f"file://{tmp_path}", 1, 2).conditions == ("layers",)
    assert compared(f"file://{tmp_path}", 1, 3).conditions == ("layers",)


BY_HAND = "mlp_in=layers.*.mlp:input"


@pytest.mark.parametrize(
    ("site", "named", "alike"),
    [("block", [BY_HAND], False), ("mlp_in", [BY_HAND], False), ("attn_in", [BY_HAND], True), ("block", [], True)],
)
def test_a_site_named_by_hand_counts_where_the_answer_is_of_it(tmp_path, site, named, alike):
    one, two = study(1, MODELS[0], site=site), study(2, MODELS[0], site=site)
    two["capture_id"] = "f" * 16
    quick_store(tmp_path, [one, two])
    edited(tmp_path, 2, spec={"capture": {"site_modules": named}})
    found = compared(f"file://{tmp_path}", 1, 2)
    assert found.conditions == (() if alike else ("site_modules",))
    assert found.alike == alike


def test_names_by_hand_that_lead_to_the_same_capture_are_no_difference(tmp_path):
    quick_store(tmp_path, [study(1, MODELS[0]), study(2, MODELS[0], reading="union")])
    edited(tmp_path, 2, spec={"capture": {"site_modules": [BY_HAND]}})
    found = compared(f"file://{tmp_path}", 1, 2)
    assert found.conditions == ()
    assert found.differs["site_modules"] == [None, BY_HAND]


def test_what_else_was_captured_is_a_fact_and_no_condition(tmp_path):
    two = study(2, MODELS[0])
    two["criteria"]["sites"] = ["attn_in", "mlp_in", "resid"]
    quick_store(tmp_path, [study(1, MODELS[0]), two])
    found = compared(f"file://{tmp_path}", 1, 2)
    assert found.alike
    assert found.differs["sites"] == [("attn_in", "mlp_in"), ("attn_in", "mlp_in", "resid")]


def test_other_corpora_and_dtypes_are_said(store):
    found = compared(store, 5, 6)
    assert found.criteria == ()
    assert found.conditions == ("corpus", "num_sequences", "sequence_length", "dtype")
    assert found.same["model"] == "Qwen/Qwen3-30B-A3B"
    assert found.features is not None
    assert list(found.features) == [7, 10, 13, 16, 19]
    assert [row is None for row in found.features[16]] == [True, False]
    both = {5: 3, 6: 5}
    for position, number in enumerate(both):
        summary = next(s for s in dozen() if s["study_id"] == f"{number:016x}")
        for item in summary["systematic"]:
            row = found.features[item["feature"]][position]
            assert row is not None
            assert row["layer_fraction"] == item["layer_fraction"]


def test_alike(tmp_path):
    quick_store(tmp_path, [study(1, MODELS[0]), study(2, MODELS[1]), study(3, MODELS[3])])
    found = compared(f"file://{tmp_path}", 1, 2, 3)
    assert found.alike
    assert found.differs["model"] == [MODELS[0][0], MODELS[1][0], MODELS[3][0]]
    assert found.features is None  # dimensions of different models have nothing in common


@pytest.mark.parametrize("numbers", [(1,), (1, 1)])
def test_nothing_to_compare(store, numbers):
    with pytest.raises(BadInput, match=r"two or more|given twice"):
        compared(store, *numbers)


def test_a_damaged_study_is_not_compared(own):
    next(place_of(own, 2).glob("*/summary.json")).write_text("{")
    with pytest.raises((BadInput, PublishRefused), match="another sha256"):
        compared(f"file://{own}", 1, 2)


@pytest.mark.parametrize(("size", "said"), [((16, 2048), False), ((32, 1024), False), ((8, 2048), True)])
def test_other_numbers_of_tokens_are_said_to_compare_by_per_layer_alone(tmp_path, size, said):
    quick_store(tmp_path, [study(1, MODELS[0]), study(2, MODELS[0], corpus=(FINEWEB, *size))])
    shown = io.StringIO()
    show_comparison(Answers(file=shown), compared(f"file://{tmp_path}", 1, 2))
    assert ("so that these only grow with it; per_layer compares" in shown.getvalue()) == said
