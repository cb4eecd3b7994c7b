"""What stands in the place of a ring: the hooks give each every tensor that they see. After it: `gpu_capture`, which measures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from outliers.capture.copies import Copies, CudaCopies, HostCopies
from outliers.capture.staging import StagingBuffer


class NoBuffer:
    """Takes a tensor and does nothing: what the hooks alone cost."""

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Nothing."""


class Witness:
    """Hands tensors on to a ring, and keeps what they were: a copy in the order of the model's own stream.

    It is made after the ring's own copy was queued, so that it delays nothing that is under test.
    """

    def __init__(self, ring: StagingBuffer) -> None:
        self.ring = ring
        self.kept: dict[tuple[str, int], torch.Tensor] = {}

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Submit, and keep (sequence, position, feature)."""
        self.ring.submit(key, tensor)
        self.kept[key[1], key[2]] = tensor.clone()


class NeverWaiting:
    """Starts the copy of each tensor, into one place, with calls that wait for a GPU made an error.

    No other thread is there: the debug mode is the whole process's.
    """

    def __init__(self, slot_bytes: int, device: torch.device) -> None:
        self.copies: Copies = CudaCopies() if device.type == "cuda" else HostCopies()
        self.memory = self.copies.allocate(slot_bytes)
        self.device = device

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Raises RuntimeError where the call would wait."""
        place = self.memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        with _waiting_is_an_error(self.device):
            self.copies.start(tensor, place)


@contextlib.contextmanager
def _waiting_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
