"""Compiled loops over the tensors of some experts, one call for all of them: a call costs more than a small expert's values.

A tensor is given by the address of its first value; whoever calls keeps it alive and has checked its shape, dtype and order.
numba compiles the loops once on a machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numba import carray  # type: ignore[attr-defined]  # numba's documented name, which it doesn't list
from numba.core import cgutils, types
from numba.extending import intrinsic

from outliers.compiling import compiler
from outliers.experts import kernels, order_kernels
from outliers.experts.kernels import add_inputs, add_outputs
from outliers.experts.order_kernels import order_rows

compiled = compiler([Path(__file__), Path(kernels.__file__), Path(order_kernels.__file__)])

ROWS, TOKENS, PICKS, INPUTS, OUTPUTS = range(5)
"""Columns of what is given of an expert: how many rows, and the addresses of its tensors."""
ALL, OUT_OF_ORDER, NOT_ITS_OWN = range(3)
"""What `order_experts` finds."""


@intrinsic
def _pointer(_context, address):
    """An integer as a pointer; numba has none. It reads the memory at that address, whatever lies there."""

    def code(_, builder, __, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), code


@compiled
def order_experts(chosen, given, batch, own, state, numbers):
    """Sort the slots of some experts, as `order_rows` does one after the other.

    chosen: (T, k) int64, experts of each token. given: (n, 5) int64, see ROWS. batch: lengths, (sequence,) int64, and positions.
    own: starts, (E + 1,) int64, places and slots, (T x k,) int64. state: (3,) int64, the next expert that may come, the rows that
    came, and the place in `given` of what is wrong. numbers: (n,) int64, set to the experts. Returns ALL, or why not.
    """
    starts, places, slots = own
    experts = starts.size - 1
    for n in range(len(given)):
        rows, state[2] = given[n, ROWS], n
        tokens = carray(_pointer(given[n, TOKENS]), (rows,), np.int64)
        picks = carray(_pointer(given[n, PICKS]), (rows,), np.int64)
        expert = -1
        if 0 <= tokens[0] < chosen.shape[0] and 0 <= picks[0] < chosen.shape[1]:
            expert = chosen[tokens[0], picks[0]]
        numbers[n] = expert
        if expert < state[0] or expert >= experts:
            return OUT_OF_ORDER
        filled = starts[state[0]]
        starts[state[0] : expert + 1] = filled
        end = order_rows(chosen, expert, (tokens, picks), batch, (places, slots), filled)
        if end < 0:
            return NOT_ITS_OWN
        starts[expert + 1] = end
        state[0] = expert + 1
        state[1] += rows
    return ALL


@compiled
def add_experts(given, numbers, piece, values, tile, order, weights, arrays, histogram, counted, largest):
    """Add the inputs and outputs of the experts of a piece, as `add_inputs` and `add_outputs` do.

    given, numbers: as `order_experts` has them. piece: the first of them and the one behind the last. values: of the inputs,
    then of the outputs: an empty array of the dtype of their bits, their kind, and `limits`. tile, weights, histogram: as
    `add_inputs` and `add_outputs` take them. order: slots, places and starts. arrays: sums, extremes and counts, counted: energy
    and rows, both of all experts. largest: of the inputs, of the outputs.
    """
    bits, kind, limits = values[0]
    other_bits, other_kind, other_limits = values[1]
    sums, extremes, counts = arrays
    for n in range(piece[0], piece[1]):
        rows, span = given[n, ROWS], (numbers[n], numbers[n] + 1)
        inputs = carray(_pointer(given[n, INPUTS]), (rows, sums[0].shape[1]), bits.dtype)
        add_inputs((inputs, kind), limits, order, span, tile, sums, extremes, counts, histogram, largest[0])
        outputs = carray(_pointer(given[n, OUTPUTS]), (rows, counted[0].shape[1]), other_bits.dtype)
        add_outputs((outputs, other_kind), other_limits[0], weights, order, span, counted, largest[1])
