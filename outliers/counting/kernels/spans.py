"""Keys of a span's tokens over all layers, compiled: joined, counted as tokens with a hit, and searched for where hits sit.

A key says of a (feature, token) its largest magnitude, where that was, and its sign (`compiled.KEY_SHIFT`). All is integers or
selections in a total order. Knows arrays, nothing of threads. Before it: `kernel_hits`, which raises the keys. After it:
`accumulate`, which asks once every layer of a span was counted.
"""

from __future__ import annotations

import numpy as np

from outliers.counting.kernels.compiled import KEY_SHIFT, at_least, compiled


@compiled
def join(keys, others, columns):
    """Raise keys, (feature, position), to others in the named columns of features."""
    for j in columns:
        for t in range(keys.shape[1]):
            keys[j, t] = max(keys[j, t], others[j, t])


@compiled
def close(one, other, columns, limits, deciding, legacy, begins, counts, firsts, own, scratch):
    """Tokens with a hit in any layer, from the keys of one site, or of the two of the block.

    one, other: (feature, position) keys, the same array twice for a single site. columns: the features that have any.
    counts, firsts: (K, feature) int64, to which such tokens are added; firsts takes position 0 alone, where a sequence
    `begins`. own: (2, feature) int64, to which those at the limits `deciding` and `legacy` are added. scratch: (position,).
    """
    for j in columns:
        for t in range(scratch.size):
            scratch[t] = max(one[j, t], other[j, t]) >> KEY_SHIFT
        top = scratch.max()
        for k in range(limits.size):
            if top < limits[k]:
                break
            counts[k, j] += at_least(scratch, limits[k])
            if begins:
                firsts[k, j] += scratch[0] >= limits[k]
        own[0, j] += at_least(scratch, deciding)
        own[1, j] += at_least(scratch, legacy)


@compiled
def places(one, other, columns, deciding, floors, start, bin_positions, marks, bins, marked, keep, found, keys):
    """Where the hits of the deciding site sit.

    one, other, columns: as in `close`. deciding: the limit. floors: (feature,) int64, magnitudes below which a token can't
    be among a feature's largest any more. start: position of column 0. marks: (kind, position) bool. bins: (bin, feature)
    int64 and marked: (kind, feature) int64, to which tokens with a hit are added. found: (len(columns), keep) int64,
    overwritten with the positions of each feature's largest magnitudes, in order, -1 where there are no more; keys: the
    same shape, their keys.
    """
    scratch = np.empty(one.shape[1], one.dtype)
    for n in range(columns.size):
        j = columns[n]
        for t in range(scratch.size):
            scratch[t] = max(one[j, t], other[j, t])
        least = deciding << KEY_SHIFT
        count = 0
        for t in range(scratch.size):
            key = np.int64(scratch[t])
            if key < least:
                continue
            bins[(start + t) // bin_positions, j] += 1
            for kind in range(marks.shape[0]):
                marked[kind, j] += marks[kind, t]
            magnitude = key >> KEY_SHIFT
            if magnitude < floors[j] or (count == keep and magnitude <= keys[n, keep - 1] >> KEY_SHIFT):
                continue
            count = min(count + 1, keep)
            slot = count - 1
            while slot > 0 and np.int64(keys[n, slot - 1] >> KEY_SHIFT) < magnitude:
                found[n, slot], keys[n, slot] = found[n, slot - 1], keys[n, slot - 1]
                slot -= 1
            found[n, slot], keys[n, slot] = t, key
        found[n, count:] = -1
