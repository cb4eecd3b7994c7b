"""How large the staging ring between the forward pass and the writers is. Arithmetic without torch, which planning needs."""

from __future__ import annotations

RING_BYTES = 64 * 1024 * 1024
"""Target size of the ring. It only has to outlast a stall of the disk: 64 MiB are about 60 ms at 1 GB/s. Beyond that the
slower of model and disk sets the pace whatever the size: 2 to 64 slots of 0.6 and of 8 MB showed no trend on two cores
(medians of 5 interleaved rounds, with and without stalls; `python -m benchmarks.gpu_capture --device cpu --slots N` runs
a whole capture with N slots). What is in the ring is lost when the process is killed, and on a GPU each tensor that
waits there holds as much of the device's memory."""
MIN_SLOTS, MAX_SLOTS = 4, 16
"""At least one slot for each of two writers, one that is being copied into, one to go on with. Chosen, not tuned."""
MIN_WRITERS, MAX_WRITERS = 2, 4
"""Threads that write: two wait for the disk in turn, more than four would outnumber the slots of large tensors. On two
cores 2, 3 and 4 wrote alike (0.76, 0.82 and 0.80 of a raw write of the same bytes, medians of 6 interleaved rounds)."""
WRITER_BYTES = 4 * 1024 * 1024
"""What a writer takes in addition to its chunk: stack, the allocator's pool of its thread, lines of the journal. Over
SmolLM2's bare forward a whole capture took 1 to 4 MB more than the ring with two writers (docs/performance.md); the rest is
a margin."""
ALIGNMENT = 64
"""Slots begin at multiples of this many bytes: a cache line, and a multiple of every dtype's size."""


def ring_slots(slot_bytes: int) -> int:
    """Slots of `slot_bytes` that make up about RING_BYTES, within MIN_SLOTS and MAX_SLOTS."""
    return max(MIN_SLOTS, min(MAX_SLOTS, RING_BYTES // max(1, slot_bytes)))


def writer_count(cores: int) -> int:
    """Threads that write on a machine with `cores` cores: half of them, within MIN_WRITERS and MAX_WRITERS."""
    return max(MIN_WRITERS, min(MAX_WRITERS, cores // 2))


def writers_bytes(chunk_bytes: int, writers: int, *, packed: bool) -> int:
    """Bytes of memory that the writers take in addition to the ring: a chunk each, and two more where chunks are compressed."""
    return writers * (WRITER_BYTES + chunk_bytes * (3 if packed else 1))


def slot_stride(slot_bytes: int) -> int:
    """Bytes from the beginning of one slot to that of the next."""
    return max(1, -(-slot_bytes // ALIGNMENT)) * ALIGNMENT


def ring_bytes(slot_bytes: int, slots: int, *, pinned: bool = False) -> int:
    """Bytes of memory that a ring takes on the host: all that it ever takes, however large the corpus is."""
    total = slot_stride(slot_bytes) * slots
    return pinned_bytes(total) if pinned else total


def pinned_bytes(total_bytes: int) -> int:
    """What torch's allocator of pinned memory takes for a request: it rounds up to a power of two."""
    return 1 << max(0, total_bytes - 1).bit_length()
