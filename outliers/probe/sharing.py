"""Leaves out the layers before the first change: they would compute what the untouched pass has computed.

The untouched pass keeps what layers return (`Kept`), as many of them as fit MOST_KEPT_BYTES. In a changed pass every layer up
to a kept one returns at once what that one returned. A model that carries more from layer to layer than its hidden state would
give other numbers so: `session` compares before it relies on this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from outliers.study.probe_memory import MOST_KEPT_BYTES


def kept_layers(wanted: Sequence[int], layer_bytes: int, most_bytes: int = MOST_KEPT_BYTES) -> tuple[int, ...]:
    """Which of the wanted layers' outputs are kept, evenly spread, so that they take at most `most_bytes`. Ascending.

    layer_bytes: of one layer's output for a batch.
    """
    layers = sorted({layer for layer in wanted if layer >= 0})
    fit = max(0, most_bytes // max(1, layer_bytes))
    if len(layers) <= fit:
        return tuple(layers)
    return tuple(sorted({layers[(number + 1) * len(layers) // fit - 1] for number in range(fit)}))


class Kept:
    """Outputs of some layers in the untouched pass over one batch."""

    def __init__(self, layers: torch.nn.ModuleList, wanted: tuple[int, ...]) -> None:
        self.layers, self.wanted = layers, wanted
        self._outputs: dict[int, Any] = {}

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """In the block layers are watched; what was kept before is dropped first."""
        self._outputs.clear()
        handles = [self.layers[number].register_forward_hook(self._hook(number)) for number in self.wanted]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, number: int) -> Any:
        def after(_module: Any, _args: Any, output: Any) -> None:
            self._outputs[number] = output

        return after

    def last_before(self, first: int) -> int | None:
        """The last kept layer before layer `first`; None where there is none."""
        return max((number for number in self._outputs if number < first), default=None)

    @contextlib.contextmanager
    def skipping(self, first: int) -> Iterator[None]:
        """In the block no layer is computed whose output, or that of a later one before layer `first`, was kept."""
        last = self.last_before(first)
        if last is None:
            yield
            return
        output = self._outputs[last]

        def instead(*_args: Any, **_kwargs: Any) -> Any:
            return output

        with contextlib.ExitStack() as stack:
            for number in range(last + 1):
                stack.enter_context(_replaced(self.layers[number], instead))
            yield


@contextlib.contextmanager
def _replaced(layer: torch.nn.Module, instead: Any) -> Iterator[None]:
    """In the block the layer's forward is another; after it the one that was there, also one that a library put there."""
    own = layer.__dict__.get("forward")
    layer.forward = instead
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
