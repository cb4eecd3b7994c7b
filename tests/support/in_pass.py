"""Feeds the arrays of a synthetic capture to a counter as a model's hooks would."""

from __future__ import annotations

import math

import numpy as np
import torch

from outliers.counting.in_pass.counter import BatchMarks, PassShape
from outliers.counting.summary import Frame

SIGNED = {"bfloat16": np.int16, "float16": np.int16, "float32": np.int32}


def frame_and_shape(frame, batch, chunk_bytes, aliases=None):
    """A frame (None: of two layers, 8 features), and the shape with the spans of chunks of `chunk_bytes`."""
    frame = frame or Frame("s", "bfloat16", (("attn_in", 8), ("mlp_in", 8)), 2, 4, 6.0, (3.0, 6.0), "block")
    itemsize = 4 if frame.dtype == "float32" else 2
    widest = max(width for _, width in frame.widths)
    chunks = math.ceil(frame.positions * widest * itemsize / chunk_bytes)
    return frame, PassShape(batch, frame.positions, math.ceil(frame.positions / chunks), aliases or {})


def marks_of(sequence, positions):
    """(kind, position): what `synthetic` has for each kind of token, of a corpus of these positions a sequence; its words are
    starts of words."""
    ids = sequence * positions + np.arange(positions)
    special = np.isin(ids, (1, 3))
    delimiter = (np.arange(positions) % 5 == 0) & ~special
    none = np.zeros(positions, np.bool_)
    return np.stack([delimiter, special, none, ~delimiter & ~special, none])


def feed(way, frame, shape, acts, lengths, *, stop=0, **options):
    """(Summary, counts of the sequences) of a capture's arrays (layer, sequence, position, feature), batch by batch.

    stop: after that many sequences another counter goes on from the Summary of the first.
    """
    total, counts, size = None, [], shape.batch_sequences
    cut = stop // size * size
    for part in (range(cut), range(cut, len(lengths))):
        with way(frame, shape, begun=total, **options) as counter:
            for start in range(part.start, part.stop, size):
                rows = range(start, min(start + size, part.stop))
                _batch(counter, frame, rows, acts, lengths)
                counts += counter.take()
            total = counter.drain()
            counts += counter.take()
    return total, counts


def _batch(counter, frame, rows, acts, lengths):
    own = tuple(lengths[row] for row in rows)
    marks = np.stack([marks_of(row, frame.positions) for row in rows])
    counter.begin(BatchMarks(rows, own, lambda: marks))
    for layer in range(frame.num_layers):
        for site, values in acts.items():
            bits = values[layer, rows.start : rows.stop, : max(own)].copy()
            for number, length in enumerate(own):
                bits[number, length:] = bits.dtype.type(1)  # padding is never counted
            tensor = torch.from_numpy(bits.view(SIGNED[frame.dtype])).view(getattr(torch, frame.dtype))
            counter.submit((None, site, layer), tensor)
    counter.end()
