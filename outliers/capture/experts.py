"""The experts of a capture: watched in the forward pass, their routing stored with each sequence, their sums saved now and then.

The sums hold the first batches of a reading, in order, so an interrupted reading that goes on adds the others in the same
order and ends bit for bit as an uninterrupted one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from outliers.capture.forward import Batch
from outliers.compiling import is_cached
from outliers.experts.add import add_layer
from outliers.experts.kernels import add_outputs
from outliers.experts.record import Give
from outliers.experts.routed import Routed, Routing
from outliers.experts.routing import add_routing
from outliers.experts.stream import ExpertStream
from outliers.experts.stream_kernels import add_experts
from outliers.experts.sums import ExpertSums
from outliers.experts.sums_files import choose, read_sums, sums_path, write_sums
from outliers.experts.table import FIELDS, ExpertShapes
from outliers.experts.watch import ExpertWatch
from outliers.model.experts import ExpertsInfo
from outliers.study.layout import Layout

log = logging.getLogger(__name__)

COMPILING = "compiling the loops that add up experts: once on this machine, about half a minute"
SAVE_SECONDS = 30.0
SAVE_SHARE = 20
"""The sums are saved at most every SAVE_SECONDS, and at most every SAVE_SHARE times as long as saving them took."""


class ExpertSumsFile:
    """The sums of one reading, and which sequences are in them or in another file of the capture.

    `files`: those whose sums count, its own among them where it is there.
    """

    def __init__(self, folder: Path, shapes: ExpertShapes, wanted: range) -> None:
        self.path, own = sums_path(folder, wanted), ExpertSums.zero(shapes)
        self.files: set[Path] = set()
        others: set[int] = set()
        for path, sums in choose(folder, shapes, wanted):
            self.files.add(path)
            if path == self.path:
                own = sums
            else:
                others |= set(sums.sequences.tolist())
        self._begin(own, others)

    @classmethod
    def of_share(
        cls, folder: Path, shapes: ExpertShapes, span: range, held: tuple[int, ...], *, goes_on: bool
    ) -> ExpertSumsFile:
        """The sums that one of several processes makes: of the sequences `span`, where `held` are in sums already.

        goes_on: whether those in the file of the span are among them; otherwise that file is replaced.
        """
        made = cls.__new__(cls)
        made.path, made.files = sums_path(folder, span), set()
        found = read_sums(made.path, shapes) if goes_on else None
        made._begin(found or ExpertSums.zero(shapes), set(held))
        return made

    def _begin(self, own: ExpertSums, others: set[int]) -> None:
        self.sums = own
        self._held = others | set(own.sequences.tolist())
        self._saved = time.monotonic()
        self._took = 0.0
        self._changed = False

    def holds(self, sequence: int) -> bool:
        """Whether the values of a sequence are in the sums."""
        return sequence in self._held

    def finished(self, sequences: range) -> None:
        """Note that all values of a batch are in the sums; saves them where that is due."""
        self.sums.sequences = np.union1d(self.sums.sequences, np.array(sequences, np.int64))
        self._held |= set(sequences)
        self._changed = True
        if time.monotonic() - self._saved >= max(SAVE_SECONDS, SAVE_SHARE * self._took):
            self.save()

    def save(self) -> None:
        """Write the sums, where they have changed. Raises OSError."""
        if not self._changed:
            return
        began = time.monotonic()
        write_sums(self.path, self.sums)
        self._changed, self._saved = False, time.monotonic()
        self._took = self._saved - began


class Sums(Protocol):
    """The sums to which a reading adds: of all layers (`ExpertSumsFile`), or of one."""

    @property
    def sums(self) -> ExpertSums:
        """What a batch is added to."""

    def holds(self, sequence: int) -> bool:
        """Whether the values of a sequence are in them."""

    def finished(self, sequences: range) -> None:
        """Told when all values of a batch are in them."""


Table = dict[str, NDArray[Any]]
"""The routing table of a batch: field -> (layer, sequence, position, slot), padding included."""


class ExpertPass:
    """Watches the experts of a model while batches run, and hands on their table.

    `begin` before a forward pass, `finish` after it: that adds the batch to the sums and gives its table to `put`, which by
    default writes it to the capture.
    """

    def __init__(
        self,
        base: torch.nn.Module,
        info: ExpertsInfo,
        layout: Layout,
        kept: Sums | None,
        put: Callable[[Batch, Table], None] | None = None,
    ) -> None:
        """kept: None where routing alone is read."""
        if layout.experts is None:
            raise ValueError("the capture reads no experts")
        self.shapes, self.layout, self.kept, self._told = layout.experts, layout, kept, False
        if not self.shapes.values:
            info = info.model_copy(update={"watch": "routing", "reason": "by choice"})
        elif not is_cached(add_outputs):
            log.info(COMPILING)
            self._told = True
        self._index = {layer: number for number, layer in enumerate(self.shapes.layers)}
        begin = self._begin_layer if kept is not None else None
        self._watch = ExpertWatch(base, info, self.shapes.layers, self._take, begin)
        self._batch: Batch | None = None
        self._put = put or write_table
        self._table: Table = {}
        self._sums: ExpertSums | None = None
        self._spare: ExpertSums | None = None
        self._stream: ExpertStream | None = None

    def begin(self, batch: Batch) -> None:
        """Watch the next forward pass, which is of this batch."""
        shape = (len(self.shapes.layers), len(batch.sequences), self.layout.positions)
        self._table = {
            field: np.full((*shape, self.shapes.slots_of(field)), FIELDS[field][1], FIELDS[field][0])
            for field in self.shapes.fields
        }
        self._batch = batch
        # a batch is in the sums whole or not at all
        known = self.kept is None or all(self.kept.holds(sequence) for sequence in batch.sequences)
        self._sums = None if self.kept is None or known else self.kept.sums
        self._stream = None
        self._watch.start(len(batch.sequences), batch.positions)

    def finish(self) -> None:
        """Check that every layer was seen, note the batch in the sums and hand on its table. Raises SiteError, OSError."""
        self._watch.end()
        batch = self._batch
        if batch is None:
            raise ValueError("no batch was begun")
        if self.kept is not None and self._sums is not None:
            self.kept.finished(batch.sequences)
        table, self._batch, self._table = self._table, None, {}
        self._put(batch, table)

    def detach(self) -> None:
        """Take the hooks off the model."""
        self._watch.detach()

    def _begin_layer(self, routing: Routing) -> Give:
        """What takes the experts of a layer one by one."""
        batch = self._running()
        sums, index = self._into(routing.layer)
        if not self._told and not is_cached(add_experts):
            log.info(COMPILING)
        self._told = True
        self._stream = ExpertStream(sums, index, routing, batch.lengths, batch.positions)
        return self._stream.add

    def _take(self, routed: Routed) -> None:
        batch, stream = self._running(), self._stream
        self._stream = None
        views = {field: values[:, :, : batch.positions] for field, values in self._table.items()}
        if self.kept is None:
            add_routing(views, self._index[routed.layer], routed, batch.lengths, batch.positions)
            return
        sums, index = self._into(routed.layer)
        if self._sums is None:
            own = self._index[routed.layer]
            views = {field: values[own : own + 1] for field, values in views.items()}
        add_layer(sums, views, index, routed, batch.lengths, batch.positions, None, stream)

    def _running(self) -> Batch:
        if self._batch is None:
            raise ValueError("experts ran outside of a batch")
        return self._batch

    def _into(self, layer: int) -> tuple[ExpertSums, int]:
        """The sums that a layer is added to, and its index in them."""
        if self._sums is not None:
            return self._sums, self._index[layer]
        # of a batch whose values are in the sums already: only its table is written again, and the sums go nowhere
        one = replace(self.shapes, layers=self.shapes.layers[:1])
        self._spare = self._spare or ExpertSums.zero(one)
        return self._spare, 0


def write_table(batch: Batch, table: Table) -> None:
    """Write the routing table of each sequence of a batch to the capture, and tell the batch. Raises OSError."""
    written = {
        (field, 0, sequence): batch.files.write_table(field, sequence, values[:, row], batch.unsynced())
        for row, sequence in enumerate(batch.sequences)
        for field, values in table.items()
    }
    if batch.add_table(written):
        batch.finish()
