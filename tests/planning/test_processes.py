"""What a plan says of machines with several GPUs: processes side by side, idle ones, and larger batches for a mixture."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from flows.cli.console import show_plan
from outliers.hardware import GB, Facts, Gpu
from outliers.machines.base import Offer
from outliers.planning.plan import make_plan
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.prepare import model_info
from outliers.study.processes import COORDINATOR_BYTES
from tests.support import tiny

A100 = Gpu("A100", 40 * GB)


class Catalog:
    """A provider with machines of 1, 2 and 4 A100 at a dollar each an hour."""

    def __init__(self, *counts, ram=200, price=1.0):
        self._offers = [
            Offer("sky", f"a100x{n}", Facts(8, 256 * GB, ram * GB, 500 * GB, (A100,) * n, ""), price * n)
            for n in counts
        ]

    def offers(self, request):
        return tuple(one for one in self._offers if len(one.facts.gpus) >= (request.gpu_count or 0)), ()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    return {family: tiny.make_model(made / family, family) for family in ("Llama", "Qwen3Moe")}


@pytest.fixture
def planned(folders, workspace):
    def of(catalog, family="Llama", sequences=4, capture=None, **compute):
        made = tiny.spec_for(folders[family], "builtin:python-docs", sequences, 32, capture=capture or {})
        spec = StudySpec.model_validate(made | {"compute": {"provider": "sky", **compute}})
        info = model_info(spec, workspace, weights=False)
        return make_plan(spec, info, catalog), demand_of(spec, info)

    return of


def shown(plan):
    console = Console(file=io.StringIO(), width=400, highlight=False)
    show_plan(console, plan)
    return console.file.getvalue()


def test_every_gpu_of_a_machine_is_counted(planned):
    plan, demand = planned(Catalog(2), gpu_count=2)
    (offer,) = plan.offers
    assert (offer["processes"], offer["idle_gpus"]) == (2, 0)
    assert offer["needed_ram_bytes"] == 2 * demand.host_ram_bytes + COORDINATOR_BYTES
    assert "2 at once, each with 1 GPU of its own;" in shown(plan)
    assert plan.hints == ()
    alone = planned(Catalog(2), gpu_count=2, processes=1)[0].offers[0]
    assert (alone["processes"], alone["idle_gpus"], alone["needed_ram_bytes"]) == (1, 1, demand.host_ram_bytes)


IDLE = [
    # (sequences, memory, compute, used, why)
    (1, 200, {}, 1, "1 of the 2 GPUs of a100x2 would idle, for there is 1 batch to read"),
    (4, 200, {"processes": 1}, 1, "1 of the 2 GPUs of a100x2 would idle, for --processes is 1"),
    (4, 8, {}, 1, "1 of the 2 GPUs of a100x2 would idle, for main memory holds no more processes (--min-cpu-ram)"),
]


@pytest.mark.parametrize(("sequences", "ram", "compute", "used", "why"), IDLE)
def test_a_gpu_that_would_idle_is_named_with_its_reason_and_a_cheaper_machine(
    planned, sequences, ram, compute, used, why
):
    plan, _ = planned(Catalog(2, 1, ram=ram), sequences=sequences, gpu_count=2, **compute)
    (hint,) = plan.hints
    assert hint.startswith(f"{why}: --gpu-count {used} takes a100x1 for $1.00 an hour instead of $2.00, about ")
    assert hint in shown(plan)
    # where nothing cheaper is offered, or nothing is paid, only the reason is said
    assert planned(Catalog(2, ram=ram), sequences=sequences, gpu_count=2, **compute)[0].hints == (why,)
    assert planned(Catalog(2, 1, ram=ram, price=0.0), sequences=sequences, gpu_count=2, **compute)[0].hints == (why,)


def test_batches_of_four_are_recommended_for_a_mixture_with_the_reason(planned):
    plan, _ = planned(Catalog(1), "Qwen3Moe", 8, gpu_count=1)
    (hint,) = plan.hints
    assert (
        "is a mixture: batches of 4 to 8 sequences (--batch-sequences) share the starting of 4 experts a layer" in hint
    )
    assert "it is part of the study's id" in hint
    assert planned(Catalog(1), "Qwen3Moe", 8, {"batch_sequences": 4}, gpu_count=1)[0].hints == ()
    assert planned(Catalog(1), "Llama", 8, gpu_count=1)[0].hints == ()
    assert planned(Catalog(1), "Qwen3Moe", 3, gpu_count=1)[0].hints == (), "there are not so many sequences"
    assert planned(Catalog(1), "Qwen3Moe", 8, gpu_count=0)[0].hints == ()


def test_processes_on_a_processor_take_its_memory_together(planned):
    class Here:
        def offers(self, request):
            return (Offer("sky", "cpu", Facts(8, 64 * GB, 6 * GB, 500 * GB, (), ""), 1.0),), ()

    plan, demand = planned(Here(), processes=3, gpu_count=0)
    assert plan.offers[0]["needed_ram_bytes"] == 3 * demand.ram_bytes + COORDINATOR_BYTES
    assert "3 at once on its cores;" in shown(plan)
    refused, _ = planned(Here(), processes=8, sequences=8, gpu_count=0)
    assert refused.offers == ()
    assert "cpu: --processes 8 need " in refused.refusals[0]
    assert re.search(r"of memory together, 6\.0+ GB is free: ask for fewer", refused.refusals[0])
