"""The staging buffer when a writer, the model, the device or an allocation fails: the error, the hook that waits, what is left.

The CUDA path runs on a device that is made of threads (`fake_cuda`).
"""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

from outliers.capture.copies import CudaCopies, HostCopies
from outliers.capture.staging import StagingBuffer
from outliers.errors import DiskFull, PlanRefused, SiteError
from tests.support.fake_cuda import PATIENCE
from tests.support.ring_parts import SLOT, Written, aside, cuda, no_thread_is_left, run_model, values_of, wait_until

__all__ = ["cuda", "no_thread_is_left"]  # fixtures, found by name


@pytest.mark.parametrize("on_device", [False, True])
def test_an_error_of_a_writer_comes_out_of_the_next_submit(cuda, on_device):
    """Also where every slot is taken: no caller waits for a writer that will not write."""
    full = DiskFull("no space left")
    calls = []

    def write(key, values):
        calls.append(key)
        raise full

    copies = CudaCopies(cuda=cuda, pinned=False) if on_device else HostCopies()

    def study():
        with StagingBuffer(SLOT, 2, write, copies=copies) as ring:
            run_model(cuda, ring, 500) if on_device else [ring.submit(n, values_of(n)) for n in range(500)]

    with aside(study) as (_, errors):
        pass
    assert errors == [full]
    assert len(calls) <= 2, "writers went on after an error"
    assert not getattr(full, "__notes__", [])


def test_an_error_of_a_writer_wakes_a_hook_that_waits():
    held, made = threading.Event(), []

    def write(key, values):
        assert held.wait(PATIENCE)
        raise DiskFull("no space left")

    def study():
        with StagingBuffer(64, 2, write) as ring:
            made.append(ring)
            for number in range(3):
                ring.submit(number, torch.zeros(4))

    with aside(study) as (thread, errors):
        wait_until(lambda: made and made[0].waits == 1)
        assert thread.is_alive()
        held.set()
    assert [type(error) for error in errors] == [DiskFull]


def test_an_error_of_the_last_writer_comes_out_of_the_block():
    submitted = threading.Event()

    def write(key, values):
        assert submitted.wait(PATIENCE)
        raise SystemExit(3)

    with pytest.raises(SystemExit) as caught, StagingBuffer(64, 4, write) as ring:
        ring.submit("only", torch.zeros(4))
        submitted.set()
    assert caught.value.code == 3


def refused(ring):
    """Whether a submit raises the error of a writer."""
    try:
        ring.submit("first", torch.zeros(4))
    except DiskFull:
        return True
    return False


def test_every_submit_after_an_error_tells_it_and_none_waits():
    def write(key, values):
        raise DiskFull("no space left")

    def study():
        with pytest.raises(DiskFull), StagingBuffer(64, 2, write) as ring:
            ring.submit("first", torch.zeros(4))
            wait_until(lambda: refused(ring))
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
    with pytest.raises(kind), StagingBuffer(SLOT, 8, written, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
        run_model(cuda, ring, 5)
        raise kind
    assert sorted(written.seen) == [(0, number) for number in range(5)]
    assert not any(thread.name.startswith("writer-") for thread in threading.enumerate())


def test_both_errors_are_told():
    def write(key, values):
        raise DiskFull("no space left")

    with pytest.raises(ZeroDivisionError) as caught, StagingBuffer(64, 4, write) as ring:
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
    with pytest.raises(KeyboardInterrupt), StagingBuffer(64, 2, written) as ring:
        for number in range(10):
            ring.submit(number, torch.zeros(4))
    assert time.monotonic() - began < PATIENCE
    assert sorted(written.seen) == [0, 1]


def test_leaving_the_block_waits_for_every_copy(cuda):
    """Also after a writer's error, when no caller needs the values: the memory must not go while it is written to."""

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
        StagingBuffer(SLOT, 8, write, copies=Freed(cuda=cuda, pinned=False)) as ring,
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
        StagingBuffer(SLOT, 1, Written(), copies=Interrupted(cuda=cuda, pinned=False)) as ring,
    ):
        with pytest.raises(KeyboardInterrupt):
            run_model(cuda, ring, 1)
        # nothing is put into that slot again, and no caller waits for it
        run_model(cuda, ring, 1)
    assert (cuda.queued, cuda.copied) == (1, 1)


def test_a_broken_device_is_told_and_nothing_hangs(cuda):
    cuda.broken = True
    written = Written()

    def study():
        with StagingBuffer(SLOT, 2, written, copies=CudaCopies(cuda=cuda, pinned=False)) as ring:
            run_model(cuda, ring, 20)

    with aside(study) as (_, errors):
        pass
    assert "illegal memory access" in str(errors[0])
    assert not written.seen


def test_what_does_not_fit_is_refused_and_takes_no_slot():
    written = Written()
    with StagingBuffer(64, 1, written) as ring:
        for _ in range(3):
            with pytest.raises(SiteError, match=r"68 bytes \(17,\) does not fit a slot of 64"):
                ring.submit("large", torch.zeros(17))
        ring.submit("right", torch.zeros(16))
    assert list(written.seen) == ["right"]


def test_a_ring_is_used_inside_of_its_block():
    ring = StagingBuffer(64, 1, Written())
    with pytest.raises(RuntimeError, match="outside of the `with` block"):
        ring.submit("before", torch.zeros(4))
    with ring:
        pass
    with pytest.raises(RuntimeError, match="outside of the `with` block"):
        ring.submit("after", torch.zeros(4))


def test_memory_that_is_not_there_is_refused_with_its_size():
    with pytest.raises(PlanRefused, match=rf"need {2**60} bytes of memory.*--batch-sequences"):
        StagingBuffer(2**58, 4, Written())


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinned memory can be had here")
def test_pinned_memory_without_a_driver_is_refused():
    with pytest.raises(PlanRefused, match=r"256 bytes of pinned .*memory"):
        StagingBuffer(64, 3, Written(), pinned=True)
