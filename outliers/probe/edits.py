"""Changes what the readers of a site receive: features zeroed or replaced, values quantized, one value moved by its last bit.

An `Edit` takes the tensor of one site of one layer and returns another; it never writes into what it was given, which may be
the residual stream. `edited` puts edits before the readers for the time of a block. Readers of one site share the changed
tensor, which is computed once a pass. A tensor is seen as (copy, sequence, position, feature): copies are the experts of a
layer where these get scaled tokens, else there is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from outliers.errors import SiteError
from outliers.probe.readers import Reader, scale_of

Place = tuple[str, int]
"""(site, layer)."""
_PATTERNS = {2: torch.int16, 4: torch.int32}
"""Bytes of a value -> the integer that has its bits."""


class Edit(Protocol):
    """A change of a site's tensor."""

    @property
    def routers(self) -> bool:
        """Whether routers and gates of shared experts receive the change too."""

    def __call__(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """x: (copy, sequence, position, feature); scale: (copy, sequence, position, 1), what x was multiplied with."""


@dataclass(frozen=True)
class Identity:
    """Changes nothing: a copy."""

    routers: bool = True

    def __call__(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return x.clone()


@dataclass(frozen=True)
class Zero:
    """Features set to zero."""

    features: tuple[int, ...]
    routers: bool = True

    def __call__(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return x.index_fill(-1, torch.tensor(self.features, device=x.device), 0)


@dataclass(frozen=True)
class Mean:
    """Features replaced by numbers. means: (feature of the list,) float64, rounded to the dtype of the site."""

    features: tuple[int, ...]
    means: tuple[float, ...]
    routers: bool = True

    def __call__(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        values = torch.tensor(self.means, dtype=torch.float64, device=x.device).to(x.dtype)
        changed = x.clone()
        changed[..., list(self.features)] = values if scale is None else values * scale
        return changed


@dataclass(frozen=True)
class LastPlace:
    """One feature of every token moved by one unit in the last place, away from zero."""

    feature: int
    routers: bool = True

    def __call__(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        changed = x.clone()
        # the pattern of the next larger magnitude is the next number, for every dtype and on every device
        patterns = changed.view(_PATTERNS[x.element_size()])
        patterns[..., self.feature] += 1
        return changed


@dataclass
class Pass:
    """The shape of the pass that runs now: (sequence, position), and how many positions at its begin no edit touches."""

    sequences: int = 0
    positions: int = 0
    kept: int = 0


class Scores:
    """The scale of one layer's experts, read from their router as it runs."""

    def __init__(self) -> None:
        self.scale: torch.Tensor | None = None

    def after(self, _module: Any, _args: Any, output: Any) -> None:
        """A hook on the router."""
        self.scale = scale_of(output)


@contextlib.contextmanager
def edited(readers: Mapping[Place, Sequence[Reader]], edits: Mapping[Place, Edit], now: Pass) -> Iterator[None]:
    """In the block the readers of each place in `edits` receive what its edit gives."""
    handles: list[RemovableHandle] = []
    try:
        for place, edit in edits.items():
            shared, scores = SharedEdit(edit, now), Scores()
            for reader in readers[place]:
                if reader.scores is not None:
                    handles.append(reader.scores.register_forward_hook(scores.after))
                if not reader.is_router or edit.routers:
                    handles.append(_attach(reader, shared, scores))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(reader: Reader, shared: SharedEdit, scores: Scores) -> RemovableHandle:
    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        at = reader.argument
        value = args[at] if isinstance(at, int) else kwargs[at]
        changed = shared.changed(value, scores.scale if reader.scores is not None else None, reader)
        if isinstance(at, int):
            return (*args[:at], changed, *args[at + 1 :]), kwargs
        return args, kwargs | {at: changed}

    return reader.module.register_forward_pre_hook(before, with_kwargs=True)


class SharedEdit:
    """The changed tensor of one place, for all its readers in one pass.

    The original is held with it: as long as it is, no other tensor has its address.
    """

    def __init__(self, edit: Edit, now: Pass) -> None:
        self.edit, self.now = edit, now
        self._of: torch.Tensor | None = None
        self._made: torch.Tensor | None = None

    def changed(self, x: torch.Tensor, scale: torch.Tensor | None, reader: Reader) -> torch.Tensor:
        """What the edit gives of a tensor, computed once a pass; scale: what it was multiplied with."""
        if scale is None and self._of is not None and self._made is not None and _same(self._of, x):
            return self._made.reshape(x.shape)
        made = self._make(x, scale, reader)
        if scale is None:
            self._of, self._made = x, made
        return made.reshape(x.shape)

    def _make(self, x: torch.Tensor, scale: torch.Tensor | None, reader: Reader) -> torch.Tensor:
        shape = (-1, self.now.sequences, self.now.positions)
        whole = _in_order(x, shape, reader)
        made = self.edit(whole, None if scale is None else scale.reshape(*shape, 1))
        if self.now.kept:
            made[:, :, : self.now.kept] = whole[:, :, : self.now.kept]
        return made


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype


def _in_order(x: torch.Tensor, shape: tuple[int, int, int], reader: Reader) -> torch.Tensor:
    """x as (copy, sequence, position, feature). Raises SiteError where its tokens are not those of the pass."""
    tokens = shape[1] * shape[2]
    if not tokens or x.numel() % (tokens * x.shape[-1]):
        raise SiteError(f"{reader.path} received {tuple(x.shape)} in a pass of {shape[1]} x {shape[2]} tokens")
    return x.reshape(*shape, x.shape[-1])
