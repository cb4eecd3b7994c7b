"""Copies a tensor into a slot of the staging buffer: the seam between the buffer and a device.

A copy by `HostCopies` is done when `start` returns. `CudaCopies` queues the copy on a side stream of the tensor's device and
returns a handle, so that a hook never waits for the GPU. Knows tensors, streams and events, nothing of free slots or writers.

The CUDA path relies on these rules, from torch's and CUDA's documentation:
- A side stream sees a tensor's values only after it waited for the stream that computes them: the current stream of the
  tensor's device when the hook runs.
- The caching allocator reuses a freed block in the order of the stream on which it was allocated, unless `record_stream` has
  named other streams. The allocator reads these names when the block is freed, so `record_stream` comes before the copy.
- A copy is asynchronous only into pinned memory and from contiguous values; other values go through a temporary on the
  stream that is current then: here the side stream, which makes it, reads it and frees it in its own order.
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


class CopyHandle(Protocol):
    """A copy that may still be running."""

    def wait(self) -> None:
        """Return when the copy is done; called in another thread than `start`."""


class Copies(Protocol):
    """What the staging buffer needs of a device."""

    def allocate(self, total_bytes: int) -> torch.Tensor:
        """Host memory to copy into, (byte) uint8, at least `total_bytes`. Raises PlanRefused if it can't be allocated."""

    def start(self, source: torch.Tensor, target: torch.Tensor) -> CopyHandle | None:
        """Begin to copy; None if the copy is done already. The caller may drop `source` at once, but must not change it.

        target: contiguous, a part of what `allocate` gave, with the shape and dtype of `source`.
        """

    def close(self) -> None:
        """Return when no copy is running, whether its handle was waited for or not."""


class HostCopies:
    """Copies in the calling thread, done when `start` returns."""

    def allocate(self, total_bytes: int) -> torch.Tensor:
        return _memory(total_bytes, pinned=False)

    def start(self, source: torch.Tensor, target: torch.Tensor) -> CopyHandle | None:
        target.copy_(source)
        return None

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class CudaCopyHandle:
    """The event after a copy on a side stream."""

    cuda: Any
    device: torch.device
    landed: Any

    def wait(self) -> None:
        # a thread's first CUDA call makes a context on its current device: use the device that has one
        with self.cuda.device(self.device):
            self.landed.synchronize()


class CudaCopies:
    """Copies on one side stream for each device, into pinned memory.

    cuda: `torch.cuda`, or a module with its interface. Without `pinned` memory CUDA makes each copy synchronous.
    """

    def __init__(self, *, cuda: Any = torch.cuda, pinned: bool = True) -> None:
        self._cuda = cuda
        self._pinned = pinned
        self._side: dict[torch.device, Any] = {}

    def allocate(self, total_bytes: int) -> torch.Tensor:
        # request the size that torch allocates: the reported bound is the memory that is taken
        return _memory(pinned_bytes(total_bytes) if self._pinned else total_bytes, pinned=self._pinned)

    def start(self, source: torch.Tensor, target: torch.Tensor) -> CopyHandle | None:
        if not source.is_cuda:
            target.copy_(source)  # a layer that was left on the CPU
            return None
        side = self._side_stream(source.device)
        side.wait_stream(self._cuda.current_stream(source.device))
        # before the copy is queued, so that no exception can leave the copy unprotected
        source.record_stream(side)
        with self._cuda.stream(side):
            target.copy_(source.contiguous(), non_blocking=True)
            landed = self._cuda.Event(blocking=True)
            landed.record(side)
        return CudaCopyHandle(self._cuda, source.device, landed)

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
            f"the buffers between the model and the disk need {total_bytes} bytes of {kind}, which can't be allocated "
            f"({str(error).splitlines()[0]}): give fewer --batch-sequences or a shorter --sequence-length, or let the machine "
            "or container have more memory"
        ) from error
