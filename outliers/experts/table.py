"""The routing table: for each token and layer the experts it was routed to, and the largest values of each.

Stored with the activations as Zarr arrays of (layer, sequence, position, slot), a chunk a sequence, and journaled with it. The
layers are the captured ones that have experts. The routed slots come first, in the router's order, then one slot for each
shared expert. Knows arrays and their shapes, nothing of models or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

NOBODY = 65_535
"""The expert of a position that holds no token."""

FIELDS: dict[str, tuple[np.dtype[Any], Any]] = {
    "expert": (np.dtype("<u2"), NOBODY),
    "expert_weight": (np.dtype("<f4"), np.nan),
    "expert_down_in": (np.dtype("<f4"), np.nan),
    "expert_down_in_column": (np.dtype("<u2"), NOBODY),
    "expert_output": (np.dtype("<f4"), np.nan),
    "expert_output_channel": (np.dtype("<u2"), NOBODY),
    "router_margin": (np.dtype("<f4"), np.nan),
}
"""Array -> dtype on disk, and the value of a position without a token. The last has one value a token, the others one a slot.

expert: a routed expert's number, or for shared expert s the number of experts plus s. expert_weight: what its output is
multiplied by. expert_down_in: the largest finite magnitude of the input of its second projection, and its column.
expert_output: the same of its output before the weight (Llama4: with the weight inside), and its channel. Where equal ones are
largest the first is named; NaN where nothing is finite.
"""
MARGIN = "router_margin"


@dataclass(frozen=True)
class ExpertShapes:
    """Shapes of the experts of one capture.

    layers: the captured layers of the model with experts. slots: experts that a token is routed to. widths: of a routed expert
    and of each shared one.
    """

    layers: tuple[int, ...]
    experts: int
    slots: int
    width: int
    shared_widths: tuple[int, ...]
    hidden: int

    @property
    def shared(self) -> int:
        """Shared experts of a layer."""
        return len(self.shared_widths)

    @property
    def all_slots(self) -> int:
        """Slots of a token in the table."""
        return self.slots + self.shared

    @property
    def all_experts(self) -> int:
        """Rows of a layer: the routed experts, then the shared ones."""
        return self.experts + self.shared

    def shape(self, field: str, num_sequences: int, positions: int) -> tuple[int, ...]:
        """Shape of a field's array."""
        own = (1,) if field == MARGIN else (self.all_slots,)
        return (len(self.layers), num_sequences, positions, *own)

    @property
    def token_bytes(self) -> int:
        """Bytes of the table for one token."""
        slot = sum(dtype.itemsize for name, (dtype, _) in FIELDS.items() if name != MARGIN)
        return len(self.layers) * (slot * self.all_slots + FIELDS[MARGIN][0].itemsize)


def number_of(index: int, experts: int) -> int:
    """The number of an expert in results: 0, 1... for the routed ones, -1, -2... for the shared ones."""
    return index if index < experts else experts - 1 - index
