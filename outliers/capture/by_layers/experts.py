"""The experts of one layer of a capture by layers: their sums, and their rows of the routing table, on disk until the end.

    <capture>/layers/sums-<layer>.npz              the sums of the layer, with the sequences that they hold
    <capture>/layers/table-<layer>-<field>.npy     (sequence of the plan, position, slot)

The sums of a layer take batches in the order of the whole pass, so they end with the same bits. Both are on the disk before
the line of a batch; sums may hold more batches than the lines, and those are not added again.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.capture.by_layers.record import Plan, changed
from outliers.capture.experts import ExpertPass, ExpertSumsFile, Table
from outliers.capture.forward import Batch
from outliers.experts.sums import ExpertSums
from outliers.experts.sums_files import read_sums, write_sums
from outliers.files.atomic import sync_folder
from outliers.model.experts import ExpertsInfo
from outliers.study.expert_shapes import FIELDS, ExpertShapes
from outliers.study.layout import Layout


class LayerSums:
    """The sums of one layer. They begin with what the capture's own sums hold of it."""

    def __init__(self, folder: Path, layer: int, own: ExpertSumsFile, shapes: ExpertShapes) -> None:
        self.path = sums_file(folder, layer)
        begun = own.sums.of_layer(shapes.layers.index(layer))
        kept = read_sums(self.path, begun.shapes) if self.path.exists() else None
        self.sums = begun if kept is None else kept
        self._own, self._held = own, set(self.sums.sequences.tolist())

    def holds(self, sequence: int) -> bool:
        return sequence in self._held or self._own.holds(sequence)

    def finished(self, sequences: range) -> None:
        self.sums.sequences = np.union1d(self.sums.sequences, np.array(sequences, np.int64))
        self._held |= set(sequences)

    def save(self) -> None:
        """Write the sums. Raises OSError."""
        write_sums(self.path, self.sums)


class LayerTable:
    """The rows of the routing table of one layer, of every sequence of a plan."""

    def __init__(self, folder: Path, layer: int, layout: Layout, plan: Plan, *, write: bool) -> None:
        """write: whether rows are put; else they are taken. Raises CorruptCapture where the files are not of this shape."""
        self._rows = row_of_sequence(plan)
        self._folder, self._layer = folder, layer
        shapes = layout.experts
        fields = () if shapes is None else shapes.fields
        self._arrays: dict[str, NDArray[Any]] = {}
        for field in fields:
            shape = (len(self._rows), layout.positions, shapes.slots_of(field) if shapes else 0)
            self._arrays[field] = self._open(field, shape, write=write)

    def put(self, table: Table, sequences: range) -> dict[str, list[int]]:
        """Keep the rows of a batch; returns field -> crc32 of each sequence's rows. table: of this layer alone."""
        checksums: dict[str, list[int]] = {}
        for field, values in table.items():
            for row, sequence in enumerate(sequences):
                self._arrays[field][self._rows[sequence]] = values[0, row]
            checksums[field] = [_crc(values[0, row]) for row in range(len(sequences))]
        return checksums

    def take(self, field: str, sequence: int, crc: int) -> NDArray[Any]:
        """(position, slot) of one sequence. Raises CorruptCapture where it is not what was put."""
        values: NDArray[Any] = self._arrays[field][self._rows[sequence]]
        if _crc(values) != crc:
            raise changed(self._path(field))
        return values

    def save(self) -> None:
        """Return when the disk has every row that was put."""
        for field, array in self._arrays.items():
            # the arrays are memory maps, which the dictionary's type does not say
            array.flush()  # type: ignore[attr-defined]
            with self._path(field).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(self._folder)

    def _open(self, field: str, shape: tuple[int, ...], *, write: bool) -> NDArray[Any]:
        path, dtype = self._path(field), FIELDS[field][0]
        try:
            if path.exists():
                found: NDArray[Any] = np.load(path, mmap_mode="r+" if write else "r", allow_pickle=False)
                if found.shape == shape and found.dtype == dtype:
                    return found
            if not write:
                raise changed(path)
            return np.lib.format.open_memmap(path, "w+", dtype, shape)
        except (ValueError, EOFError) as error:
            if not write:
                raise changed(path) from error
            path.unlink()
            return np.lib.format.open_memmap(path, "w+", dtype, shape)

    def _path(self, field: str) -> Path:
        return self._folder / f"table-{self._layer}-{field}.npy"


class LayerExperts:
    """Watches the experts of one layer, batch by batch."""

    def __init__(
        self,
        base: torch.nn.Module,
        info: ExpertsInfo,
        layer: int,
        layout: Layout,
        folder: Path,
        plan: Plan,
        own: ExpertSumsFile | None,
    ) -> None:
        """own: the capture's sums, None where routing alone is read."""
        shapes = layout.experts
        if shapes is None:
            raise ValueError("the capture reads no experts")
        one = replace(layout, experts=replace(shapes, layers=(layer,)))
        self._sums = LayerSums(folder, layer, own, shapes) if own is not None else None
        self._table = LayerTable(folder, layer, layout, plan, write=True)
        self._pass = ExpertPass(base, info, one, self._sums, self._put)
        self._checksums: dict[str, list[int]] = {}

    def begin(self, batch: Batch) -> None:
        self._pass.begin(batch)

    def finish(self) -> dict[str, list[int]]:
        """Check that the layer was seen; returns what the batch's line says of its table."""
        self._pass.finish()
        return self._checksums

    def save(self) -> None:
        """Return when the disk has the sums and the table of every batch so far. Raises OSError."""
        if self._sums is not None:
            self._sums.save()
        self._table.save()

    def detach(self) -> None:
        self._pass.detach()

    def _put(self, batch: Batch, table: Table) -> None:
        self._checksums = self._table.put(table, batch.sequences)


def sums_file(folder: Path, layer: int) -> Path:
    """Where the sums of a layer are kept."""
    return folder / f"sums-{layer}.npz"


def take_sums(folder: Path, shapes: ExpertShapes, own: ExpertSums) -> None:
    """Put the sums of every layer into the capture's own. Raises CorruptCapture."""
    for index, layer in enumerate(shapes.layers):
        path = sums_file(folder, layer)
        found = read_sums(path, replace(shapes, layers=(layer,))) if path.exists() else None
        if found is None:
            raise changed(path)
        own.put_layer(index, found)


def row_of_sequence(plan: Plan) -> dict[int, int]:
    """Sequence -> its row in the tables of a plan."""
    read = [sequence for run, reads in plan.batches if reads for sequence in run]
    return {sequence: row for row, sequence in enumerate(read)}


def _crc(values: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data.cast("B"))
