"""The ring and its copies: what arrives, what is reused and when, who waits for whom, and what is left after an error.

The CUDA path runs as it is, on a device that is made of threads (`fake_cuda`): order, lifetimes and waiting are real, the
driver is not.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outliers.copies import CudaCopies, HostCopies
from outliers.errors import DiskFull, PlanRefused, SiteError
from outliers.ring import Ring
from outliers.ring_size import MIN_SLOTS, RING_BYTES, pinned_bytes, ring_bytes, ring_slots, slot_stride
from tests.fake_cuda import PATIENCE, FakeCuda

SLOT = 4 * 6 * 8 * 4
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


@pytest.fixture
def cuda():
    fake = FakeCuda()
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("writer-")]
    assert not left, "writers outlived the test"


def values_of(number, dtype=torch.float32):
    generator = torch.Generator().manual_seed(number)
    return torch.randn((4, 6, 8), generator=generator).to(dtype)


def bits(tensor):
    """A tensor's bytes, in order, whatever its strides."""
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


class Written:
    """A `write` that keeps copies, and can be held."""

    def __init__(self):
        self.seen, self.places, self.keys = {}, [], []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, key, values):
        self.places.append(values.__array_interface__["data"][0])
        before = values.tobytes()
        assert self.go.wait(PATIENCE)
        time.sleep(0.001)
        assert values.tobytes() == before, "the slot was reused while it was being written"
        self.seen[key] = before
        self.keys.append(key)


def run_model(cuda, ring, count, form=lambda x: x, dtype=torch.float32, index=0):
    """What a forward pass does: each tensor is forgotten after its hook, and the next one is computed."""
    with torch.inference_mode():
        for number in range(count):
            tensor = cuda.tensor(values_of(number, dtype), index)
            ring.submit((index, number), form(tensor))
            del tensor


@contextmanager
def aside(work, *args):
    """`work` in a thread, which must have ended when the block has."""
    errors = []

    def run():
        try:
            work(*args)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield thread, errors
    thread.join(PATIENCE)
    assert not thread.is_alive()


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", SHAPES.values(), ids=SHAPES)
def test_every_tensor_arrives_bit_for_bit(cuda, form, dtype):
    host, device = Written(), Written()
    with Ring(SLOT, 3, host) as ring, torch.inference_mode():
        for number in range(12):
            ring.submit((0, number), form(values_of(number, dtype)))
    with Ring(SLOT, 3, device, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
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
    with Ring(64, 2, lambda key, values: found.update({key: values.copy()})) as ring:
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
    with Ring(SLOT, 2, written, writers=3) as ring:
        for number, tensor in enumerate(tensors):
            ring.submit(number, tensor)
    assert written.seen == {number: bits(tensor) for number, tensor in enumerate(tensors)}


@pytest.mark.parametrize("name", ["transposed", "whole"])
def test_a_hook_waits_for_nothing_and_nothing_is_read_too_early(cuda, name):
    """Neither the model's own work nor any copy has run when the hooks are through; the tensors are forgotten by then."""
    written = Written()
    cuda.computing.clear()
    cuda.copies.clear()
    with Ring(SLOT, 8, written, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
        with aside(run_model, cuda, ring, 6, SHAPES[name]) as (model, errors):
            model.join(PATIENCE)
            assert not model.is_alive(), "a hook waited for the device"
        assert not errors
        time.sleep(0.05)
        assert not written.places, "a writer was given a slot before its copy was done"
        cuda.computing.set()
        time.sleep(0.05)
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
    with Ring(SLOT, 8, written, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
        run_model(cuda, ring, 4, index=index)
        time.sleep(0.05)
        assert cuda.copied == 0, "values were copied before they were computed"
        cuda.computing.set()
    assert written.seen == {(index, n): bits(values_of(n)) for n in range(4)}


def test_copies_of_a_device_keep_their_order_on_one_stream(cuda):
    written = Written()
    with Ring(SLOT, 4, written, writers=1, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
        run_model(cuda, ring, 20)
    assert written.keys == [(0, number) for number in range(20)]
    assert len(cuda.streams) == 1


def test_each_device_has_a_stream_and_is_waited_for_as_itself(cuda):
    written = Written()
    with Ring(SLOT, 4, written, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
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
        with Ring(100, 3, written, copies=copies) as ring:
            assert ring.total_bytes == 3 * 128
            with torch.inference_mode():
                for number in range(60):
                    ring.submit(number, torch.full((25,), float(number)))
        assert len(set(written.places)) <= 3
        assert len(written.seen) == 60


def test_the_slot_that_came_back_last_is_taken_first():
    """One tensor at a time needs one slot, whatever the ring's size: the others are never touched."""
    written = Written()
    with Ring(64, 16, written) as ring:
        for number in range(30):
            ring.submit(number, torch.zeros(4))
            wait_until(lambda n=number: n in written.seen)
            wait_until(lambda: len(ring._free) == 16)
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

    with Ring(64, 3, written, copies=Counting()) as ring:
        with aside(model, ring) as (thread, errors):
            wait_until(lambda: len(passed) == 3)
            time.sleep(0.1)
            assert passed == [0, 1, 2], "more than the slots were taken"
            assert thread.is_alive()
            written.go.set()
        assert not errors
        assert ring.waited_seconds >= 0.1
    assert allocated == [192]
    assert written.seen == {n: np.full(4, n, np.float32).tobytes() for n in range(10)}


def test_a_fast_writer_is_never_waited_for():
    with Ring(64, 40, Written()) as ring:
        for number in range(40):
            ring.submit(number, torch.zeros(4))
    assert ring.waited_seconds == 0


def test_more_writers_than_slots():
    written = Written()
    with Ring(64, 2, written, writers=7) as ring:
        for number in range(40):
            ring.submit(number, torch.full((4,), float(number)))
    assert written.seen == {n: np.full(4, n, np.float32).tobytes() for n in range(40)}


@pytest.mark.parametrize("on_device", [False, True])
def test_an_error_of_a_writer_comes_out_of_the_next_submit(cuda, on_device):
    """Also where every slot is taken: nobody waits for a writer that will not write."""
    full = DiskFull("no space left")
    calls = []

    def write(key, values):
        calls.append(key)
        raise full

    copies = CudaCopies(cuda=cuda, pinned=False) if on_device else HostCopies()

    def study():
        with Ring(SLOT, 2, write, copies=copies) as ring:
            run_model(cuda, ring, 500) if on_device else [ring.submit(n, values_of(n)) for n in range(500)]

    with aside(study) as (_, errors):
        pass
    assert errors == [full]
    assert len(calls) <= 2, "writers went on after an error"
    assert not getattr(full, "__notes__", [])


def test_an_error_of_a_writer_wakes_a_hook_that_waits():
    held = threading.Event()

    def write(key, values):
        assert held.wait(PATIENCE)
        raise DiskFull("no space left")

    def study():
        with Ring(64, 2, write) as ring:
            for number in range(3):
                ring.submit(number, torch.zeros(4))

    with aside(study) as (thread, errors):
        time.sleep(0.05)
        assert thread.is_alive()
        held.set()
    assert [type(error) for error in errors] == [DiskFull]


def test_an_error_of_the_last_writer_comes_out_of_the_block():
    def write(key, values):
        time.sleep(0.05)
        raise SystemExit(3)

    with pytest.raises(SystemExit) as caught, Ring(64, 4, write) as ring:
        ring.submit("only", torch.zeros(4))
    assert caught.value.code == 3


def test_every_submit_after_an_error_tells_it_and_none_waits():
    def write(key, values):
        raise DiskFull("no space left")

    def study():
        with pytest.raises(DiskFull), Ring(64, 2, write) as ring:
            ring.submit("first", torch.zeros(4))
            wait_until(lambda: ring._error is not None)
            for _ in range(10):
                with pytest.raises(DiskFull):
                    ring.submit("later", torch.zeros(4))

    with aside(study) as (_, errors):
        pass
    assert not errors


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_of_the_model_leaves_no_thread_and_writes_what_was_submitted(cuda, kind):
    written = Written()
    cuda.copies.clear()
    threading.Timer(0.1, cuda.copies.set).start()
    with pytest.raises(kind), Ring(SLOT, 8, written, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
        run_model(cuda, ring, 5)
        raise kind
    assert sorted(written.seen) == [(0, number) for number in range(5)]
    assert not any(thread.name.startswith("writer-") for thread in threading.enumerate())


def test_both_errors_are_told():
    def write(key, values):
        raise DiskFull("no space left")

    with pytest.raises(ZeroDivisionError) as caught, Ring(64, 4, write) as ring:
        ring.submit("only", torch.zeros(4))
        raise ZeroDivisionError
    assert caught.value.__notes__ == ["a writer failed too: DiskFull('no space left')"]


def test_an_interrupt_reaches_a_hook_that_waits():
    """Ctrl-C while the disk is stuck: the hook wakes, and what was submitted is written as soon as the disk is back."""
    written = Written()
    written.go.clear()
    main = threading.main_thread().ident
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    threading.Timer(0.4, written.go.set).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Ring(64, 2, written) as ring:
        for number in range(10):
            ring.submit(number, torch.zeros(4))
    assert time.monotonic() - began < PATIENCE
    assert sorted(written.seen) == [0, 1]


def test_leaving_the_block_waits_for_every_copy(cuda):
    """Also after a writer's error, when nobody cares for the values: the memory must not go while it is written to."""

    def write(key, values):
        raise DiskFull("no space left")

    class Freed(CudaCopies):
        def close(self):
            super().close()
            left.append((cuda.queued, cuda.copied))

    left = []
    cuda.copies.clear()
    threading.Timer(0.2, cuda.copies.set).start()
    with (
        pytest.raises(DiskFull),
        Ring(SLOT, 8, write, copies=Freed(cuda=cuda, pinned=False)) as ring,
    ):
        run_model(cuda, ring, 6)
    assert left == [(6, 6)]


def test_a_copy_that_was_queued_and_then_failed_is_waited_for_too(cuda):
    """No ticket came of it, so no writer waits; the device still writes into the slot."""

    class Interrupted(CudaCopies):
        def start(self, source, target):
            super().start(source, target)
            raise KeyboardInterrupt

    cuda.copies.clear()
    threading.Timer(0.2, cuda.copies.set).start()
    with (
        pytest.raises(KeyboardInterrupt),
        Ring(SLOT, 1, Written(), copies=Interrupted(cuda=cuda, pinned=False)) as ring,
    ):
        with pytest.raises(KeyboardInterrupt):
            run_model(cuda, ring, 1)
        # nothing is put into that slot again, and nobody waits for it
        run_model(cuda, ring, 1)
    assert (cuda.queued, cuda.copied) == (1, 1)


def test_a_broken_device_is_told_and_nothing_hangs(cuda):
    cuda.broken = True
    written = Written()

    def study():
        with Ring(SLOT, 2, written, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
            run_model(cuda, ring, 20)

    with aside(study) as (_, errors):
        pass
    assert "illegal memory access" in str(errors[0])
    assert not written.seen


def test_what_does_not_fit_is_refused_and_takes_no_slot():
    written = Written()
    with Ring(64, 1, written) as ring:
        for _ in range(3):
            with pytest.raises(SiteError, match=r"68 bytes \(17,\) does not fit a slot of 64"):
                ring.submit("large", torch.zeros(17))
        ring.submit("right", torch.zeros(16))
    assert list(written.seen) == ["right"]


def test_a_ring_is_used_inside_of_its_block():
    ring = Ring(64, 1, Written())
    with pytest.raises(RuntimeError, match="inside"):
        ring.submit("before", torch.zeros(4))
    with ring:
        pass
    with pytest.raises(RuntimeError, match="inside"):
        ring.submit("after", torch.zeros(4))


def test_memory_that_is_not_there_is_refused_with_its_size():
    with pytest.raises(PlanRefused, match=rf"need {2**60} bytes of memory.*--batch-sequences"):
        Ring(2**58, 4, Written())


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinned memory can be had here")
def test_pinned_memory_without_a_driver_is_refused():
    with pytest.raises(PlanRefused, match=r"256 bytes of pinned .*memory"):
        Ring(64, 3, Written(), pinned=True)


@given(st.integers(1, 2**40))
def test_the_size_of_a_ring_is_bounded(slot_bytes):
    slots = ring_slots(slot_bytes)
    total = ring_bytes(slot_bytes, slots)
    assert slots * slot_bytes <= total < slots * (slot_bytes + 64)
    assert slots == MIN_SLOTS or slots * slot_bytes <= RING_BYTES
    assert slot_stride(slot_bytes) % 64 == 0
    assert total <= ring_bytes(slot_bytes, slots, pinned=True) < 2 * total


@pytest.mark.parametrize(("asked", "taken"), [(1, 1), (2, 2), (3, 4), (2**26, 2**26), (2**26 + 1, 2**27), (0, 1)])
def test_pinned_memory_comes_in_powers_of_two(asked, taken):
    assert pinned_bytes(asked) == taken
