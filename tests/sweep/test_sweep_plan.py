"""What a sweep would take: times and prices that add up, and what is too much for all together."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from outliers.machines.local import LocalProvider
from outliers.machines.providers import provider
from outliers.study.demand import demand_of
from outliers.study.prepare import layout_of, model_info
from outliers.sweep.plan import plan_sweep
from outliers.sweep.sweep import make_sweep
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).parents[1] / "support" / "configs"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("sweep") / "model", "Llama", dtype="bfloat16")


def tiny_sweep(model, workspace, **more):
    content = {
        "defaults": {
            "corpus": {"source": "builtin:python-docs", "sequence_length": 32},
            "compute": {"workspace": str(workspace.root), "gpu_count": 0},
        },
        "study": [{"model": model}],
    }
    return make_sweep(content | more, "tiny")


def test_a_plan_adds_up_and_one_that_fails_stands_there_with_its_error(model, workspace):
    sweep = tiny_sweep(
        model,
        workspace,
        parallel=2,
        matrix={"num_sequences": [3, 5], "magnitude": [6, 8]},
        study=[
            {"model": model},
            {"name": "gone", "model": "./gone"},
            {"name": "vast", "model": model, "label": "vast", "compute": {"min_cpu_ram": 99_000}},
        ],
    )
    plan = plan_sweep(sweep)
    alone = {}
    for study in sweep.studies:
        if study.name.startswith("model"):
            info = model_info(study.spec, workspace, weights=False)
            alone[study.name] = layout_of(study.spec, info).total_bytes
    # of two magnitudes of one capture the second has nothing to write
    captures = [study.plan.capture_bytes_left for study in plan.studies[:4]]
    assert captures == [alone["model-3-6"], 0, alone["model-5-6"], 0]
    assert plan.capture_bytes == sum(captures)
    fits = plan.studies[:4]
    assert plan.seconds == pytest.approx(sum(study.seconds for study in fits), abs=0.1)
    assert plan.seconds / 2 <= plan.wall_seconds < plan.seconds
    assert (plan.price, plan.unpriced, plan.refusals, plan.download_bytes) == (0, (), (), 0)
    refused = {study.name: study.refused for study in plan.studies[4:]}
    assert all("there is no model at ./gone" in text for name, text in refused.items() if name.startswith("gone"))
    assert all("99000.0 GB of memory asked" in text for name, text in refused.items() if name.startswith("vast"))
    assert len(refused) == 8
    assert not (workspace.root / "captures").exists()
    assert not (workspace.root / "corpora").exists()


class Dear(LocalProvider):
    """This machine, at 36 dollars an hour."""

    def offers(self, request):
        offers, excluded = super().offers(request)
        return tuple(replace(offer, provider="dear", price_per_hour=36.0) for offer in offers), excluded


def test_the_price_of_a_sweep_is_the_sum_of_its_studies(model, workspace):
    sweep = tiny_sweep(
        model,
        workspace,
        matrix={"num_sequences": [3, 5]},
        study=[{"model": model, "compute": {"provider": "dear"}}, {"name": "free", "model": model, "label": "free"}],
    )
    plan = plan_sweep(sweep, lambda name, root: Dear(root) if name == "dear" else provider(name, root))
    dear, free = plan.studies[:2], plan.studies[2:]
    # 36 dollars an hour is a cent a second
    assert [study.price for study in dear] == pytest.approx([study.seconds / 100 for study in dear], rel=1e-3)
    assert [study.price for study in free] == [0, 0]
    assert plan.price == pytest.approx(sum(study.price for study in dear))
    assert plan.price > 0


class Small(LocalProvider):
    """This computer, with given bytes of disk and memory free."""

    def __init__(self, workspace, disk=None, ram=None):
        super().__init__(workspace)
        self._free = {"disk_free_bytes": disk, "ram_available_bytes": ram}

    def offers(self, request):
        offers, excluded = super().offers(request)
        free = {name: value for name, value in self._free.items() if value is not None}
        return tuple(replace(offer, facts=replace(offer.facts, **free)) for offer in offers), excluded


@pytest.mark.studies
def test_what_is_too_much_for_all_together_is_refused(model, workspace):
    """Captures stay on the disk; of the memory only as many studies count as run at once, the largest."""
    sweep = tiny_sweep(model, workspace, parallel=2, matrix={"num_sequences": [3, 4, 5]})
    plain = plan_sweep(sweep)
    assert plain.refusals == ()
    rams = sorted(study.plan.ram_bytes for study in plain.studies)

    def refusals(**free):
        plan = plan_sweep(sweep, lambda name, root: Small(root, **free))
        assert all(study.refused is None for study in plan.studies), "each alone fits"
        return plan.refusals

    assert refusals(disk=plain.capture_bytes, ram=sum(rams[1:])) == ()
    (said,) = refusals(disk=plain.capture_bytes - 1)
    needed, free = re.match(
        r"the captures need (\S+) GB of disk here in all, (\S+) GB is free: fewer seq", said
    ).groups()
    assert float(needed) > float(free)
    (said,) = refusals(ram=sum(rams[1:]) - 1)
    assert said.startswith("2 studies at once may need ")
    assert said.endswith("is free: a smaller --parallel")


def test_a_study_that_is_spread_counts_as_all_of_its_processes(model, workspace):
    """Two studies at once of two processes each are four; more parts than batches is refused in the study's words."""
    sweep = tiny_sweep(
        model,
        workspace,
        parallel=2,
        study=[
            {"name": "four", "model": model, "corpus": {"num_sequences": 4}, "compute": {"shards": 2}},
            {"name": "six", "model": model, "corpus": {"num_sequences": 6}, "compute": {"shards": 2}},
            {"name": "torn", "model": model, "corpus": {"num_sequences": 2}, "compute": {"shards": 5}},
        ],
    )
    plan = plan_sweep(sweep)
    four, six, torn = sorted(plan.studies, key=lambda study: study.name)
    assert (four.refused, six.refused) == (None, None)
    assert torn.refused == "--shards 5 is more than the 2 batches of 1 sequence there are to share: at most 2"
    one = demand_of(sweep.studies[0].spec, model_info(sweep.studies[0].spec, workspace, weights=False)).ram_bytes
    assert [study.plan.ram_bytes for study in (four, six)] == [2 * one, 2 * one]

    def refused(ram):
        plan = plan_sweep(sweep, lambda name, root: Small(root, ram=ram))
        return plan.refusals, {study.name: study.refused for study in plan.studies}

    assert refused(4 * one)[0] == ()
    assert refused(4 * one - 1)[0][0].startswith("2 studies at once may need ")
    together, each = refused(2 * one - 1)
    assert together == ()
    assert each["four"].startswith("local: 2 processes need ") and each["four"].endswith("ask for fewer --shards")
