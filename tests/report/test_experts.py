"""The experts of a mixture on the page: pictures of many and of few, both readings, coverage; sentences of the terminal."""

from __future__ import annotations

import pytest

from outliers.report.expert_plots import draw_experts
from outliers.report.experts import expert_values
from outliers.results.expert_tables import experts_table, router_table
from outliers.results.expert_words import coverage_warning, expert_lines, name_of, reach_words
from outliers.results.experts import expert_findings
from outliers.results.schema import Coverage, ExpertsBlock
from tests.support.expert_world import block_of, totals_of, world


def made(**asked):
    """(part of summary.json, rows of experts.parquet, rows of router.parquet) of a made-up mixture."""
    mixture = world(**asked)
    found = expert_findings(totals_of(mixture), 9)
    return (
        ExpertsBlock.model_validate(block_of(found)),
        experts_table(found, 6.0).to_pylist(),
        router_table(found).to_pylist(),
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"seed": 1, "experts": 40, "slots": 2, "layers": tuple(range(9)), "lengths": (6, 5)},
        {"seed": 2, "experts": 4, "slots": 2, "layers": tuple(range(12)), "lengths": (9, 9)},
        {"seed": 3, "experts": 1, "slots": 1, "layers": (5,), "lengths": (3,)},
    ],
)
def test_pictures_of_many_few_and_one(asked):
    block, experts, routers = made(**asked)
    plots = draw_experts("tiny", block, experts, routers)
    wanted = ["experts_load.png", "experts_output.png", "experts_entropy.png", "experts_givers.png"]
    if asked["experts"] == 1:
        wanted.remove("experts_entropy.png")
    assert [plot.name for plot in plots] == wanted
    assert all(plot.png.startswith(b"\x89PNG") and len(plot.png) < 150_000 for plot in plots)
    never = sum(row["tokens"] == 0 for row in experts)
    size = asked["experts"] * len(asked["layers"])
    assert plots[0].alt.endswith(f"{never} of {size} were reached by no token.")
    assert (
        f"{sum(bool(row['super_expert']) for row in experts)} super experts are marked, {never} experts are unknown"
        in (plots[1].alt)
    )
    # the same numbers give the same bytes
    assert [plot.png for plot in draw_experts("tiny", block, experts, routers)] == [plot.png for plot in plots]


def test_no_picture_without_experts_and_none_of_outputs_that_are_unknown():
    assert draw_experts("tiny", None, [], []) == ()
    mixture = world(seed=4, shared=0)
    found = expert_findings(totals_of(mixture, routing=True), 9)
    block = ExpertsBlock.model_validate(block_of(found))
    plots = draw_experts("tiny", block, experts_table(found, 6.0).to_pylist(), router_table(found).to_pylist())
    assert [plot.name for plot in plots] == ["experts_load.png", "experts_entropy.png"]
    assert expert_values(block)["readings"] == []
    assert "routing alone" in expert_lines(block)[0]


def test_both_readings_are_explained_with_their_bounds():
    block, _, _ = made(seed=5, experts=30, slots=3, layers=tuple(range(9)), lengths=(6, 5))
    values = expert_values(block)
    ours, published = values["readings"]
    assert ours["count"] == block.super_experts.count
    assert "all layers that were read" in ours["population"] and "(left out)" in ours["population"]
    assert "layers below 7" in published["population"] and "(0)" in published["population"]  # round(6.75)
    assert "rounded down" in published["bounds"] and "rounded down" not in ours["bounds"]
    assert values["coverage"][0][1] == sum(row.experts for row in block.coverage if row.at_most == 0)
    none = block.super_experts.model_copy(update={"count": 0, "experts": [], "none_because": "tie"})
    tied = block.model_copy(update={"super_experts": none})
    assert "that of several experts" in expert_values(tied)["readings"][0]["none"]
    assert "a tie at the top" in expert_lines(tied)[0]


def test_sentences():
    block, experts, _ = made(seed=6, skew=3.0, experts=30, slots=1, layers=(0, 1), lengths=(6, 5))
    never = sum(row["tokens"] == 0 and row["expert"] >= 0 for row in experts)
    assert never
    assert expert_lines(block)[1] == f"{never} of 60 experts reached by no token, 60 by at most 100"
    assert "A calibration on this corpus knows little or nothing of them" in coverage_warning(block)
    covered = [Coverage(at_most=tokens, experts=0) for tokens in (0, 10, 50, 100)]
    assert coverage_warning(block.model_copy(update={"coverage": covered})) is None
    assert reach_words(block)[0] == "to reach every expert once: unknown, for some were never reached"
    assert name_of(1, 68) == "L1E68"
    assert name_of(1, -1) == "L1S0"
    assert expert_lines(None) == []
