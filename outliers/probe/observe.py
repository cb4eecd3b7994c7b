"""Shows the tensor of each site, in the pass that is running, to a function that only looks.

What is shown is what the first reader of a place receives unscaled, as (sequence, position, feature).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from outliers.errors import SiteError
from outliers.probe.edits import Pass, Place
from outliers.probe.readers import Reader

Look = Callable[[Place, torch.Tensor], None]


@contextlib.contextmanager
def observed(readers: Mapping[Place, Sequence[Reader]], look: Look, now: Pass) -> Iterator[None]:
    """In the block `look` is called once a pass for each place."""
    handles = []
    try:
        for place, own in readers.items():
            first = next((reader for reader in own if reader.scores is None), None)
            if first is None:
                raise SiteError(f"{place[0]} of layer {place[1]} is only received scaled: it can't be measured")
            handles.append(first.module.register_forward_pre_hook(_hook(first, place, look, now), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(reader: Reader, place: Place, look: Look, now: Pass) -> Any:
    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at = reader.argument
        value = args[at] if isinstance(at, int) else kwargs[at]
        look(place, value.reshape(now.sequences, now.positions, value.shape[-1]))

    return before
