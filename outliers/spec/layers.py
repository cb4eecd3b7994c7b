"""Layers as a user names them: numbers and ranges, such as 0-5,20-."""

from __future__ import annotations

import re
from typing import Any

MAX_LAYER = 9_999
LAYER_RANGES = r"^[0-9]+(-[0-9]*)?(,[0-9]+(-[0-9]*)?)*$"
"""Layers with a range that ends with the model, such as 0-5,20-."""


def read_layers(layers: Any) -> Any:
    """Ranges as numbers, where each has an end; else the text, of which `layers_in` makes numbers once the model is known.

    What is no list of numbers and ranges is returned as it is. Raises ValueError for a range that names no layer.
    """
    items = layers.split(",") if isinstance(layers, str) and layers != "all" else layers
    # what is no list of numbers and ranges is for the annotation to refuse, negative numbers for `_sorted`
    if not isinstance(items, list | tuple) or not any(isinstance(item, str) and item[:1] != "-" for item in items):
        return layers
    text = ",".join(str(item).strip() for item in items)
    if not re.fullmatch(LAYER_RANGES, text):
        raise ValueError(f"layers are 0-based numbers and ranges such as 0-5,20-, or all; got {text}")
    ends = [int(end) for item in text.split(",") for end in item.split("-") if end]
    if max(ends) > MAX_LAYER:
        raise ValueError(f"no model has a layer {max(ends)}")
    return text if re.search(r"-(,|$)", text) else layers_in(text, 0)


def layers_in(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that 0-5,20- names in a model of `num_layers`, ascending. Raises ValueError for a range without a layer."""
    found: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.partition("-")
        named = range(int(first), int(last) + 1 if last else num_layers if dash else int(first) + 1)
        if not named:
            raise ValueError(f"{item} names no layer")
        found.update(named)
    return tuple(sorted(found))
