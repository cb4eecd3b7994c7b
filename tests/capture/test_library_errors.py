"""Memory that runs out and packages that lack, inside of torch and transformers: our errors, with a remedy, at every place.

Memory is really refused, by the operating system: to one allocation that no machine has, or to a process with a limit.
"""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from outliers.capture.library_errors import explained, memory_message
from outliers.errors import MemoryFull, PlanRefused
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]


def of_torch():
    return torch.empty(1 << 52, dtype=torch.uint8)


def of_numpy():
    return np.empty(1 << 52, dtype=np.uint8)


def of_the_system():
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def of_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of ...")


def of_cublas():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def wrapped():
    try:
        of_torch()
    except RuntimeError as error:
        raise ValueError("the layer could not be made") from error


@pytest.mark.parametrize("raises", [of_torch, of_numpy, of_the_system, of_cuda, of_cublas, wrapped])
def test_memory_that_ran_out_has_one_name(raises):
    with (
        pytest.raises(MemoryFull, match=r"^the pass has no memory left \(.{5,300}\): take less$"),
        explained("the pass", "take less", ""),
    ):
        raises()


def test_what_is_of_no_memory_stays_what_it_is():
    for error in (RuntimeError("shapes do not match"), OSError(errno.ENOSPC, "No space left"), ValueError("x")):
        with pytest.raises(type(error), match=str(error.args[-1])), explained("the pass", "", ""):
            raise error
        assert memory_message(error) is None


def test_a_package_that_is_not_there_is_named_with_what_to_do():
    with pytest.raises(PlanRefused) as refused, explained("the forward pass of X", "", "give --quantization none"):
        import no_such_kernels_package  # noqa: F401
    said = str(refused.value)
    assert (
        "the forward pass of X needs a package that can't be imported (No module named 'no_such_kernels_package')"
        in said
    )
    assert said.endswith("or give --quantization none")
    assert sys.executable in said


def test_a_gpu_that_torch_was_not_built_for():
    with (
        pytest.raises(PlanRefused, match=r"this torch was not built for the GPU .*--gpu-count 0"),
        explained("the pass", "", ""),
    ):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR])
def test_what_transformers_only_logs_of_a_conversion_is_heard(level):
    """Its loader keeps the exceptions of its conversions for a report, and raises a sentence that points there."""
    library, own = logging.getLogger("transformers"), logging.getLogger("transformers.modeling_utils")
    before = library.level
    library.setLevel(level)
    try:
        with pytest.raises(MemoryFull, match="you tried to allocate"), explained("loading X", "take less", ""):
            own.warning(
                "LOAD REPORT\nRuntimeError: DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
            )
            raise RuntimeError(
                "We encountered some issues during automatic conversion of the weights. For details look"
            )
        assert not own.handlers
        assert own.propagate
        assert own.level == logging.NOTSET
    finally:
        library.setLevel(before)


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from outliers.capture import extract, load
from outliers.__main__ import main
import transformers.models.llama.modeling_llama
torch.ones(8, 8) @ torch.ones(8, 8)
lines = Path("/proc/self/status").read_text().splitlines()
used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
sys.exit(main(["extract", sys.argv[2], "--workspace", sys.argv[3]]))
"""


@pytest.mark.parametrize(
    ("shape", "options", "room", "said"),
    [
        # embedding and head of 0.3 GB each, in one file
        pytest.param({"vocab_size": 2_500_000}, {}, 400_000_000, "loading model (", marks=pytest.mark.studies),
        # 64 sequences of 512 tokens, 16 KB of the widest tensor each: 0.5 GB and more of it
        (
            {"intermediate_size": 4096},
            {"corpus": {"num_sequences": 64, "sequence_length": 512}, "capture": {"batch_sequences": 64}},
            600_000_000,
            "the forward pass of model over 64 x 512 tokens",
        ),
    ],
)
def test_a_study_whose_process_gets_no_more_memory(tmp_path, shape, options, room, said):
    """A real limit, in a process of its own: loading, or the pass, ends as MemoryFull, and no traceback is all there is."""
    folder = tiny.make_model(tmp_path / "model", "Llama", num_attention_heads=4, num_key_value_heads=2, **shape)
    parts = {name: dict(values) for name, values in options.items()}
    corpus = parts.pop("corpus", {"num_sequences": 2, "sequence_length": 24})
    text = tmp_path / "notes.txt"
    text.write_text("A plain sentence about nothing much. " * 1000)
    spec = tiny.spec_for(folder, text, corpus["num_sequences"], corpus["sequence_length"], **parts)
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(room), str(tmp_path / "spec.json"), str(tmp_path / "ws")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert said in done.stderr, done.stderr[-3000:]
    assert "has no memory left (" in done.stderr
    assert "Traceback" not in done.stderr
