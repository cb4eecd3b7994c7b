"""A bounded ring of reused buffers between the forward pass and the writers.

A hook copies its tensor into a free slot and goes on; writer threads take full slots, write them, and give them back.
When no slot is free the hook waits: that is the bound on memory, and it does not grow with the corpus. The slots are
one piece of memory, allocated once. Knows tensors and slots, nothing of files or models; how a tensor gets into a slot,
and when it is there, is the business of `copies`. Before it: `forward`. After it: whatever `write` does.
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

from outliers.capture.copies import Copies, CudaCopies, HostCopies, Ticket
from outliers.errors import SiteError
from outliers.study.ring_size import slot_stride, writer_count

_BITS = {torch.bfloat16: torch.uint16}
"""numpy has no bfloat16: such a tensor is handed on as its bits."""

Write = Callable[[Any, NDArray[Any]], None]


@dataclass
class _Full:
    """A slot in use: which tensor it holds, and the ticket after which its bytes are there."""

    key: Any
    slot: torch.Tensor
    values: torch.Tensor
    ticket: Ticket | None


class _Free:
    """The free slots, the last one that came back first.

    queue.LifoQueue is written in Python: its locks changed hands with the writers at every tensor. Here the waiting is done
    by a queue written in C, and the slots lie on a stack beside it.
    """

    def __init__(self) -> None:
        self._slots: list[torch.Tensor] = []
        self._count: queue.SimpleQueue[None] = queue.SimpleQueue()

    def put(self, slot: torch.Tensor) -> None:
        self._slots.append(slot)
        self._count.put(None)  # after the slot: whoever gets this finds one

    def take(self, *, wait: bool) -> torch.Tensor:
        """A free slot; queue.Empty where there is none and it should not wait."""
        self._count.get(block=wait)
        return self._slots.pop()

    def __len__(self) -> int:
        return self._count.qsize()


class Ring:
    """`slots` buffers of `slot_bytes`, and threads that hand each filled one to `write(key, values)`.

    values: an array over the slot, in the tensor's shape; bfloat16 as uint16. It is valid until `write` returns.
    An error in a writer is raised by the next `submit`, or on leaving the `with` block. Leaving it writes what was
    submitted, ends the threads and gives the memory back, whatever happened inside.
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
        self._slot_bytes = slot_bytes
        self._write = write
        stride = slot_stride(slot_bytes)
        memory = self._copies.allocate(stride * slots)
        self.total_bytes = memory.nbytes
        """Bytes that the ring holds: all that it will ever hold."""
        self.waited_seconds = 0.0
        """How long `submit` waited for a free slot: above zero, the writers are slower than the model."""
        # last in, first out: the slot that was given back last is still in the cache, and slots that are never needed
        # are never touched. Beside first-in-first-out a submit took 0.66 of the time, for 0.6 MB and for 8 MB alike
        # (medians of 7 interleaved rounds, one torch thread, two writers with fsync)
        self._free: _Free = _Free()
        for number in reversed(range(slots)):
            self._free.put(memory[number * stride :][:slot_bytes])
        self._full: queue.SimpleQueue[_Full | None] = queue.SimpleQueue()
        self.writers = writer_count(os.cpu_count() or 1) if writers is None else writers
        self._error: BaseException | None = None
        self._open = False
        self._threads = [
            threading.Thread(target=self._drain, name=f"writer-{n}", daemon=True) for n in range(self.writers)
        ]

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Copy `tensor` into a free slot (waiting for one) and queue it. Raises what a writer raised; SiteError."""
        if not self._open:
            raise RuntimeError("a ring takes tensors inside of its `with` block only: no writer is there to empty it")
        if tensor.nbytes > self._slot_bytes:
            raise SiteError(
                f"a tensor of {tensor.nbytes} bytes {tuple(tensor.shape)} does not fit a slot of {self._slot_bytes}: "
                "the ring must be made for the largest batch and site"
            )
        slot = self._take()
        if self._error is not None:
            self._free.put(slot)  # so that the next one doesn't wait either
            raise self._error
        values = slot[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        try:
            ticket = self._copies.start(tensor.detach(), values)
        except BaseException as error:
            # half a copy may still run into this slot: with the error noted nothing is put into any slot again
            self._error = error
            self._free.put(slot)
            raise
        self._full.put(_Full(key, slot, values, ticket))

    def _take(self) -> torch.Tensor:
        try:
            return self._free.take(wait=False)
        except queue.Empty:
            began = time.monotonic()
            slot = self._free.take(wait=True)
            self.waited_seconds += time.monotonic() - began
            return slot

    def _drain(self) -> None:
        while (full := self._full.get()) is not None:
            try:
                # after an error nothing is put into a slot any more, and `_end` waits for the device itself
                if self._error is None:
                    if full.ticket is not None:
                        full.ticket.wait()
                    bits = _BITS.get(full.values.dtype)
                    self._write(full.key, (full.values.view(bits) if bits else full.values).numpy())
            except BaseException as error:  # noqa: BLE001 - handed to the thread that submits, which raises it
                self._error = error if self._error is None else self._error
            finally:
                # slots go back even after an error: a hook that waits for one must wake up to see it
                self._free.put(full.slot)

    def __enter__(self) -> Ring:
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
        """Let the writers finish what is queued and join them; then nothing is under way, and the memory can go."""
        self._open = False
        for _ in self._threads:
            self._full.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        try:
            # tickets that never reached a writer: a start that failed half way, an interrupt in a hook
            self._copies.close()
        except RuntimeError as error:  # the device is broken, and an error that is already known says more
            self._error = error if self._error is None else self._error
        self._free = _Free()
