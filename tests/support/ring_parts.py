"""What tests of the staging buffer share: a fake CUDA device, a writer that can be held, a model's pass, no thread left behind.

`test_staging` and `test_staging_errors` import the fixtures by name.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest
import torch

from tests.support.fake_cuda import PATIENCE, FakeCuda

SLOT = 4 * 6 * 8 * 4


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
