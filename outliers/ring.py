"""A bounded ring of reused buffers between the forward pass and the writers.

A hook copies its tensor into a free slot and goes on; writer threads take full slots, write them, and give them back.
When no slot is free the hook waits: that is the bound on memory, and it does not grow with the corpus. On a GPU the
slots are pinned and the copy runs on a side stream with an event that the writer waits for. Knows tensors and slots,
nothing of files or models.

The CUDA path follows torch's own rules (record_stream, events); it has not been run here, where there is no GPU.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from numpy.typing import NDArray

WRITERS = 2

_BITS = {torch.bfloat16: torch.uint16}
"""numpy has no bfloat16: such a tensor is handed on as its bits."""

Write = Callable[[Any, NDArray[Any]], None]


@dataclass
class _Full:
    """A slot in use: which tensor it holds, and the event after which its bytes are there."""

    key: Any
    slot: torch.Tensor
    values: torch.Tensor
    ready: torch.cuda.Event | None


class Ring:
    """`slots` buffers of `slot_bytes`, and threads that hand each filled one to `write(key, values)`.

    values: an array over the slot, in the tensor's shape; bfloat16 as uint16. It is valid until `write` returns.
    An error in a writer is raised by the next `submit`, or on leaving the `with` block.
    """

    def __init__(
        self, slot_bytes: int, slots: int, write: Write, *, pinned: bool = False, writers: int = WRITERS
    ) -> None:
        self.total_bytes = slot_bytes * slots
        self._slot_bytes = slot_bytes
        self._write = write
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[_Full | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        for _ in range(slots):
            self._free.put(torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=pinned))
        self._threads = [threading.Thread(target=self._drain, name=f"writer-{n}", daemon=True) for n in range(writers)]
        for thread in self._threads:
            thread.start()

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Copy `tensor` into a free slot (waiting for one) and queue it. Raises what a writer raised."""
        slot = self._free.get()
        if self._error is not None:
            self._free.put(slot)
            raise self._error
        values = slot[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._full.put(_Full(key, slot, values, self._copy(tensor, values)))

    def _copy(self, tensor: torch.Tensor, values: torch.Tensor) -> torch.cuda.Event | None:
        if not tensor.is_cuda:
            values.copy_(tensor)
            return None
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            values.copy_(tensor, non_blocking=True)
            # the allocator must not hand this memory out again before the copy has read it
            tensor.record_stream(stream)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(stream)
        return ready

    def _drain(self) -> None:
        while (full := self._full.get()) is not None:
            try:
                if self._error is None:
                    if full.ready is not None:
                        full.ready.synchronize()
                    bits = _BITS.get(full.values.dtype)
                    self._write(full.key, (full.values.view(bits) if bits else full.values).numpy())
            except BaseException as error:  # noqa: BLE001 - handed to the thread that submits, which raises it
                self._error = error
            finally:
                # slots go back even after an error: a hook that waits for one must wake up to see it
                self._free.put(full.slot)

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for _ in self._threads:
            self._full.put(None)
        for thread in self._threads:
            thread.join()
        if kind is None and self._error is not None:
            raise self._error
