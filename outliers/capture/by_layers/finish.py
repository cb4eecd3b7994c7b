"""The end of a capture by layers: its lines become those of the capture's journal, and nothing else of it stays.

It needs no model, and can be done again after any interruption: the sums are put again, and sequences that are journaled are
left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from outliers.capture.by_layers.experts import LayerTable, take_sums
from outliers.capture.by_layers.record import Chunks, LayerRecord, discard
from outliers.capture.experts import ExpertSumsFile, write_table
from outliers.capture.forward import Batch
from outliers.capture.work import measure
from outliers.corpus.tokens import Corpus
from outliers.store.chunks import ChunkFiles, Journal
from outliers.study.expert_shapes import FIELDS


def finish(
    record: LayerRecord,
    journal: Journal,
    files: ChunkFiles,
    corpus: Corpus,
    experts: ExpertSumsFile | None,
    step: Callable[[str], None] = lambda _: None,
) -> None:
    """Journal every batch of a complete record. step: as `run` has it. Raises CorruptCapture, OSError."""
    shapes, plan = files.layout.experts, record.plan
    if experts is not None and shapes is not None:
        take_sums(record.folder, shapes, experts.sums)
        for run, read in plan.batches:
            if read:
                experts.finished(run)
        experts.save()
        step("the sums are saved")
    layers = shapes.layers if shapes is not None else ()
    tables = [LayerTable(record.folder, layer, files.layout, plan, write=False) for layer in layers]
    for number, (run, read) in enumerate(plan.batches):
        if not _journaled(run, journal, read=read):
            _journal(record, number, journal, files, corpus, tables)
            step(f"batch {number} is journaled")
    discard(files.root.parent)


def _journaled(run: range, journal: Journal, *, read: bool) -> bool:
    return all(s in journal.done and (read or "nll" in journal.done[s]) for s in run)


def _journal(
    record: LayerRecord, number: int, journal: Journal, files: ChunkFiles, corpus: Corpus, tables: list[LayerTable]
) -> None:
    """One batch: its chunks are on the disk, its table is written now."""
    run, read = record.plan.batches[number]
    lengths = tuple(int(length) for length in corpus.lengths[run.start : run.stop])
    perplexity = record.plan.perplexity
    # one result for each of table and losses; one more where there is neither, which is never counted
    batch = Batch(run, lengths, bool(tables) + perplexity, journal, files)
    if read:
        batch.written |= _chunks(record, number, files)
        if tables:
            write_table(batch, _table(record, number, files, tables))
    if perplexity:
        last = record.line(record.plan.layers - 1, number)
        measure(batch, [(nll, count) for nll, count in last["losses"]], read=read)
    if read and not tables and not perplexity:
        batch.finish()


def _chunks(record: LayerRecord, number: int, files: ChunkFiles) -> dict[tuple[str, int, int], Chunks]:
    run, _ = record.plan.batches[number]
    found: dict[tuple[str, int, int], Chunks] = {}
    for index, layer in enumerate(files.layout.layers):
        line = record.line(layer, number)
        for site in files.layout.stored:
            for row, sequence in enumerate(run):
                pairs = zip(line["crc32"][site][row], line["sizes"][site][row], strict=True)
                found[site, index, sequence] = list(pairs)
    return found


def _table(record: LayerRecord, number: int, files: ChunkFiles, tables: list[LayerTable]) -> dict[str, Any]:
    """The routing table of a batch: field -> (layer, sequence, position, slot)."""
    shapes, (run, _) = files.layout.experts, record.plan.batches[number]
    if shapes is None:
        raise ValueError("the capture reads no experts")
    found: dict[str, Any] = {}
    for field in shapes.fields:
        size = (len(tables), len(run), files.layout.positions, shapes.slots_of(field))
        values = np.empty(size, FIELDS[field][0])
        for index, (layer, table) in enumerate(zip(shapes.layers, tables, strict=True)):
            checksums = record.line(layer, number)["table"][field]
            for row, sequence in enumerate(run):
                values[index, row] = table.take(field, sequence, checksums[row])
        found[field] = values
    return found
