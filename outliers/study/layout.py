"""The shapes of a capture and its bytes, before it exists: arrays, chunks, and the size of each.

Integer arithmetic that knows no file and no Zarr, so that planning, writing and reading use the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outliers.study.expert_shapes import ExpertShapes

CHUNK_BYTES = 8 * 1024 * 1024
"""A chunk holds one layer of one sequence, up to this: 2048 tokens x 2048 features of bfloat16 exactly."""

STORAGE: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""dtype of the model -> dtype on disk."""

NAN_BITS = {"bfloat16": 0x7FC0}
"""Fill values: what was never written reads as NaN, not as a quiet zero."""


@dataclass(frozen=True)
class Layout:
    """Shapes of a capture: `widths` features a site, in the sites' order; positions are cut into equal chunks."""

    widths: dict[str, int]
    layers: tuple[int, ...]
    num_sequences: int
    positions: int
    dtype: str
    codec: str
    chunk_bytes: int = CHUNK_BYTES
    aliases: dict[str, str] = field(default_factory=dict)
    """Site -> the captured site that is the same tensor and has its chunks: one norm that feeds attention and MLP."""
    experts: ExpertShapes | None = None
    """None where no experts are read."""

    @property
    def stored(self) -> dict[str, int]:
        """Widths of the sites that have chunks of their own."""
        return {site: width for site, width in self.widths.items() if site not in self.aliases}

    @property
    def fields(self) -> tuple[str, ...]:
        """The arrays of the routing table of experts."""
        return () if self.experts is None else self.experts.fields

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return STORAGE[self.dtype].itemsize

    @property
    def position_chunks(self) -> int:
        """Chunks that the positions of one sequence are cut into, the same for every site."""
        return math.ceil(self.positions * max(self.widths.values()) * self.itemsize / self.chunk_bytes)

    @property
    def chunk_positions(self) -> int:
        """Positions in a chunk; the last chunk of a sequence is padded to it on disk."""
        return math.ceil(self.positions / self.position_chunks)

    @property
    def largest_chunk_bytes(self) -> int:
        """Bytes of an uncompressed chunk of the widest site."""
        return self.chunk_positions * max(self.widths.values()) * self.itemsize

    @property
    def activation_bytes(self) -> int:
        """Bytes of all chunks, uncompressed, padding of the last ones included."""
        per_token = len(self.layers) * sum(self.stored.values()) * self.itemsize
        return self.num_sequences * self.position_chunks * self.chunk_positions * per_token

    @property
    def side_bytes(self) -> int:
        """Bytes of token_ids (int32), mask (1 byte) and lengths (int32)."""
        return self.num_sequences * (self.positions * 5 + 4)

    @property
    def table_bytes(self) -> int:
        """Bytes of the routing table of experts."""
        return 0 if self.experts is None else self.num_sequences * self.positions * self.experts.token_bytes

    @property
    def total_bytes(self) -> int:
        """Exact bytes of an uncompressed capture, the few kilobytes of JSON and the sums of experts apart."""
        return self.activation_bytes + self.side_bytes + self.table_bytes

    def chunks_of(self, length: int) -> int:
        """Chunks of a sequence of `length` tokens: none is written that would hold nothing but padding."""
        return math.ceil(length / self.chunk_positions)

    def span(self, chunk: int) -> slice:
        """Positions of one chunk."""
        return slice(chunk * self.chunk_positions, min((chunk + 1) * self.chunk_positions, self.positions))
