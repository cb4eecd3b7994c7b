"""How many processes a machine runs, on which GPUs, with how much memory: against what a person would deal out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outliers.errors import PlanRefused
from outliers.hardware import GB, Gpu, cuda_names
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.placement import total_needed
from outliers.study.prepare import model_info
from outliers.study.processes import COORDINATOR_BYTES, fitting, groups, memory_of
from tests.support import tiny

A, H, NONE = "NVIDIA A100", "NVIDIA H100", ""

# (GPUs of the first process, names of all, most, GPUs of every process)
DEALT = [
    ((0,), [A], None, [(0,)]),
    ((0,), [A, A, A], None, [(0,), (1,), (2,)]),
    ((0, 1), [A, A, A, A], None, [(0, 1), (2, 3)]),
    ((0, 1), [A, A, A], None, [(0, 1)]),  # the third is too few for a process
    ((1,), [A, H, A, H], None, [(1,), (3,)]),
    ((0, 1), [A, H, A, H], None, [(0, 1)]),  # cut over two kinds: nobody else computes like that
    ((0,), [A, NONE, A], None, [(0,), (2,)]),  # one that --gpu-filter leaves out
    ((0,), [A] * 8, 3, [(0,), (1,), (2,)]),
    ((0, 1), [A] * 8, 5, [(0, 1), (2, 3)]),
    ((0,), [A] * 8, 1, [(0,)]),
]


@pytest.mark.parametrize(("first", "names", "most", "dealt"), DEALT)
def test_gpus_are_dealt_out_in_groups_of_one_kind(first, names, most, dealt):
    assert list(groups(first, names, most)) == dealt


@given(st.lists(st.sampled_from([A, H, NONE]), min_size=1, max_size=8), st.data())
def test_no_gpu_has_two_processes_and_no_further_group_would_fit(names, data):
    named = [number for number, name in enumerate(names) if name]
    if not named:
        return
    first = tuple(sorted(data.draw(st.sets(st.sampled_from(named), min_size=1, max_size=3))))
    most = data.draw(st.none() | st.integers(len(first), 8))
    found = groups(first, names, most)
    used = [gpu for group in found for gpu in group]
    assert found[0] == first
    assert len(used) == len(set(used))
    assert {len(group) for group in found} == {len(first)}
    if len({names[gpu] for gpu in first}) > 1:
        assert len(found) == 1
        return
    kind = names[first[0]]
    assert {names[gpu] for gpu in used} == {kind}
    spare = min(sum(name == kind for name in names), most or 8) - len(used)
    assert spare < len(first)


@given(st.integers(1, 8), st.integers(1, 50), st.integers(0, 500))
def test_as_many_as_memory_holds_and_always_one(wanted, each, free):
    each, free = each * GB, free * GB
    found = fitting(wanted, each, free)
    holding = [n for n in range(1, wanted + 1) if n * each + (n > 1) * COORDINATOR_BYTES <= free]
    assert found == max(holding, default=1)


@pytest.fixture
def demand(tmp_path, workspace):
    """The demand of a tiny model of 12 layers and four batches of one sequence, with the compute that is given."""
    folder = tiny.make_model(tmp_path, num_hidden_layers=12, hidden_size=64, intermediate_size=256)

    def of(**compute):
        spec = StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", 4, 32, compute=compute))
        return demand_of(spec, model_info(spec, workspace, weights=False))

    return of


def placed(demand, gpus, free=1000 * GB):
    return [one.gpus for one in demand.place_all(gpus, demand.gpus_each, free)]


def test_a_model_that_fits_one_gpu_runs_once_on_each(demand):
    two = [Gpu(A, 40 * GB)] * 2
    assert placed(demand(), two) == [(0,), (1,)]
    assert placed(demand(gpu_count=1), two) == [(0,)]
    assert placed(demand(processes=1), two) == [(0,)]
    assert placed(demand(), [Gpu(A, 40 * GB), Gpu(H, 80 * GB)]) == [(1,)], "another kind has other bits"
    assert placed(demand(gpu_filter="a100"), [Gpu(H, 80 * GB), *two]) == [(1,), (2,)]
    assert placed(demand(), [Gpu(A, 40 * GB)] * 8) == [(0,), (1,), (2,), (3,)], "there are four batches"
    assert placed(demand(shards=2), two) == [(0,)], "parts on this computer are processes already"
    assert placed(demand(shards=2, provider="ssh"), two) == [(0,), (1,)]


def test_a_model_that_is_cut_over_two_runs_once_on_each_two(demand):
    one = demand()
    half = total_needed(int(one.model.weights.memory_bytes * 0.6) + one.work_bytes)
    found = one.place_all([Gpu(A, half)] * 5, None, 1000 * GB)
    assert [placement.gpus for placement in found] == [(0, 1), (2, 3)]
    assert [placement.weight_bytes(gpu) for placement in found for gpu in placement.gpus][:2] == [
        found[1].weight_bytes(gpu) for gpu in (2, 3)
    ]


def test_a_gpu_of_the_same_name_with_less_memory_is_left_out(demand):
    one = demand()
    small = total_needed(one.model.weights.memory_bytes // 3)
    assert placed(one, [Gpu(A, 40 * GB), Gpu(A, small), Gpu(A, 41 * GB)]) == [(2,), (0,)]


def test_memory_limits_them_and_what_was_asked_for_is_refused_with_both_numbers(demand):
    two = [Gpu(A, 40 * GB)] * 2
    together = memory_of(2, demand().host_ram_bytes)
    assert together == 2 * demand().host_ram_bytes + COORDINATOR_BYTES
    assert placed(demand(), two, together) == [(0,), (1,)]
    assert placed(demand(), two, together - 1) == [(0,)]
    assert placed(demand(processes=2), two, together) == [(0,), (1,)]
    with pytest.raises(PlanRefused, match=r"--processes 2 need \d+\.\d+ GB of memory together, \d+\.\d+ GB is free"):
        placed(demand(processes=2), two, together - 1)
    with pytest.raises(
        PlanRefused, match=r"--processes 3 need 3 GPUs of one kind .* 1 each, and of the 2 here 2 will do"
    ):
        placed(demand(processes=3), two)


REFUSED = [
    ({"processes": 5}, "--processes 5 is more than the 4 batches of 1 sequence there are to share: at most 4"),
    ({"processes": 3, "shards": 2, "provider": "ssh"}, "on each of 2 machines is more than the 4 batches .* at most 2"),
    ({"processes": 2, "shards": 2}, "--shards 2 on this computer are processes already: .* or give --shards 4"),
]


@pytest.mark.parametrize(("compute", "said"), REFUSED)
def test_more_processes_than_there_is_to_read_are_refused_with_the_spec(compute, said):
    with pytest.raises(ValueError, match=said):
        StudySpec.model_validate(tiny.spec_for("m", "t", 4, 32, compute=compute))


def test_a_gpu_is_named_as_this_process_names_it(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cuda_names(3) == ("0", "1", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8932f937")
    assert cuda_names(2) == ("3", "GPU-8932f937")
