"""How large the ring between the forward pass and the writers is: arithmetic that the plan needs without torch."""

from __future__ import annotations

RING_BYTES = 256 * 1024 * 1024
"""Target size of the ring: small beside any model. Not tuned."""
MIN_SLOTS, MAX_SLOTS = 4, 64


def ring_slots(slot_bytes: int) -> int:
    """Slots of `slot_bytes` that make up about RING_BYTES, within MIN_SLOTS and MAX_SLOTS."""
    return max(MIN_SLOTS, min(MAX_SLOTS, RING_BYTES // slot_bytes))
