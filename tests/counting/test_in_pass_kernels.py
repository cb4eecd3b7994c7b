"""The Triton kernels under Triton's interpreter, on the processor: bit for bit what a stored capture counts.

`make test-kernels` runs this with Triton installed. The interpreter runs the same source as a GPU, one program after the other:
it shows the arithmetic and the masks, not what is compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="no Triton here: make test-kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is chosen before it is imported: make test-kernels", allow_module_level=True)

from outliers.counting.in_pass import triton_ops
from outliers.counting.in_pass.device import DeviceCounter
from tests.counting.test_counting import same_bits
from tests.counting.test_in_pass import same_counts
from tests.counting.test_properties import captures, check_summary, count
from tests.support.in_pass import feed, frame_and_shape


@settings(max_examples=25, deadline=None)
@given(captures(), st.integers(1, 3), st.sampled_from([200, 4096, 1 << 23]))
def test_the_kernels_count_what_a_stored_capture_counts(capture, batch, chunk_bytes):
    dtype, acts, exact, lengths = capture
    with tempfile.TemporaryDirectory() as place:
        stored, stored_counts = count(Path(place), dtype, acts, lengths, chunk_bytes, 1)
    frame, shape = frame_and_shape(stored.frame, batch, chunk_bytes)
    summary, counts = feed(DeviceCounter, frame, shape, acts, lengths, operations=triton_ops)
    check_summary(summary, counts, exact, lengths, dtype)
    stored.fine, stored.fine_windows = summary.fine, summary.fine_windows
    same_bits(stored, summary)
    for one, other in zip(counts, stored_counts, strict=True):
        same_counts(one, other)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from outliers.counting.in_pass import triton_kernels as kernels

def built(kernel, types, constants, capability, **options):
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]

for capability in (80, 90):
    for kind, value, key, mask, infinity in ((0, "*i16", "*i32", 0x7FFF, 0x7F80), (2, "*i32", "*i64", 2**31 - 1, 0x7F800000)):
        constants = {"KIND": kind, "MASK": mask, "INFINITY": infinity}
        pointers = ["*i64"] * 6 + ["*i32"] * 5 + ["*i64"] * 4 + ["*i32"] * 2 + [key] * 2
        types = [value, value, "*i32", "*i32", *pointers, *["i32"] * 7, *["constexpr"] * 6]
        tile = built(kernels.count_tile, types, constants | {"PAIR": True, "STEPS": 8, "DECIDING": 2}, capability, num_warps=4)
        assert ".local" not in tile, "the registers of a tile do not fit"
        types = [value, "*i32", "*fp64", *["i32"] * 6, *["constexpr"] * 4]
        options = {"num_warps": 1, "enable_fp_fusion": False}
        sums = built(kernels.add_moments, types, constants | {"WIDE": 32}, capability, **options)
        assert "fma.rn.f64" not in sums, "a product is fused with a sum: other last bits than the processor's"
        assert "add" in sums and "f64" in sums
"""


def test_the_kernels_compile_for_gpus_without_one():
    """For sm_80 and sm_90: no registers are spilled, and no float64 product is fused with a sum."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
