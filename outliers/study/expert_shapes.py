"""The routing table: for each token and layer the experts it was routed to, and the largest values of each.

Stored with the activations as Zarr arrays of (layer, sequence, position, slot), a chunk a sequence, and journaled with it. The
layers are the captured ones that have experts. The routed slots come first, in the router's order, then one slot for each
shared expert. Knows arrays and their shapes, nothing of models or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SUMS = "experts"
"""Folder of a capture with the sums over tokens that no table holds (`experts.sums_files`)."""
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


SLOT_BYTES = 96
"""Of a slot while a sequence is counted: its expert, key, position and hits as 64-bit integers, each once or twice."""
EXPERT_BYTES = 112
"""Of an expert in `experts.totals`: weights, tokens by kind, the largest input and output with their places, the first row."""
OUTPUTS_BYTES = 256 * 28
"""Of a layer: the largest outputs that are kept (`experts.totals.OUTPUTS_KEPT`)."""

ROUTING = ("expert", "expert_weight", MARGIN)
"""The fields of a capture that reads the routing alone; it has no slot for shared experts."""


@dataclass(frozen=True)
class ExpertShapes:
    """Shapes of the experts of one capture.

    layers: the captured layers of the model with experts. slots: experts that a token is routed to. width: of a routed expert.
    shared_widths: of each shared expert, none where `values` is false. values: whether the experts' inputs and outputs are read,
    or the routing alone. applied: whether an expert's input is multiplied by its weight, and not its output.
    """

    layers: tuple[int, ...]
    experts: int
    slots: int
    width: int
    shared_widths: tuple[int, ...]
    hidden: int
    values: bool = True
    applied: bool = False

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

    @property
    def fields(self) -> tuple[str, ...]:
        """The arrays of the table."""
        return tuple(FIELDS) if self.values else ROUTING

    def slots_of(self, field: str) -> int:
        """Values of a field for one token in one layer."""
        return 1 if field == MARGIN else self.all_slots

    @property
    def token_bytes(self) -> int:
        """Bytes of the table for one token."""
        return len(self.layers) * sum(FIELDS[name][0].itemsize * self.slots_of(name) for name in self.fields)

    @property
    def sums_bytes(self) -> int:
        """Bytes of the sums over tokens (`experts.sums`), in memory and on disk."""
        if not self.values:
            return 0
        columns = self.experts * self.width + self.shared * max(self.shared_widths, default=0)
        channels = (self.all_experts + 1) * self.hidden
        return len(self.layers) * (24 * columns + 8 * channels + 8 * 65_536)

    def counting_bytes(self, sequences: int, positions: int, *, inputs: bool) -> int:
        """Memory for counting the experts of so many sequences, an upper bound: their totals, the sums twice (a capture that was
        read in parts has several, which are added one after the other), and the table of one sequence.

        positions: of a sequence. inputs: whether mlp_in is stored, whose squares are summed for each expert.
        """
        layers = len(self.layers)
        totals = layers * (self.all_experts * (EXPERT_BYTES + 4 * sequences) + 8 * 65_536 + OUTPUTS_BYTES)
        squares = 8 * layers * self.experts * self.hidden if inputs and self.values else 0
        table = positions * (self.token_bytes + layers * self.all_slots * SLOT_BYTES)
        return totals + squares + table + 2 * self.sums_bytes


def number_of(index: int, experts: int) -> int:
    """The number of an expert in results: 0, 1... for the routed ones, -1, -2... for the shared ones."""
    return index if index < experts else experts - 1 - index
