"""What measuring formats and probing add to a plan: each grows with what is asked, and is not there where nothing is."""

from __future__ import annotations

import pytest

from outliers.hardware import GB, Facts
from outliers.machines.base import Offer
from outliers.planning.estimate import estimate
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.prepare import model_info
from outliers.study.probes import count_passes
from tests.support import tiny


@pytest.fixture
def steps(tmp_path, workspace):
    folder = tiny.make_model(tmp_path)

    def of(**parts):
        spec = StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", 4, 32) | parts)
        demand = demand_of(spec, model_info(spec, workspace, weights=False))
        offer = Offer("sky", "m", Facts(4, 64 * GB, 60 * GB, 200 * GB, (), "3.11"), 1.0)
        return {step.name: step for step in estimate(demand, offer, (), demand.layout.total_bytes, 0)}

    return of


def test_a_plan_without_formats_or_probe_has_no_such_steps(steps):
    assert not {"formats", "probe"} & steps().keys()


def test_formats_cost_by_their_number_and_tokens(steps):
    one = steps(formats=["nvfp4"])["formats"]
    three = steps(formats=["nvfp4", "int8_token", "fp8_token"])["formats"]
    assert "128 tokens" in one.assumption and "at most 4 times" in one.assumption
    assert "at most 12 times" in three.assumption
    less = steps(formats={"formats": ["nvfp4"], "format_tokens": 64})["formats"]
    assert "64 tokens" in less.assumption


def test_a_probe_costs_its_passes(steps):
    check, zero = steps(probe="check")["probe"], steps(probe={"zero": ["3"]})["probe"]
    assert "at most 39 passes over 128 tokens" in check.assumption
    assert "at most 7 passes over 128 tokens" in zero.assumption


@pytest.mark.parametrize(
    ("probe", "passes"),
    [
        ({"zero": ("3",)}, 7),
        ({"zero": ("random=9",)}, 15),
        ({"zero": ("systematic",)}, 15),
        ({"quantize": ("int8_token", "nvfp4"), "hold": ("3",)}, 10),
        ({"map": "int8_token"}, 6 + 30 * 2 / 2),
        ({"weight": ("auto",)}, 15),
    ],
)
def test_passes_are_counted_from_above(probe, passes):
    assert count_passes(StudySpec.model_validate({"model": "m", "probe": probe}), 30) == passes
