"""Compiled loops over the keys of a span's tokens over all layers: joined, counted as tokens with a hit, and searched.

A key says of a (feature, token) its largest magnitude, the source of it, and its sign (`arguments.KEY_SHIFT`). All results are
integers or selections in a total order. Knows arrays, nothing of threads.
"""

from __future__ import annotations

import numpy as np

from outliers.counting.kernels.arguments import KEY_SHIFT, Limits, Positions, SpanKeys, TopTokens, Union
from outliers.counting.kernels.compiled import at_least, compiled


@compiled
def join(keys, others, columns):
    """Raise keys, (feature, position), to others in the given columns of features."""
    for j in columns:
        for t in range(keys.shape[1]):
            keys[j, t] = max(keys[j, t], others[j, t])


def count_union(span: SpanKeys, limits: Limits, begins: bool, union: Union) -> None:
    """Count tokens with a hit in any layer, from the keys of one site or of the two of the block.

    begins: whether column 0 is the first token of a sequence. union: added to.
    """
    _count_union(tuple(span), tuple(limits), begins, tuple(union))


@compiled
def _count_union(span, limits, begins, union):
    span, limits, union = SpanKeys(*span), Limits(*limits), Union(*union)
    ladder, magnitudes = limits.ladder, np.empty(span.one.shape[1], np.uint32)
    for j in span.columns:
        for t in range(magnitudes.size):
            magnitudes[t] = max(span.one[j, t], span.other[j, t]) >> KEY_SHIFT
        top = magnitudes.max()
        for k in range(ladder.size):
            if top < ladder[k]:
                break
            union.hits[k, j] += at_least(magnitudes, ladder[k])
            if begins:
                union.first_hits[k, j] += magnitudes[0] >= ladder[k]
        union.own[0, j] += at_least(magnitudes, limits.deciding)
        union.own[1, j] += at_least(magnitudes, limits.legacy)


def find_top_tokens(span: SpanKeys, limits: Limits, positions: Positions, top: TopTokens) -> None:
    """Find where the hits of the deciding site are, and its tokens of largest magnitude.

    positions: added to. top: overwritten.
    """
    _find_top_tokens(tuple(span), tuple(limits), tuple(positions), tuple(top))


@compiled
def _find_top_tokens(span, limits, positions, top):
    span, limits, positions, top = SpanKeys(*span), Limits(*limits), Positions(*positions), TopTokens(*top)
    scratch = np.empty(span.one.shape[1], span.one.dtype)
    keep, least = top.columns.shape[1], limits.deciding << KEY_SHIFT
    for n in range(span.columns.size):
        j = span.columns[n]
        for t in range(scratch.size):
            scratch[t] = max(span.one[j, t], span.other[j, t])
        count = 0
        for t in range(scratch.size):
            key = np.int64(scratch[t])
            if key < least:
                continue
            positions.bins[(positions.start + t) // positions.bin_positions, j] += 1
            for kind in range(positions.marks.shape[0]):
                positions.marked[kind, j] += positions.marks[kind, t]
            magnitude = key >> KEY_SHIFT
            if magnitude < top.floors[j] or (count == keep and magnitude <= top.keys[n, keep - 1] >> KEY_SHIFT):
                continue
            count = min(count + 1, keep)
            slot = count - 1
            while slot > 0 and np.int64(top.keys[n, slot - 1] >> KEY_SHIFT) < magnitude:
                top.columns[n, slot], top.keys[n, slot] = top.columns[n, slot - 1], top.keys[n, slot - 1]
                slot -= 1
            top.columns[n, slot], top.keys[n, slot] = t, key
        top.columns[n, count:] = -1
