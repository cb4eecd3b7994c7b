"""What a study takes: computed once for a plan, and once for each offer."""

from __future__ import annotations

import numpy as np
import pytest

import outliers.study.demand as demands
from outliers.errors import BadInput
from outliers.experts.sums import ExpertSums
from outliers.experts.totals import OUTPUT, OUTPUTS_KEPT, ExpertTotals
from outliers.hardware import GB, Facts, Gpu
from outliers.machines.base import Offer
from outliers.planning.plan import make_plan
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.expert_shapes import SLOT_BYTES
from outliers.study.prepare import layout_of, model_info
from tests.support import tiny


class Catalog:
    """A provider that only offers."""

    def __init__(self, *offers):
        self._offers = offers

    def offers(self, request):
        return self._offers, ()


def rented(name, gpus):
    return Offer("sky", name, Facts(8, 64 * GB, 60 * GB, 200 * GB, (Gpu("A100", 40 * GB),) * gpus, "3.11"), 1.0)


@pytest.fixture
def described(tmp_path, workspace):
    """(spec, ModelInfo) of a tiny model and four sequences, with the compute that is given."""
    folder = tiny.make_model(tmp_path)

    def of(**compute):
        made = tiny.spec_for(folder, "builtin:python-docs", 4, 32)
        spec = StudySpec.model_validate(made | {"compute": compute})
        return spec, model_info(spec, workspace, weights=False)

    return of


@pytest.mark.parametrize("shards", [1, 3])
def test_a_plan_places_the_model_once_on_each_offer_and_lays_out_once(described, monkeypatch, shards):
    """Also where a budget and the steps ask for the placement again; of several shards the longest is laid out, once."""
    placed, laid_out = [], []

    def fit(parts, gpu_bytes, work_bytes, most):
        placed.append(len(gpu_bytes))
        return place(parts, gpu_bytes, work_bytes, most)

    def layout(spec, info):
        laid_out.append(spec.corpus.num_sequences)
        return layout_of(spec, info)

    place = demands.fit
    monkeypatch.setattr(demands, "fit", fit)
    monkeypatch.setattr(demands, "layout_of", layout)
    spec, info = described(provider="sky", shards=shards, max_total_price=100)
    plan = make_plan(spec, info, Catalog(rented("one", 1), rented("none", 0), rented("two", 2)))
    assert [offer["placement"] for offer in plan.offers] == ["one GPU is used (GPU 0)", None, "one GPU is used (GPU 0)"]
    assert placed == [1, 2]
    assert laid_out == ([4] if shards == 1 else [4, 2])


@pytest.mark.parametrize(
    ("compute", "gpus_each"),
    [
        ({}, None),
        ({"gpu_count": 2}, 2),
        ({"shards": 2}, 1),
        ({"shards": 2, "gpu_count": 4}, 1),
        ({"shards": 2, "gpu_count": 0}, 0),
        ({"shards": 2, "gpu_count": 4, "provider": "ssh"}, 4),
    ],
)
def test_processes_of_one_study_on_this_computer_have_a_gpu_each(described, compute, gpus_each):
    demand = demand_of(*described(**compute))
    assert demand.gpus_each == gpus_each
    assert demand.shares_machine == (compute.get("shards", 1) > 1 and "provider" not in compute)
    assert demand.uses_gpus((Gpu("A100", 1),)) == (gpus_each != 0)
    assert not demand.uses_gpus(())


def test_the_filter_leaves_other_gpus_out_and_a_gpu_of_unknown_size_is_large_enough(described):
    demand = demand_of(*described(gpu_filter="a100"))
    found = (Gpu("NVIDIA H100", 80 * GB), Gpu("NVIDIA A100", 0), Gpu("NVIDIA A100", 40 * GB))
    assert demand.place(found[:2], None).gpus == (1,)
    assert demand.place(found, None).gpus == (2,), "the largest of those whose size is known"
    assert demand.place_evenly().devices == (0,) * len(demand.parts)


def test_more_shards_than_batches_are_refused_where_the_longest_is_asked_for(described):
    """A machine that reads one shard is asked for nothing of the kind."""
    demand = demand_of(*described(shards=5))
    assert demand.layout.num_sequences == 4
    with pytest.raises(BadInput, match="--shards 5 is more than the 4 batches"):
        demand.shard_layout  # noqa: B018 - raises


def test_a_probe_takes_what_it_takes_beside_the_capture(tmp_path, workspace):
    """The larger of both counts, and a probe in float32 of a bfloat16 model has its weights twice as wide."""
    folder = tiny.make_model(tmp_path, dtype="bfloat16")

    def demand(**probe):
        made = tiny.spec_for(folder, "builtin:python-docs", 4, 32)
        spec = StudySpec.model_validate(made | {"probe": probe})
        return demand_of(spec, model_info(spec, workspace, weights=False))

    plain, probed, wide = demand(), demand(zero=["3"]), demand(zero=["3"], probe_dtype="float32")
    assert plain.ram_bytes < probed.ram_bytes < wide.ram_bytes
    assert wide.parts == tuple(2 * part for part in plain.parts) and probed.parts == plain.parts
    assert wide.vram_bytes - wide.work_bytes == 2 * (plain.vram_bytes - plain.work_bytes)


def test_counting_the_experts_is_in_the_memory_of_the_plan_and_bounds_what_counting_holds(workspace, tmp_path):
    """Against the bytes of every array that counting has at once: the totals, the sums twice, and the inputs."""
    folder = tiny.make_model(tmp_path / "moe", "DeepseekV3")
    spec = StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", 4, 32))
    info = model_info(spec, workspace, weights=False)
    demand, shapes = demand_of(spec, info), layout_of(spec, info).experts
    totals = ExpertTotals.zero("s", shapes)
    totals.per_sequence = np.zeros((4, len(shapes.layers), shapes.all_experts), np.int32)
    totals.outputs = np.zeros(OUTPUTS_KEPT * len(shapes.layers), OUTPUT)
    sums, inputs = ExpertSums.zero(shapes), np.zeros((len(shapes.layers), shapes.experts, shapes.hidden))

    def held(*owners):
        return sum(x.nbytes for owner in owners for x in vars(owner).values() if isinstance(x, np.ndarray))

    least = held(totals, sums, sums) + inputs.nbytes + 32 * shapes.token_bytes
    small = 32 * len(shapes.layers) * shapes.all_slots * SLOT_BYTES
    counters = 2 * sum(x.nbytes for x in (sums.rows, sums.nonfinite, sums.nonfinite_outputs, sums.hits))
    assert least - counters <= demand.counting_bytes <= least + small
    assert demand.counting_bytes <= demand.host_ram_bytes and demand.counting_bytes < demand.ram_bytes
    plan = make_plan(spec, info, Catalog())
    assert plan.counting_bytes == demand.counting_bytes
    off = StudySpec.model_validate(spec.model_dump(mode="json") | {"capture": {"experts": "off"}})
    assert demand_of(off, info).counting_bytes == 0


@pytest.mark.parametrize(
    ("family", "dtype", "implementation", "batch", "probe", "products"),
    [
        ("Qwen3Moe", "bfloat16", "auto", 2, {}, 2 * 64),
        ("Qwen3Moe", "float16", "eager", 2, {}, 2 * 64),
        ("Qwen3Moe", "bfloat16", "auto", 2, {"zero": ["3"]}, 2 * 64),
        ("Qwen3Moe", "bfloat16", "auto", 40, {}, 1024),
        ("Qwen3Moe", "bfloat16", "batched_mm", 2, {}, 0),
        ("Qwen3Moe", "float32", "auto", 2, {}, 0),
        ("Llama", "bfloat16", "auto", 2, {}, 0),
    ],
)
def test_what_torch_keeps_for_products_of_experts_is_in_the_memory_of_a_machine_without_gpus(
    tmp_path, workspace, monkeypatch, family, dtype, implementation, batch, probe, products
):
    """Two for each number of rows of a batch, up to as many as torch keeps; a GPU's machine doesn't compute them."""
    folder = tiny.make_model(tmp_path / family, family, dtype=dtype)
    made = tiny.spec_for(folder, "builtin:python-docs", 40, 32, capture={"batch_sequences": batch})
    spec = StudySpec.model_validate(made | {"probe": probe})
    info = model_info(spec, workspace, weights=False)
    if implementation != "auto":
        info = info.model_copy(update={"experts_implementation": implementation})
    with_them = demand_of(spec, info)
    monkeypatch.setattr(demands, "PRODUCT_BYTES", 0)
    without = demand_of(spec, info)
    assert with_them.ram_bytes - without.ram_bytes == products * 850_000
    assert with_them.host_ram_bytes == without.host_ram_bytes
