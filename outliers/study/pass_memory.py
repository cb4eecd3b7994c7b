"""Memory that counting in the forward pass takes (--store none): arithmetic without torch, which planning needs.

The tensors are those of `counting.in_pass`; a test holds the numbers equal. All amounts are in bytes.
"""

from __future__ import annotations

from outliers.spec import BLOCK_SITES, StudySpec, has_block
from outliers.study.layout import Layout

PATTERNS = 65_536
WORKERS, SPARE_SLOTS = 4, 2
"""`in_pass.host`: threads that count on a processor, at most, and slots besides theirs."""


def host_pass_bytes(spec: StudySpec, layout: Layout) -> int:
    """Of main memory, where a processor computes, besides the totals (`counting_memory`): slots of tensors, the keys of each
    thread, and of each span of a batch hits and moments."""
    batch, captured = spec.capture.batch_sequences, sum(layout.widths.values())
    counts = batch * layout.position_chunks * len(layout.layers) * captured * (2 * 8 + 4 * 8)
    return slot_bytes(spec, layout) + WORKERS * _key_bytes(spec, layout) + counts


def device_pass_bytes(spec: StudySpec, layout: Layout) -> int:
    """Of the memory of each GPU: the totals and keys, a copied tensor, and what the end of a sequence takes for one site."""
    batch, widest = spec.capture.batch_sequences, max(layout.widths.values())
    held = batch * layout.positions * widest * layout.itemsize
    # magnitudes, ranks and places of int64, a key, and a bool for each magnitude of the ladder
    closing = layout.positions * widest * (3 * 8 + 2 * layout.itemsize + len(spec.criteria.magnitudes))
    return state_bytes(spec, layout) + held + closing


def slot_bytes(spec: StudySpec, layout: Layout) -> int:
    """Slots of `HostCounter`: each holds the sites of a layer that are counted together."""
    stored, pair = layout.stored, has_block(tuple(layout.widths))
    sizes = [width for site, width in stored.items() if not (pair and site in BLOCK_SITES)]
    if pair:
        sizes.append(sum(width for site, width in stored.items() if site in BLOCK_SITES))
    return (WORKERS + SPARE_SLOTS) * spec.capture.batch_sequences * layout.positions * max(sizes) * layout.itemsize


def state_bytes(spec: StudySpec, layout: Layout) -> int:
    """Tensors of `DeviceState`."""
    batch, layers, steps = spec.capture.batch_sequences, len(layout.layers), len(spec.criteria.magnitudes)
    captured = sum(layout.widths.values())
    counted = captured + (layout.widths["attn_in"] if has_block(tuple(layout.widths)) else 0)
    hits = layers * counted * (2 * 8 * steps + 4 * batch)
    own = layers * captured * (2 * 4 + 8 + 4 * 8 + 4 * batch)
    return hits + own + layers * len(layout.widths) * PATTERNS * 8 + _key_bytes(spec, layout)


def _key_bytes(spec: StudySpec, layout: Layout) -> int:
    """Keys of all tokens of a batch, twice as wide as a value."""
    return spec.capture.batch_sequences * layout.positions * sum(layout.widths.values()) * 2 * layout.itemsize
