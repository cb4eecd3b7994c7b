"""Compiled loops that put the slots of tokens in the order of their experts. numba compiles them once on a machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from outliers.compiling import compiler

compiled = compiler([Path(__file__)])


@compiled
def order_slots(experts, rows, lengths, positions, starts, slots, places):
    """Sort the slots of all tokens but padding by (expert, token, slot); returns whether each slot has one row, and one expert.

    experts: (T, k) int64. rows: (R,) int64, the slot of each row. lengths: (sequence,) int64. starts: (E + 1,) int64, set to
    where each expert's slots begin in `slots`, (T x k,) int64. places: (T x k,) int64, set to the row of each slot.
    """
    tokens, k = experts.shape
    count = starts.size - 1
    places[:] = -1
    for r in range(rows.size):
        if rows[r] < 0 or rows[r] >= places.size or places[rows[r]] != -1:
            return False
        places[rows[r]] = r
    starts[:] = 0
    for t in range(tokens):
        for n in range(k):
            if experts[t, n] < 0 or experts[t, n] >= count:
                return False
            if t % positions < lengths[t // positions]:
                starts[experts[t, n] + 1] += 1
    for e in range(count):
        starts[e + 1] += starts[e]
    filled = starts[:-1].copy()
    for t in range(tokens):
        if t % positions < lengths[t // positions]:
            for n in range(k):
                slots[filled[experts[t, n]]] = t * k + n
                filled[experts[t, n]] += 1
    return True


@compiled
def order_rows(experts, expert, rows, batch, order, filled):
    """Note the rows of one expert, and sort its slots but those of padding by token behind the first `filled` of `slots`.

    experts: (T, k) int64. rows: tokens and picks, (R,) int64, which slot of which token each row is. batch: lengths,
    (sequence,) int64, and positions. order: places, (T x k,) int64, -1 where a slot has no row yet, and slots. Returns where the
    slots end; -1 if a row is another expert's, or comes twice.
    """
    tokens, picks = rows
    lengths, positions = batch
    places, slots = order
    count, k = experts.shape
    found = np.empty(tokens.size, np.int64)
    end = 0
    for r in range(tokens.size):
        t, n = tokens[r], picks[r]
        if t < 0 or t >= count or n < 0 or n >= k or experts[t, n] != expert or places[t * k + n] != -1:
            return -1
        places[t * k + n] = r
        if t % positions < lengths[t // positions]:
            found[end] = t * k + n
            end += 1
    slots[filled : filled + end] = np.sort(found[:end])
    return filled + end
