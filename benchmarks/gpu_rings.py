"""Replacements of the staging buffer for `gpu_capture`: the hooks submit every tensor to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from outliers.capture.copies import Copies, CudaCopies, HostCopies
from outliers.capture.staging import StagingBuffer


class NoBuffer:
    """Ignores each tensor: shows the cost of the hooks alone."""

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Nothing."""


class Witness:
    """Submits tensors to a staging buffer, and keeps a copy of each, in the order of the model's own stream.

    The copy comes after that of the buffer is queued, so that it does not delay what is under test.
    """

    def __init__(self, ring: StagingBuffer) -> None:
        self.ring = ring
        self.kept: dict[tuple[str, int], torch.Tensor] = {}

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Submit, and keep (sequence, position, feature)."""
        self.ring.submit(key, tensor)
        self.kept[key[1], key[2]] = tensor.clone()


class NeverWaiting:
    """Starts the copy of each tensor into the same memory, while calls that wait for a GPU are errors.

    Use it without other threads: the debug mode is set for the whole process.
    """

    def __init__(self, slot_bytes: int, device: torch.device) -> None:
        self.copies: Copies = CudaCopies() if device.type == "cuda" else HostCopies()
        self.memory = self.copies.allocate(slot_bytes)
        self.device = device

    def submit(self, key: Any, tensor: torch.Tensor) -> None:
        """Raises RuntimeError if the call would wait."""
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
