"""The staging buffer and its copies: what arrives, which slots are reused and when, and which thread waits for which.

The CUDA path runs unchanged on a device that is made of threads (`fake_cuda`): order, lifetimes and waiting are real, the
driver is not.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from outliers.capture.copies import CudaCopies, HostCopies
from outliers.capture.staging import StagingBuffer
from tests.support.fake_cuda import PATIENCE
from tests.support.ring_parts import (
    SLOT,
    Written,
    aside,
    bits,
    cuda,
    no_thread_is_left,
    run_model,
    values_of,
    wait_until,
)

__all__ = ["cuda", "no_thread_is_left"]  # fixtures, found by name
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = {
    # name: what the model holds -> what the hook is given
    "whole": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2),
    "part of a fused tensor": lambda x: x[..., 1:5],
    "every second token": lambda x: x[:, ::2],
    "one row for all": lambda x: x[:, :1].expand(-1, 6, -1),
    "two-dimensional, reshaped": lambda x: x.reshape(-1, 8).reshape(2, -1, 8),
    "one value": lambda x: x[0, 0, 0],
    "nothing": lambda x: x[:0],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", SHAPES.values(), ids=SHAPES)
def test_every_tensor_arrives_bit_for_bit(cuda, form, dtype):
    host, device = Written(), Written()
    with StagingBuffer(SLOT, 3, host) as ring, torch.inference_mode():
        for number in range(12):
            ring.submit((0, number), form(values_of(number, dtype)))
    with StagingBuffer(SLOT, 3, device, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
        run_model(cuda, ring, 12, form, dtype)
    expected = {(0, number): bits(form(values_of(number, dtype))) for number in range(12)}
    assert host.seen == expected
    assert device.seen == expected


def test_arrays_have_the_shape_and_a_dtype_that_numpy_knows():
    found = {}
    tensors = {
        "half": torch.zeros(2, 3, dtype=torch.float16),
        "brain": torch.full((1, 2, 3), 6.0, dtype=torch.bfloat16),
        "grad": torch.nn.Parameter(torch.ones(4)),
        "nothing": torch.zeros(0, 8),
    }
    with StagingBuffer(64, 2, lambda key, values: found.update({key: values.copy()})) as ring:
        for key, tensor in tensors.items():
            ring.submit(key, tensor)
    assert {key: (a.shape, a.dtype.name) for key, a in found.items()} == {
        "half": ((2, 3), "float16"),
        "brain": ((1, 2, 3), "uint16"),
        "grad": ((4,), "float32"),
        "nothing": ((0, 8), "float32"),
    }
    assert (found["brain"] == 0x40C0).all()


def test_tensors_that_differ_in_size_and_dtype_share_the_slots():
    written = Written()
    tensors = [values_of(n, DTYPES[n % 3])[: n % 4 + 1] for n in range(50)]
    with StagingBuffer(SLOT, 2, written, writers=3) as ring:
        for number, tensor in enumerate(tensors):
            ring.submit(number, tensor)
    assert written.seen == {number: bits(tensor) for number, tensor in enumerate(tensors)}


@pytest.mark.parametrize("name", ["transposed", "whole"])
def test_a_hook_waits_for_nothing_and_nothing_is_read_too_early(cuda, name):
    """Neither the model's own work nor any copy has run when the hooks are through; the tensors are forgotten by then."""
    written = Written()
    cuda.computing.clear()
    cuda.copies.clear()
    with StagingBuffer(SLOT, 8, written, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
        with aside(run_model, cuda, ring, 6, SHAPES[name]) as (model, errors):
            model.join(PATIENCE)
            assert not model.is_alive(), "a hook waited for the device"
        assert not errors
        wait_until(lambda: len(cuda.waits) == ring.writers)
        assert not written.places, "a writer was given a slot before its copy was done"
        (side,) = cuda.streams
        wait_until(lambda: side.held_by == torch.device("cuda", 0))
        cuda.computing.set()
        wait_until(lambda: side.held_by is None)
        assert not written.places
        assert cuda.copied == 0
        # the copies come long after the allocator could have given the memory away
        cuda.copies.set()
    assert written.seen == {(0, n): bits(SHAPES[name](values_of(n))) for n in range(6)}


@pytest.mark.parametrize("index", [0, 1])
def test_a_copy_waits_for_the_stream_of_its_own_device(cuda, index):
    """The model is held up on one device while the other has nothing to do, and copies are free to run."""
    written = Written()
    cuda.computing.clear()
    with StagingBuffer(SLOT, 8, written, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
        run_model(cuda, ring, 4, index=index)
        (side,) = cuda.streams
        wait_until(lambda: side.held_by == torch.device("cuda", index))
        assert cuda.copied == 0, "values were copied before they were computed"
        cuda.computing.set()
    assert written.seen == {(index, n): bits(values_of(n)) for n in range(4)}


def test_copies_of_a_device_keep_their_order_on_one_stream(cuda):
    written = Written()
    with StagingBuffer(SLOT, 4, written, writers=1, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
        run_model(cuda, ring, 20)
    assert written.keys == [(0, number) for number in range(20)]
    assert len(cuda.streams) == 1


def test_each_device_has_a_stream_and_is_waited_for_as_itself(cuda):
    written = Written()
    with StagingBuffer(SLOT, 4, written, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
        for index in (0, 1, 1, 0):
            run_model(cuda, ring, 5, index=index)
        with torch.inference_mode():
            ring.submit("left on the CPU", values_of(9))
    assert [stream.device.index for stream in cuda.streams] == [0, 1]
    assert written.seen.pop("left on the CPU") == bits(values_of(9))
    assert written.seen == {(index, n): bits(values_of(n)) for index in (0, 1) for n in range(5)}
    assert len(cuda.waits) == 20
    assert all(sleeps for sleeps, _ in cuda.waits), "a waiting writer would spin"
    assert all(own for _, own in cuda.waits), "waited with another device current"


def test_slots_are_allocated_once_and_used_again(cuda):
    for copies in (HostCopies(), CudaCopies(cuda=cuda, pinned=False)):
        written = Written()
        with StagingBuffer(100, 3, written, copies=copies) as ring:
            assert ring.total_bytes == 3 * 128
            with torch.inference_mode():
                for number in range(60):
                    ring.submit(number, torch.full((25,), float(number)))
        assert len(set(written.places)) <= 3
        assert len(written.seen) == 60


def test_the_slot_that_came_back_last_is_taken_first():
    """One tensor at a time needs one slot, whatever the ring's size: the others are never touched."""
    written = Written()
    with StagingBuffer(64, 16, written) as ring:
        for number in range(30):
            ring.submit(number, torch.zeros(4))
            wait_until(lambda n=number: n in written.seen)
            wait_until(lambda: ring.free_slots == 16)
    assert len(set(written.places)) == 1


def test_a_stuck_writer_blocks_the_hook_and_nothing_grows(cuda):
    written = Written()
    written.go.clear()
    allocated = []

    class Counting(HostCopies):
        def allocate(self, total_bytes):
            allocated.append(total_bytes)
            return super().allocate(total_bytes)

    passed = []

    def model(ring):
        for number in range(10):
            ring.submit(number, torch.full((4,), float(number)))
            passed.append(number)

    with StagingBuffer(64, 3, written, copies=Counting()) as ring:
        with aside(model, ring) as (thread, errors):
            wait_until(lambda: ring.waits == 1)
            assert passed == [0, 1, 2], "more than the slots were taken"
            assert thread.is_alive()
            written.go.set()
        assert not errors
        assert ring.waited_seconds > 0
    assert allocated == [192]
    assert written.seen == {n: np.full(4, n, np.float32).tobytes() for n in range(10)}


def test_a_fast_writer_is_never_waited_for():
    with StagingBuffer(64, 40, Written()) as ring:
        for number in range(40):
            ring.submit(number, torch.zeros(4))
    assert (ring.waits, ring.waited_seconds) == (0, 0)


def test_more_writers_than_slots():
    written = Written()
    with StagingBuffer(64, 2, written, writers=7) as ring:
        for number in range(40):
            ring.submit(number, torch.full((4,), float(number)))
    assert written.seen == {n: np.full(4, n, np.float32).tobytes() for n in range(40)}
