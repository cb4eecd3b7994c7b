"""How many slots a ring has: bounded, whatever a slot takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outliers.study.ring_size import MIN_SLOTS, RING_BYTES, pinned_bytes, ring_bytes, ring_slots, slot_stride


@given(st.integers(1, 2**40))
def test_the_size_of_a_ring_is_bounded(slot_bytes):
    slots = ring_slots(slot_bytes)
    total = ring_bytes(slot_bytes, slots)
    assert slots * slot_bytes <= total < slots * (slot_bytes + 64)
    assert slots == MIN_SLOTS or slots * slot_bytes <= RING_BYTES
    assert slot_stride(slot_bytes) % 64 == 0
    assert total <= ring_bytes(slot_bytes, slots, pinned=True) < 2 * total


@pytest.mark.parametrize(("asked", "taken"), [(1, 1), (2, 2), (3, 4), (2**26, 2**26), (2**26 + 1, 2**27), (0, 1)])
def test_pinned_memory_comes_in_powers_of_two(asked, taken):
    assert pinned_bytes(asked) == taken
