"""Writes what the router alone says into the routing table, where the experts' own values are hidden or not asked for."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from outliers.experts.routed import Routed


def add_routing(
    table: dict[str, NDArray[Any]], index: int, routed: Routed, lengths: tuple[int, ...], positions: int
) -> None:
    """Write experts, weights and margin of one layer of a batch, without padding.

    table: field -> (layer, sequence, position, slot). index: of the layer. positions: of the pass.
    """
    rows = len(lengths)
    parts = {
        "expert": routed.experts,
        "expert_weight": routed.weights,
        "router_margin": routed.margin[:, None],
    }
    for field, values in parts.items():
        found = values.cpu().numpy().reshape(rows, positions, -1)
        for row, length in enumerate(lengths):
            table[field][index, row, :length, : found.shape[-1]] = found[row, :length]
