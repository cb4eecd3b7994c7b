"""Where the whole model does not fit, a plan takes it a layer at a time, and says what each way needs."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from flows.cli.console import show_plan
from outliers.errors import PlanRefused
from outliers.hardware import GB, Facts, Gpu
from outliers.machines.base import Offer
from outliers.planning.download import SHARD_BYTES, held_bytes
from outliers.planning.offers import check_plan, request_again, request_for
from outliers.planning.plan import make_plan
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.prepare import model_info
from outliers.study.schedule import by_layers
from tests.support import tiny


class Catalog:
    """A provider that only offers."""

    def __init__(self, *offers):
        self._offers = offers

    def offers(self, request):
        return self._offers, ()


def machine(free, *gpus):
    return Catalog(Offer("local", "here", Facts(8, 64 * GB, free, 200 * GB, gpus, "3.11"), 0.0))


@pytest.fixture
def planned(tmp_path, workspace):
    """(spec, ModelInfo) of a tiny model with the compute that is given; its layers are 100 GB each by the description."""
    folder = tiny.make_model(tmp_path)

    def of(layer=100 * GB, **compute):
        spec = StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", 3, 32) | {"compute": compute})
        info = model_info(spec, workspace)
        weights = info.weights.model_copy(update={"layer_bytes": (layer,) * 3, "checkpoint_bytes": 3 * layer})
        return spec, info.model_copy(update={"weights": weights, "weight_bytes": weights.memory_bytes})

    return of


def shown(plan):
    console = Console(file=io.StringIO(), width=300, highlight=False)
    show_plan(console, plan)
    return console.file.getvalue()


def test_auto_plans_by_layers_where_the_whole_does_not_fit(planned):
    spec, info = planned()
    plan = make_plan(spec, info, machine(250 * GB))
    assert (plan.schedule, plan.refusals, len(plan.offers)) == ("layers", (), 1)
    # whole: three layers, and one more while it is converted; by layers: one, and what its conversion takes
    assert "the study needs 401.02 GB of memory without a GPU, 250.00 GB is free" in plan.schedule_reason
    assert re.search(r"a layer at a time: 201(\.0+2?)? GB of memory instead of 401(\.0+2?)? GB", plan.schedule_reason)
    assert "read once, at least 10 min at 500 MB/s" in plan.schedule_reason
    assert plan.seconds["pass"] == 600
    assert "schedule" in shown(plan)
    assert check_plan(demand_of(spec, info), machine(250 * GB), 1).among == ("here",)


def test_auto_plans_the_whole_where_it_fits(planned):
    spec, info = planned()
    plan = make_plan(spec, info, machine(402 * GB))
    assert (plan.schedule, plan.schedule_reason, plan.spool_bytes) == ("whole", None, 0)
    assert "schedule" not in shown(plan)


@pytest.mark.parametrize("compute", [{"schedule": "whole"}, {"provider": "sky"}])
def test_the_whole_that_was_asked_for_is_refused_as_ever(planned, compute):
    """Of machines that are rented one that holds the whole model is taken."""
    spec, info = planned(**compute)
    demand = demand_of(spec, info)
    assert by_layers(demand) is None
    assert make_plan(spec, info, machine(250 * GB)).offers == ()
    with pytest.raises(PlanRefused, match=r"401\.02 GB of memory without a GPU, 250\.00 GB is free"):
        check_plan(demand, machine(250 * GB), 1)


def test_what_does_not_fit_by_layers_either_is_refused_for_the_whole(planned):
    spec, info = planned()
    assert make_plan(spec, info, machine(200 * GB)).offers == ()
    with pytest.raises(PlanRefused, match=r"401\.02 GB"):
        check_plan(demand_of(spec, info), machine(200 * GB), 1)


def test_one_gpu_holds_the_layers_of_a_model_that_two_do_not_hold(planned):
    spec, info = planned(layer=30 * GB)
    cards = (Gpu("A100", 80 * GB), Gpu("A100", 40 * GB))
    plan = make_plan(spec, info, machine(60 * GB, *cards))
    assert plan.schedule == "layers"
    assert plan.offers[0]["placement"] == "one GPU is used (GPU 0)"
    assert "of one GPU instead of" in plan.schedule_reason


def test_a_machine_that_the_study_has_may_hold_a_layer_alone(planned):
    spec, info = planned(gpu_count=0)
    demand = demand_of(spec, info)
    assert request_for(demand, 0).needed_ram_bytes > 400 * GB > request_again(demand).needed_ram_bytes
    fixed, _ = planned(schedule="whole", gpu_count=0)
    assert request_again(demand_of(fixed, info)).needed_ram_bytes > 400 * GB


def test_a_few_files_of_the_weights_are_on_the_disk(planned):
    kept, info = planned(102 * GB, schedule="layers")
    thrown, _ = planned(schedule="layers", no_keep_weights=True)
    assert held_bytes(demand_of(kept, info), 300 * GB) == 300 * GB
    # a layer of 102 GB lies in 20 files and a part of another two; with embedding and head
    assert held_bytes(demand_of(thrown, info), 300 * GB) == (2 + 20 + 2) * SHARD_BYTES
    assert held_bytes(demand_of(thrown, info), 7 * GB) == 7 * GB
