"""The routing table of a capture as lazy arrays with named dimensions: a chunk, all layers of one sequence, is checked when read.

What is unknown is NaN: positions past a sequence's end, layers without experts, a largest value where nothing was finite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.errors import BadInput
from outliers.store.chunks import ChunkFiles
from outliers.study.expert_shapes import FIELDS, MARGIN, NOBODY
from outliers.study.layout import Layout

DIMENSIONS = ("layer", "sequence", "position", "slot")


def dimensions_of(field: str) -> tuple[str, ...]:
    """The dimensions of a field: the margin has no slots."""
    return DIMENSIONS[:3] if field == MARGIN else DIMENSIONS


class TableReader:
    """One field of the routing table of a finished capture. `shape`: (layer, sequence, position, slot), or without slot.

    float32 has the numbers of experts, columns and channels exactly: they are below 65,535. A shared expert is -1, -2... as in
    all results. Raises BadInput where the capture read no experts.
    """

    def __init__(self, files: ChunkFiles, layout: Layout, done: dict[int, dict[str, Any]], field: str) -> None:
        if layout.experts is None:
            raise BadInput("the capture holds no routing: its model has no experts, or --experts was off")
        self._files, self._done, self._field, self._experts = files, done, field, layout.experts
        own = {layer: number for number, layer in enumerate(layout.experts.layers)}
        self._rows = [own.get(layer) for layer in layout.layers]
        shape = (len(layout.layers), layout.num_sequences, layout.positions, layout.experts.slots_of(field))
        self.shape = shape[: len(dimensions_of(field))]
        self.dtype = np.dtype(np.float32)

    def read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """The values at an index for each axis: an integer, which drops its axis, a slice, or an array of integers."""
        axes = [np.arange(size)[index] for index, size in zip(key, self.shape, strict=True)]
        rows = [np.atleast_1d(axis) for axis in axes]
        slots = rows[3] if len(rows) > 3 else np.zeros(1, np.int64)
        found = np.full((*(row.size for row in rows[:3]), slots.size), np.nan, self.dtype)
        known = [(at, self._rows[int(layer)]) for at, layer in enumerate(rows[0])]
        for number, sequence in enumerate(rows[1]):
            if any(own is not None for _, own in known):
                table = self._table(int(sequence))
                for at, own in known:
                    if own is not None:
                        found[at, number] = table[own][np.ix_(rows[2], slots)]
        return found.reshape(tuple(row.size for axis, row in zip(axes, rows, strict=True) if axis.ndim))

    def _table(self, sequence: int) -> NDArray[np.float32]:
        """(layer with experts, position, slot) of one sequence. Raises CorruptCapture."""
        stored = self._files.read_table(self._field, sequence, int(self._done[sequence]["crc32"][self._field][0]))
        if not np.issubdtype(FIELDS[self._field][0], np.integer):
            return stored
        values: NDArray[np.float32] = np.where(stored == NOBODY, np.float32(np.nan), stored.astype(np.float32))
        if self._field != "expert":
            return values
        shared = self._experts.experts
        return np.where(values >= shared, shared - 1 - values, values)
