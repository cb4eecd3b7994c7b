"""Captures with a made-up routing of experts, without a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from outliers.experts.count import count_experts
from outliers.experts.sums import ExpertSums
from outliers.experts.sums_files import sums_path, write_sums
from outliers.experts.table import FIELDS, MARGIN, ExpertShapes
from outliers.store.chunks import ChunkFiles, create_arrays
from outliers.store.durable import Unsynced
from outliers.study.layout import STORAGE, Layout

SHAPES = ExpertShapes(layers=(1, 2), experts=5, slots=2, width=6, shared_widths=(4,), hidden=8)
SEQUENCES, POSITIONS = 6, 40
LENGTHS = np.array([40, 1, 17, 40, 33, 8], np.int32)


def layout(shapes=SHAPES, dtype="float32"):
    return Layout(
        widths={"mlp_in": shapes.hidden},
        layers=(0, 1, 2),
        num_sequences=SEQUENCES,
        positions=POSITIONS,
        dtype=dtype,
        codec="none",
        chunk_bytes=POSITIONS * shapes.hidden * 2,
        experts=shapes,
    )


def made_up(shapes, rng, ties=True):
    """A table for every sequence: field -> (layer, sequence, position, slot), filled where there is no token."""
    table = {}
    for name in shapes.fields:
        dtype, fill = FIELDS[name]
        table[name] = np.full((len(shapes.layers), SEQUENCES, POSITIONS, shapes.slots_of(name)), fill, dtype)
    for layer in range(len(shapes.layers)):
        for sequence, length in enumerate(LENGTHS):
            for position in range(length):
                # expert 4 of the first layer is never chosen
                routed = rng.permutation(4 if layer == 0 else 5)[: shapes.slots]
                numbers = [*routed, *range(shapes.experts, shapes.all_experts)]
                at = layer, sequence, position
                table["expert"][at] = numbers
                table["expert_weight"][at] = rng.random(len(numbers), np.float32)
                table[MARGIN][at] = rng.random()
                if shapes.values:
                    values = rng.integers(1, 9, len(numbers)) if ties else rng.random(len(numbers)) * 100
                    table["expert_down_in"][at] = values
                    table["expert_down_in_column"][at] = rng.integers(0, 4, len(numbers))
                    table["expert_output"][at] = values[::-1]
                    table["expert_output_channel"][at] = rng.integers(0, 8, len(numbers))
                    if rng.random() < 0.05:
                        table["expert_output"][at] = np.nan
    return table


def made_sums(shapes, sequences, rng, table):
    sums = ExpertSums.zero(shapes)
    sums.sequences = np.array(sequences, np.int64)
    for sequence in sequences:
        for at in np.ndindex(len(shapes.layers), int(LENGTHS[sequence]), shapes.all_slots):
            sums.rows[at[0], table["expert"][at[0], sequence, at[1], at[2]]] += 1
    sums.total += rng.random(sums.total.shape)
    sums.low[:] = rng.random(sums.low.shape)
    sums.histogram[:, 77] = rng.integers(0, 9, 2)
    return sums


def count(capture, wanted=range(SEQUENCES)):
    folder, plan, lines, _, _, marks = capture
    rows = np.array(wanted)
    return count_experts("s", folder, plan, lines, wanted, LENGTHS[rows], marks[rows], lambda done: None)


def make_capture(kind, tmp_path):
    """A capture on disk with a made-up routing: its folder, layout, journal lines, table and the values of mlp_in."""
    rng = np.random.default_rng(0)
    shapes = SHAPES
    if kind == "routing":
        shapes = replace(SHAPES, values=False, shared_widths=())
    if kind == "applied":
        shapes = replace(SHAPES, applied=True)
    plan = layout(shapes, "bfloat16" if kind in ("bfloat16", "applied") else "float32")
    folder = tmp_path / "capture"
    folder.mkdir()
    ids = np.zeros((SEQUENCES, POSITIONS), np.int32)
    create_arrays(folder, plan, ids, LENGTHS)
    files, table = ChunkFiles(folder, plan), made_up(shapes, rng)
    single = rng.standard_normal((3, SEQUENCES, POSITIONS, shapes.hidden)).astype(np.float32)
    single[0, 0, 0, 0] = np.inf
    single[1, 2, 3, 1] = np.nan
    bits = (single.view(np.uint32) >> 16).astype(np.uint16)
    stored = single if plan.dtype == "float32" else bits
    exact = single if plan.dtype == "float32" else (bits.astype(np.uint32) << 16).view(np.float32)
    lines = {}
    unsynced = Unsynced(files.root)
    for sequence, length in enumerate(LENGTHS):
        crcs = {}
        for name in shapes.fields:
            crcs[name] = [files.write_table(name, sequence, table[name][:, sequence], unsynced)[0][0]]
        chunks = []
        for layer in range(3):
            values = np.ascontiguousarray(stored[layer, sequence, :length]).view(STORAGE[plan.dtype])
            chunks += files.write("mlp_in", layer, sequence, values, unsynced)
        crcs["mlp_in"] = np.array([crc for crc, _ in chunks], np.uint32)
        lines[sequence] = {"sequence": sequence, "crc32": crcs}
    unsynced.sync()
    if shapes.values:
        for number, span in enumerate((range(4), range(4, 6))):
            write_sums(sums_path(folder, span), made_sums(shapes, span, np.random.default_rng(number), table))
    marks = rng.random((SEQUENCES, 2, POSITIONS)) < 0.3
    return folder, plan, lines, table, exact, marks
