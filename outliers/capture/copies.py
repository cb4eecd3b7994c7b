"""How a tensor gets into a slot of the ring: the seam between the ring and a device.

`HostCopies` is done when it returns. `CudaCopies` queues the copy on a side stream of the tensor's device and hands out a
ticket, so that a hook never waits for the GPU. Knows tensors, streams and events, nothing of slots that are free or of writers.
It is used by `ring` alone.

The CUDA path rests on these rules, from torch's and CUDA's documentation:
- A side stream sees a tensor's values only after it waited for the stream that makes them: the one that is current on the
  tensor's device when the hook runs.
- The caching allocator hands a freed block out again in the order of the stream that it was allocated on, unless
  `record_stream` has named the others; that is looked at when the block is freed, so it is called before the copy is queued.
- A copy is asynchronous only into pinned memory and from contiguous values; others go through a temporary of the stream
  that is current then: here the side stream, which made it, reads it and may have it back in its own order.
- An event is created on the device that records it. With `blocking` a thread that waits for it sleeps instead of spinning.
- `record_stream` protects memory from the allocator, not from the model: one that overwrites a captured tensor in place
  after the hook would race with the copy. `benchmarks/gpu_capture.py` checks a model for that, and all of the above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from outliers.errors import PlanRefused
from outliers.study.ring_size import pinned_bytes


class Ticket(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Return when the copy is done; called in another thread than the one that started it."""


class Copies(Protocol):
    """What the ring needs of a device."""

    def allocate(self, total_bytes: int) -> torch.Tensor:
        """Host memory to copy into, (byte) uint8, at least `total_bytes`. Raises PlanRefused where there is none."""

    def start(self, source: torch.Tensor, target: torch.Tensor) -> Ticket | None:
        """Begin to copy; None where it is done already. The caller may forget `source` at once, but not change it.

        target: contiguous, a part of what `allocate` gave, with the shape and dtype of `source`.
        """

    def close(self) -> None:
        """Return when no copy is under way any more, tickets waited for or not."""


class HostCopies:
    """Copies by the thread that asks, done when `start` returns."""

    def allocate(self, total_bytes: int) -> torch.Tensor:
        return _memory(total_bytes, pinned=False)

    def start(self, source: torch.Tensor, target: torch.Tensor) -> Ticket | None:
        target.copy_(source)
        return None

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class CudaTicket:
    """The event behind a copy on a side stream."""

    cuda: Any
    device: torch.device
    landed: Any

    def wait(self) -> None:
        # a thread's first CUDA call makes a context on its current device: let that be the one that is in use anyway
        with self.cuda.device(self.device):
            self.landed.synchronize()


class CudaCopies:
    """Copies on one side stream a device, into pinned memory.

    cuda: what `torch.cuda` is; the tests give it streams that can be held. Without `pinned` memory CUDA itself makes each
    copy synchronous.
    """

    def __init__(self, *, cuda: Any = torch.cuda, pinned: bool = True) -> None:
        self._cuda = cuda
        self._pinned = pinned
        self._side: dict[torch.device, Any] = {}

    def allocate(self, total_bytes: int) -> torch.Tensor:
        # asked for in the size in which it is given: the bound that is told is the memory that is taken
        return _memory(pinned_bytes(total_bytes) if self._pinned else total_bytes, pinned=self._pinned)

    def start(self, source: torch.Tensor, target: torch.Tensor) -> Ticket | None:
        if not source.is_cuda:
            target.copy_(source)  # a layer that was left on the CPU
            return None
        side = self._side_stream(source.device)
        side.wait_stream(self._cuda.current_stream(source.device))
        # before the copy is queued: there is no moment at which an exception could leave it unprotected
        source.record_stream(side)
        with self._cuda.stream(side):
            target.copy_(source.contiguous(), non_blocking=True)
            landed = self._cuda.Event(blocking=True)
            landed.record(side)
        return CudaTicket(self._cuda, source.device, landed)

    def close(self) -> None:
        for side in self._side.values():
            side.synchronize()

    def _side_stream(self, device: torch.device) -> Any:
        if device not in self._side:
            self._side[device] = self._cuda.Stream(device)
        return self._side[device]


def _memory(total_bytes: int, *, pinned: bool) -> torch.Tensor:
    try:
        return torch.empty(total_bytes, dtype=torch.uint8, pin_memory=pinned)
    except (RuntimeError, MemoryError) as error:
        kind = "pinned (page-locked) memory" if pinned else "memory"
        raise PlanRefused(
            f"the buffers between the model and the disk need {total_bytes} bytes of {kind}, and there are none to be had "
            f"({str(error).splitlines()[0]}): give fewer --batch-sequences or a shorter --sequence-length, or let the machine "
            "or container have more memory"
        ) from error
