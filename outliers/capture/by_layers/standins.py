"""Lets the base model's own forward run with one decoder layer: the others return what they are given.

The base makes masks, positions and rotary tables for the layer that runs, as in a whole pass; only the hidden state that it
gets is another one, from the spool. What a layer hands to the next in any other way is refused, and so is a base that does
not call each layer once, in order. Knows modules and tensors, nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from outliers.errors import PlanRefused, SiteError

_WAY_OUT = "give --schedule whole"


class Elsewhere:
    """In the place of what a layer that does not run would return besides the hidden state."""


_ELSEWHERE = Elsewhere()


class StandIns:
    """The forwards of a base's layers, exchanged until `detach`.

    `width`: how many values a layer returns; None for a bare tensor. It is known once layer 0 has run.
    """

    def __init__(self, layers: Iterable[torch.nn.Module], name: str) -> None:
        """name: of the model, for a person."""
        self._layers = list(layers)
        self._own = [layer.forward for layer in self._layers]
        self._name = name
        self._called: list[int] = []
        self._current = 0
        self._given: torch.Tensor | None = None
        self._hand_on: Callable[[torch.Tensor], None] = _forget
        self.width: int | None = None
        for number, layer in enumerate(self._layers):
            # on the instance: the module, its hooks and its place in the tree stay what they are
            layer.forward = self._forward_of(number)

    def detach(self) -> None:
        """Give every layer its own forward back."""
        for layer, own in zip(self._layers, self._own, strict=True):
            layer.forward = own

    def begin(self, layer: int, given: torch.Tensor | None, hand_on: Callable[[torch.Tensor], None]) -> None:
        """Before a pass: the layer that runs in it, and what it gets, None for what the base gives it (layer 0).

        hand_on: called with what the next layer is given; not for the last layer. The tensor is valid until it returns.
        """
        self._called, self._current, self._given, self._hand_on = [], layer, given, hand_on

    def finish(self) -> None:
        """After the pass. Raises SiteError if the base did not call each layer once, in order."""
        self._given, self._hand_on = None, _forget
        if self._called != list(range(len(self._layers))):
            called = ", ".join(map(str, self._called[:12])) or "none"
            raise SiteError(
                f"--schedule layers: {self._name} does not call each layer once, one after the other ({called}): {_WAY_OUT}"
            )

    def _forward_of(self, number: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._forward(number, args, kwargs)

    def _forward(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._called.append(number)
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            raise SiteError(f"--schedule layers: layer {number} of {self._name} is given no hidden_states: {_WAY_OUT}")
        if number != self._current:
            if number == self._current + 1:
                self._hand_on(hidden)
            return hidden if self.width is None else (hidden, *[_ELSEWHERE] * (self.width - 1))
        self._check_received((*args[1:], *kwargs.values()))
        if self._given is not None:
            args, kwargs = _with_hidden(args, kwargs, self._given)
        output = self._own[number](*args, **kwargs)
        self._check_handed_on((*args, *kwargs.values()))
        if number == 0:
            self.width = len(output) if isinstance(output, tuple) else None
        return output

    def _check_received(self, values: tuple[Any, ...]) -> None:
        if any(isinstance(value, Elsewhere) for value in values):
            raise self._refused("is given more of the layer before than its hidden state")

    def _check_handed_on(self, values: tuple[Any, ...]) -> None:
        """A mapping that a layer fills for later layers (the shared keys and values of Gemma3n and Gemma4)."""
        if any(isinstance(value, Mapping) and len(value) for value in values):
            raise self._refused("fills a mapping that later layers read")

    def _refused(self, what: str) -> PlanRefused:
        return PlanRefused(
            f"--schedule layers: layer {self._current} of {self._name} {what}, so no layer can run alone: {_WAY_OUT}"
        )


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _forget(_: torch.Tensor) -> None:
    pass
