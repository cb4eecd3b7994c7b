"""The verdict: against the budget, what repairs a format, what is left alone, and words that say no more than was measured."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outliers.advice.advise import advise, verdict_of
from outliers.errors import BadInput
from outliers.report.probe_page import make_probe_page
from outliers.results.schema import Advice
from tests.support.probed import change, probes, row


@pytest.mark.parametrize(
    ("kl", "interval", "verdict"),
    [
        (0.04, (0.03, 0.05), "within"),
        (0.04, (0.03, 0.06), "unclear"),
        (0.06, (0.04, 0.07), "unclear"),
        (0.06, (0.051, 0.07), "beyond"),
        (0.04, None, "within"),
        (0.06, None, "beyond"),
        (0.0019, (0.001, 0.9), "indistinguishable"),
        (0.002, (0.001, 0.003), "within"),
    ],
)
def test_a_format_against_a_budget(kl, interval, verdict):
    assert verdict_of(kl, interval, 0.05, floor=0.001) == verdict


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_of_nothing_is_refused(budget):
    with pytest.raises(BadInput, match="a budget is a positive KL"):
        advise(probes(change("int8_token", format="int8_token")), [], budget)


@given(st.lists(st.integers(0, 64), min_size=1, max_size=9), st.integers(1, 200))
def test_places_to_leave_alone_are_the_fewest(costs, budget):
    """No smaller set of places brings the rest within the budget: every subset is tried."""
    costs, budget = [cost / 64 for cost in costs], budget / 64  # sums are exact
    rows = [row("attn_in", layer, "nvfp4", cost) for layer, cost in enumerate(costs)]
    joint = change("nvfp4", format="nvfp4", sites=["attn_in"], layers=list(range(len(costs))))
    found = advise(probes(joint), rows, budget).formats[0].leave_alone
    fewest = next(
        size
        for size in range(len(costs) + 1)
        for out in itertools.combinations(range(len(costs)), size)
        if sum(cost for layer, cost in enumerate(costs) if layer not in out) <= budget
    )
    assert len(found) == fewest
    assert [place.predicted_kl for place in found] == sorted((place.predicted_kl for place in found), reverse=True)


def test_repairs_are_those_of_their_own_format_and_weights():
    found = advise(
        probes(
            change("nvfp4", kl=0.2, format="nvfp4"),
            change("nvfp4 held", kl=0.15, format="nvfp4", held=[247]),
            change("had64", kl=0.04, format="had64+nvfp4"),
            change("smooth", kl=0.21, format="nvfp4", smooth=0.5),
            change("with weights", kl=0.3, format="nvfp4", weights="nvfp4"),
            change("other", kl=0.02, format="int8_token"),
            change("prefix", kl=0.001, format="int8_token", prefix=[0]),
        ),
        [],
        0.05,
    )
    by_name = {(item.format, item.weights): item for item in found.formats}
    assert list(by_name) == [("int8_token", None), ("nvfp4", None), ("nvfp4", "nvfp4")]
    plain = by_name["nvfp4", None]
    assert [(repair.kind, repair.verdict, repair.helps) for repair in plain.repairs] == [
        ("rotate", "within", True),
        ("hold", "beyond", True),
        ("smooth", "beyond", None),
    ]
    assert [repair.kind for repair in by_name["int8_token", None].repairs] == ["prefix"]
    assert by_name["nvfp4", "nvfp4"].repairs == []
    assert "nvfp4 improves most with Hadamard blocks of 64: KL 0.04, enough." in found.paragraph


def test_the_words_say_what_was_measured_and_what_was_not_tried():
    found = advise(
        probes(
            change("int8_token", kl=0.036, format="int8_token"),
            change("mxfp4_even", kl=0.8, format="mxfp4_even"),
            change("fp8_token", kl=0.00015, format="fp8_token"),
            change("zero systematic", "zero", kl=2.83, group="systematic", features=[247], perplexity=249.4),
            change("mean systematic", "mean", kl=0.5, group="systematic", features=[247], perplexity=34.9),
            change("zero matched", "zero", kl=5.86, group="matched", features=[507], perplexity=6140.0),
            change("random 3", "zero", kl=0.01, group="random", features=[3], perplexity=16.1),
        ),
        [],
        0.05,
    )
    for part in (
        "hub/model in float32",
        "1,008 tokens of 16 sequences",
        "Within the budget of 0.05 nats a token: int8_token (KL 0.036 [0.032, 0.04]",
        "Not distinguishable from rounding (KL under 0.0002): fp8_token",
        "Beyond the budget: mxfp4_even",
        "Without the systematic features (247) the perplexity is 249.4 (34.9 where they are replaced by their mean).",
        "Without as many others of the largest magnitude (507) the perplexity is 6,140.",
        "Without a random feature it is 16.1.",
        "Not tried: which places cost most, holding features out, rotation,",
    ):
        assert part in found.paragraph
    for command in (
        "rotation: --quantize had64+mxfp4_even",
        "quantized weights: --weights FORMAT with --quantize",
        "which places cost most: --map int8_token",
        "the input of the MLP's second projection: a study with --sites attn_in,mlp_in,o_in,down_in",
    ):
        assert command in found.not_tried
    assert Advice.model_validate_json(found.model_dump_json()) == found


def test_a_map_with_a_hole_predicts_nothing():
    """A sum over some of the places would be too small without any sign of it."""
    rows = [row("attn_in", layer, "int8_token", 0.01, kl=0.01) for layer in (0, 1)]
    rows += [row("mlp_in", layer, "int8_token", 0.01, kl=0.01) for layer in (0, 1)]
    joint = change("int8_token", format="int8_token", kl=0.03)
    assert advise(probes(joint), rows, 0.05).formats[0].predicted_kl == pytest.approx(0.04)
    for holed in (rows[:-1], [*rows[:-1], rows[-1] | {"predicted_kl": None}]):
        found = advise(probes(joint), holed, 0.05).formats[0]
        assert (found.predicted_kl, found.leave_alone) == (None, None)


def test_a_range_without_first_tokens_is_named_as_what_it_is():
    found = advise(
        probes(
            change("int8_tensor", kl=0.9, format="int8_tensor", range="all"),
            change("int8_tensor 2", kl=1.4, format="int8_tensor", range="without_first_tokens"),
        ),
        [],
        0.05,
    )
    assert [(repair.kind, repair.helps) for repair in found.formats[0].repairs] == [("range", False)]
    assert "Nothing that was tried improves int8_tensor." in found.paragraph
    assert any(item.startswith("a prefix token") for item in found.not_tried)


def test_an_unknown_floor_is_said():
    told = "The floor is not known"
    assert told in advise(probes(change("a", format="int8_token"), floor=0.0), [], 0.05).paragraph
    assert told not in advise(probes(change("a", format="int8_token")), [], 0.05).paragraph


def test_a_map_predicts_formats_that_were_not_probed_and_says_so():
    rows = [row("attn_in", 0, "int8_token", 0.03, kl=0.03), row("attn_in", 0, "nvfp4", 0.2)]
    joint = change("int8_token", format="int8_token", kl=0.03, sites=["attn_in"], layers=[0])
    found = advise(probes(joint), rows, 0.05)
    nvfp4 = next(item for item in found.formats if item.format == "nvfp4")
    assert (nvfp4.verdict, nvfp4.confirmed_kl, nvfp4.predicted_kl) == (None, None, 0.2)
    assert "nvfp4 (KL" not in found.paragraph
    page = make_probe_page(probes(change("int8_token", format="int8_token", kl=0.03)), rows, found).decode()
    assert "not probed" in page and "sensitivity" not in page.split("</head>")[0]


def test_a_text_of_the_model_stays_text():
    made = probes(change("<script>alert(1)</script>", "zero", features=[1]), model="a<b>&c")
    page = make_probe_page(made, [], advise(made, [])).decode()
    assert "<script>" not in page and "a&lt;b&gt;&amp;c" in page
