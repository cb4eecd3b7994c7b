"""Which devices compute: decided by what torch finds, refused with both numbers, and the weights put where it was decided."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from outliers.capture.devices import Devices, choose_devices
from outliers.capture.load import load_model
from outliers.errors import PlanRefused
from outliers.hardware import Gpu
from outliers.spec import StudySpec
from outliers.study.demand import SLICE_BYTES, demand_of
from outliers.study.placement import total_needed
from outliers.study.prepare import model_info
from tests.support import tiny

GB = 1_000_000_000
NO_SMI = "no-such-nvidia-smi"


class Cuda:
    """What `choose_devices` asks of `torch.cuda`: names and total memory of GPUs, and what is free of each."""

    def __init__(self, *gpus, taken=None):
        self.gpus, self.taken = gpus, taken or {}

    def is_available(self):
        return bool(self.gpus)

    def device_count(self):
        return len(self.gpus)

    def get_device_properties(self, number):
        name, total = self.gpus[number]
        return SimpleNamespace(name=name, total_memory=total)

    def mem_get_info(self, number):
        total = self.gpus[number][1]
        return total - self.taken.get(number, 0), total


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # 12 layers of about 330 KB, so that there is something to cut; two tables of 1 MB
    return tiny.make_model(
        tmp_path_factory.mktemp("model"), "Llama", num_hidden_layers=12, hidden_size=64, intermediate_size=256
    )


@pytest.fixture
def spec_of(folder):
    def make(**compute):
        return StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", compute=compute))

    return make


def split_size(spec, info, share):
    """Total of a GPU that has room for `share` of the weights in addition to its working memory."""
    return total_needed(int(info.weights.memory_bytes * share) + demand_of(spec, info).work_bytes)


def test_the_processor_where_there_is_no_gpu_or_none_is_wanted(workspace, spec_of):
    spec = spec_of()
    info = model_info(spec, workspace)
    assert choose_devices(spec, info, Cuda(), NO_SMI) == Devices("cpu")
    with_gpu = Cuda(("NVIDIA H100", 80 * GB))
    assert choose_devices(spec_of(gpu_count=0), info, with_gpu, NO_SMI) == Devices("cpu")
    assert Devices("cpu").first == "cpu"
    assert Devices("cpu").map(info) == {"": "cpu"}


def test_one_gpu_is_enough_where_one_holds_the_model(workspace, spec_of):
    spec = spec_of()
    info = model_info(spec, workspace)
    found = choose_devices(spec, info, Cuda(("NVIDIA L4", 24 * GB), ("NVIDIA A100", 80 * GB)), NO_SMI)
    assert (found.kind, found.first, found.map(info)) == ("NVIDIA A100", "cuda:1", {"": 1})


def test_a_model_that_does_not_fit_one_is_cut_by_the_memory_that_was_found(workspace, spec_of):
    spec = spec_of(gpu_count=2)
    info = model_info(spec, workspace)
    half = split_size(spec, info, 0.6)
    found = choose_devices(spec, info, Cuda(("NVIDIA A100", half), ("NVIDIA A100", half)), NO_SMI)
    assert found.kind == "NVIDIA A100"  # how many alike there are moves no bit
    where = found.map(info)
    assert set(where.values()) == {0, 1}
    layers = [where[f"model.layers.{number}"] for number in range(12)]
    assert layers == sorted(layers)
    # unequal ones: the larger takes more, and the message says which layers were where
    uneven = Cuda(("NVIDIA L4", split_size(spec, info, 0.35)), ("NVIDIA A100", split_size(spec, info, 0.8)))
    mixed = choose_devices(spec, info, uneven, NO_SMI)
    held = [mixed.placement.weight_bytes(gpu) for gpu in (0, 1)]
    assert 0 < held[0] < held[1]
    assert mixed.kind.startswith("NVIDIA L4 (layers 0-")


def test_the_gpu_filter_leaves_the_others_alone(workspace, spec_of):
    spec = spec_of(gpu_filter="a100")
    info = model_info(spec, workspace)
    found = choose_devices(spec, info, Cuda(("NVIDIA H100", 80 * GB), ("NVIDIA A100", 40 * GB)), NO_SMI)
    assert found.map(info) == {"": 1}
    with pytest.raises(PlanRefused, match="no GPU may be used"):
        choose_devices(spec, info, Cuda(("NVIDIA H100", 80 * GB)), NO_SMI)


def test_gpus_that_are_too_small_are_refused_with_both_numbers(workspace, spec_of):
    spec = spec_of(gpu_count=1)
    info = model_info(spec, workspace)
    with pytest.raises(PlanRefused, match=r"needs 0\.\d+ GB on one GPU, the largest has"):
        choose_devices(spec, info, Cuda(("Toy", split_size(spec, info, 0.6))), NO_SMI)


def test_memory_that_another_process_has_is_missed_before_the_weights_are_read(workspace, spec_of):
    spec = spec_of()
    info = model_info(spec, workspace)
    busy = Cuda(("NVIDIA A100", 80 * GB), taken={0: 80 * GB - 1_000_000})
    with pytest.raises(
        PlanRefused, match=r"GPU 0 \(NVIDIA A100\) has 0\.001 of 80\.000 GB free, and the study needs 0\.003 GB there"
    ):
        choose_devices(spec, info, busy, NO_SMI)


def test_a_gpu_that_torch_can_not_use_never_idles_unnoticed(tmp_path, workspace, spec_of):
    """A rented GPU and a torch for the processor: an error, not a study at a hundredth of the speed."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU-1, NVIDIA H100, 81559'\n")
    smi.chmod(0o755)
    info = model_info(spec_of(), workspace)
    with pytest.raises(PlanRefused, match=r"this machine has NVIDIA H100, and torch .* can't use one.*--gpu-count 0"):
        choose_devices(spec_of(), info, Cuda(), str(smi))
    with pytest.raises(PlanRefused, match="this machine has no GPU that nvidia-smi knows"):
        choose_devices(spec_of(gpu_count=1), info, Cuda(), NO_SMI)
    assert choose_devices(spec_of(gpu_count=0), info, Cuda(), str(smi)) == Devices("cpu")


def test_a_model_is_loaded_by_the_map_that_was_chosen(workspace, spec_of):
    """There is no GPU here: both are the processor, and the parts of the map must be the whole model."""
    spec = spec_of()
    info = model_info(spec, workspace)
    half = split_size(spec, info, 0.6)
    where = Devices("two", demand_of(spec, info).place([Gpu("A100", half)] * 2, spec.compute.gpu_count)).map(info)
    split = load_model(info, workspace, dict.fromkeys(where, "cpu"))
    plain = load_model(info, workspace, "cpu")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(split(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_what_is_planned_has_the_heads_slices_in_it(workspace, spec_of):
    from outliers.capture import perplexity

    assert SLICE_BYTES == perplexity.SLICE_BYTES
    spec = spec_of()
    asked = spec.model_copy(update={"capture": spec.capture.model_copy(update={"perplexity": True})})
    info = model_info(spec, workspace)
    assert demand_of(asked, info).activation_bytes >= 4 * SLICE_BYTES > demand_of(spec, info).activation_bytes
