"""What a capture by layers has done: `layers.jsonl`, in a folder that is there until the capture is journaled.

    <capture>/layers/plan.json        the batches, in order; sealed
    <capture>/layers/layers.jsonl     a line for each (layer, batch), the journal's class: sequence = layer x batches + batch
    <capture>/layers/hidden-*.bin     the spool
    <capture>/layers/sums-*.npz, table-*.npy    of a mixture of experts

A line names what it stands for: checksums of the batch's chunks in the layer, the spooled hidden state that the next layer
gets, and at the last layer the losses. It is appended once all that is on the disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliers.errors import CorruptCapture
from outliers.files.sealed import read_sealed, write_sealed
from outliers.store.captures import LAYER_LINES, LAYER_PLAN, LAYER_VERSION, LAYERS
from outliers.store.chunks import Journal

Chunks = list[tuple[int, int]]
"""(crc32, bytes) of each chunk of one sequence in one layer of one site."""


@dataclass(frozen=True)
class Plan:
    """asked: the sequences of the call. batches: each with whether its activations are read. layers: how many layers run. held:
    sequences that the sums of the experts held before. perplexity: whether losses are measured at the last layer."""

    asked: range
    batches: tuple[tuple[range, bool], ...]
    layers: int
    held: tuple[int, ...]
    perplexity: bool

    @property
    def units(self) -> int:
        """Pairs of a layer and a batch."""
        return self.layers * len(self.batches)

    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "version": LAYER_VERSION,
            "asked": [self.asked.start, self.asked.stop],
            "batches": [[run.start, run.stop, read] for run, read in self.batches],
            "layers": self.layers,
            "held": list(self.held),
            "perplexity": self.perplexity,
        }


class LayerRecord:
    """The lines of one plan. `folder`: with the spool in it."""

    def __init__(self, folder: Path, plan: Plan, journal: Journal) -> None:
        self.folder, self.plan, self._journal = folder, plan, journal

    @classmethod
    def begin(cls, capture: Path, plan: Plan) -> LayerRecord:
        """Go on with a record of the same plan, or begin one. Raises CorruptCapture for a damaged line."""
        folder = capture / LAYERS
        if read_sealed(folder / LAYER_PLAN) != plan.content():
            discard(capture)
            folder.mkdir()
            write_sealed(folder / LAYER_PLAN, plan.content())
        return cls(folder, plan, _lines(folder, _lean))

    @classmethod
    def complete(cls, capture: Path, asked: range) -> LayerRecord | None:
        """The record of a call whose layers are all done, with all of its lines; None where some are left.

        Raises CorruptCapture for a damaged line.
        """
        folder = capture / LAYERS
        content = read_sealed(folder / LAYER_PLAN)
        if content is None or content.get("version") != LAYER_VERSION or content["asked"] != [asked.start, asked.stop]:
            return None
        plan = Plan(
            asked,
            tuple((range(start, stop), bool(read)) for start, stop, read in content["batches"]),
            content["layers"],
            tuple(content["held"]),
            content["perplexity"],
        )
        journal = _lines(folder)
        return cls(folder, plan, journal) if len(journal.done) == plan.units else None

    @property
    def done(self) -> int:
        """Pairs of a layer and a batch that are journaled."""
        return len(self._journal.done)

    @property
    def width(self) -> int | None:
        """How many values a layer returns, None for a bare tensor; known once a batch of layer 0 is journaled."""
        return next((line["width"] for line in self._journal.done.values()), None)

    def has(self, layer: int, batch: int) -> bool:
        """Whether a batch is done in a layer."""
        return self._number(layer, batch) in self._journal.done

    def left(self, layer: int) -> list[int]:
        """Numbers of the batches that a layer has not run on."""
        return [batch for batch in range(len(self.plan.batches)) if not self.has(layer, batch)]

    def line(self, layer: int, batch: int) -> dict[str, Any]:
        """The line of a batch in a layer."""
        return self._journal.done[self._number(layer, batch)]

    def append(self, layer: int, lines: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Journal batches of a layer, each with its line, in one durable write. What they name is on the disk before."""
        self._journal.append([line | {"sequence": self._number(layer, batch)} for batch, line in lines])

    def _number(self, layer: int, batch: int) -> int:
        return layer * len(self.plan.batches) + batch


def _lines(folder: Path, keep: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Journal:
    path = folder / LAYER_LINES
    try:
        return Journal.open(path, repair=True, keep=keep)
    except CorruptCapture as error:
        raise changed(path) from error


def discard(capture: Path) -> None:
    """Remove what a capture by layers has left, if there is any; the plan first, so that nothing half removed is believed."""
    folder = capture / LAYERS
    (folder / LAYER_PLAN).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def changed(path: Path) -> CorruptCapture:
    """The error for a file of the folder that is not what was written there."""
    return CorruptCapture(
        f"{path} changed after it was written, or is missing: remove the folder {path.parent}, and the same study begins "
        "again at the first layer"
    )


def _lean(line: dict[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in ("hidden", "width") if name in line}
