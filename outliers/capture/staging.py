"""A bounded set of reused slots of host memory between the forward pass and the threads that write.

A hook copies its tensor into a free slot and returns; writer threads take full slots, write them, and release them. If no
slot is free the hook waits: this bounds the memory, whatever the size of the corpus. The slots are one block of memory,
allocated once. Knows tensors and slots, nothing of files or models. `copies` starts the copy of a tensor into a slot and
waits for it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from numpy.typing import NDArray

from outliers.capture.copies import Copies, CopyHandle, CudaCopies, HostCopies
from outliers.errors import SiteError
from outliers.study.ring_size import slot_stride, writer_count

_BITS = {torch.bfloat16: torch.uint16}
"""numpy has no bfloat16: `write` gets the bits of such a tensor."""

Write = Callable[[Any, NDArray[Any]], None]


@dataclass
class _Full:
    """A slot in use: the key of its tensor, and the copy that fills it."""

    key: Any
    slot: torch.Tensor
    values: torch.Tensor
    copy: CopyHandle | None


class _Free:
    """The free slots; the slot that was released last is taken first.

    queue.LifoQueue is written in Python: its locks passed between the model and the writers at every tensor. Here a queue
    that is written in C does the waiting, and a list holds the slots.
    """

    def __init__(self) -> None:
        self._slots: list[torch.Tensor] = []
        self._count: queue.SimpleQueue[None] = queue.SimpleQueue()

    def put(self, slot: torch.Tensor) -> None:
        self._slots.append(slot)
        self._count.put(None)  # after the slot: a thread that gets this finds one

    def take(self, *, wait: bool) -> torch.Tensor:
        """A free slot. Raises queue.Empty if there is none and `wait` is false."""
        self._count.get(block=wait)
        return self._slots.pop()

    def __len__(self) -> int:
        return self._count.qsize()


class StagingBuffer:
    """`slots` buffers of `slot_bytes`, and threads that hand each filled one to `write(key, values)`.

    values: an array over the slot, in the tensor's shape; bfloat16 as uint16. It is valid until `write` returns.
    An error in a writer is raised by the next `submit`, or at the end of the `with` block. The end of the block writes all
    submitted tensors, joins the threads and frees the memory, also after an error.
    """

    def __init__(
        self,
        slot_bytes: int,
        slots: int,
        write: Write,
        *,
        pinned: bool = False,
        writers: int | None = None,
        copies: Copies | None = None,
    ) -> None:
        self._copies = copies if copies is not None else CudaCopies() if pinned else HostCopies()
        self._slot_bytes, self._slots = slot_bytes, slots
        self._write = write
        stride = slot_stride(slot_bytes)
        memory = self._copies.allocate(stride * slots)
        self.total_bytes = memory.nbytes
        """Bytes of all slots; it does not change."""
        self.waits = 0
        """How many calls of `submit` found no free slot."""
        self.waited_seconds = 0.0
        """How long `submit` waited for a free slot: above zero, the writers are slower than the model."""
        # last in, first out: the slot that was released last is still in the cache, and slots that are not needed are
        # never touched. A submit took 0.66 of the time of first-in-first-out, for 0.6 MB and for 8 MB alike (medians of 7
        # interleaved rounds, one torch thread, two writers with fsync)
        self._free: _Free = _Free()
        for number in reversed(range(slots)):
            self._free.put(memory[number * stride :][:slot_bytes])
        self._full: queue.SimpleQueue[_Full | None] = queue.SimpleQueue()
        self.writers = writer_count(os.cpu_count() or 1) if writers is None else writers
        self._error: BaseException | None = None
        self._open = False
        self._slots = slots
        self._threads = [
            threading.Thread(target=self._drain, name=f"writer-{n}", daemon=True) for n in range(self.writers)
        ]

    @property
    def free_slots(self) -> int:
        """Slots that hold no tensor."""
        return len(self._free)

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Wait for a free slot, copy `tensor` into it, and queue it. Raises the error of a writer, SiteError."""
        if not self._open:
            raise RuntimeError(
                "submit was called outside of the `with` block of the staging buffer, where no writer runs"
            )
        if tensor.nbytes > self._slot_bytes:
            raise SiteError(
                f"a tensor of {tensor.nbytes} bytes {tuple(tensor.shape)} does not fit a slot of {self._slot_bytes}: "
                "make the staging buffer for the largest batch and site"
            )
        slot = self._take()
        if self._error is not None:
            self._free.put(slot)  # so that the next submit does not wait
            raise self._error
        values = slot[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        try:
            copy = self._copies.start(tensor.detach(), values)
        except BaseException as error:
            # a partial copy may still run into this slot: with the error set, no slot is filled again
            self._error = error
            self._free.put(slot)
            raise
        self._full.put(_Full(key, slot, values, copy))

    def flush(self) -> None:
        """Return when every submitted tensor is written. Raises the error of a writer."""
        slots = [self._free.take(wait=True) for _ in range(self._slots)]
        for slot in reversed(slots):  # in the order in which they were
            self._free.put(slot)
        if self._error is not None:
            raise self._error

    def _take(self) -> torch.Tensor:
        try:
            return self._free.take(wait=False)
        except queue.Empty:
            self.waits += 1
            began = time.monotonic()
            slot = self._free.take(wait=True)
            self.waited_seconds += time.monotonic() - began
            return slot

    def _drain(self) -> None:
        while (full := self._full.get()) is not None:
            try:
                # after an error no slot is filled, and `_end` waits for the device
                if self._error is None:
                    if full.copy is not None:
                        full.copy.wait()
                    bits = _BITS.get(full.values.dtype)
                    self._write(full.key, (full.values.view(bits) if bits else full.values).numpy())
            except BaseException as error:  # noqa: BLE001 - `submit` raises it in its own thread
                self._error = error if self._error is None else self._error
            finally:
                # slots are released after an error too: a hook that waits for one wakes up and sees the error
                self._free.put(full.slot)

    def __enter__(self) -> StagingBuffer:
        self._open = True
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()
        if self._error is None or self._error is error:
            return
        if error is None:
            raise self._error
        error.add_note(f"a writer failed too: {self._error!r}")

    def _end(self) -> None:
        """Let the writers finish the queue, and join them; then no copy is running, and the memory can be freed."""
        self._open = False
        for _ in self._threads:
            self._full.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        try:
            # copies that never reached a writer: a start that failed midway, an interrupt in a hook
            self._copies.close()
        except RuntimeError as error:  # the device is broken; an earlier error says more
            self._error = error if self._error is None else self._error
        self._free = _Free()
