"""The experts of a study: what the routing table and the sums of its sequences say, as a commutative monoid.

Part of the private summary (`experts.npz`); `merged` joins the totals of disjoint sequences. Integers and selections are
bit-identical under any order; the sums agree to 1e-12. Results are made from this alone, never from a capture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.experts.sums import ExpertSums
from outliers.experts.table import ExpertShapes

WEIGHT_UNITS = 1 << 40
"""Routing weights are added up as integers in units of 2^-40, so that their sum does not depend on an order."""
KINDS = ("first", "delimiter", "special")
"""Kinds of tokens that are counted apart: the first of a sequence, delimiters, special tokens."""
OUTPUTS_KEPT = 256
"""Largest outputs that are kept for each layer, with their tokens."""
OUTPUT = np.dtype(
    [
        ("layer", "<i4"),
        ("expert", "<i4"),
        ("sequence", "<i4"),
        ("position", "<i4"),
        ("channel", "<i4"),
        ("magnitude", "<f4"),
        ("weight", "<f4"),
    ]
)
"""The largest magnitude of one expert's output for one token. `layer` is an index into the layers with experts, `expert` one of
A (the routed ones, then the shared ones), `magnitude` is before the weight (Llama4: with it)."""


@dataclass
class ExpertTotals:
    """L layers with experts, E routed experts, S shared ones, A = E + S, N sequences, H hidden dimensions.

    applied: whether outputs hold their weight already. sequences: (N,) int64 sorted; lengths: (N,) int64. per_sequence: (N, L, A)
    int64, tokens that reached an expert. weight_units: (L, A) int64, sum of the weights in units of 2^-40. by_kind: (3, L, A)
    int64, see KINDS. kinds: (3,) int64, tokens of each kind. down_in_max: (L, A) float32, NaN where no token came or nothing was
    finite, with down_in_column, down_in_sequence, down_in_position (L, A) int64, -1 there; output_max likewise with
    output_channel, output_sequence, output_position. Where equal values are largest, the first sequence and position decides.
    first_row: (L, A) float32, the largest output of the first token of each sequence that reached the expert, NaN where none did.
    margins: (L, 65536) int64, router margins by the upper 16 bits of their float32. outputs: OUTPUT, the OUTPUTS_KEPT largest of
    each layer in a total order. sums: of the same sequences, None where routing alone is read. input_squares: (L, E, H) float64, sum of squares of the experts'
    input by column, and None where mlp_in is not stored.
    """

    study_id: str
    shapes: ExpertShapes
    applied: bool
    sequences: NDArray[np.int64]
    lengths: NDArray[np.int64]
    per_sequence: NDArray[np.int64]
    weight_units: NDArray[np.int64]
    by_kind: NDArray[np.int64]
    kinds: NDArray[np.int64]
    down_in_max: NDArray[np.float32]
    down_in_column: NDArray[np.int64]
    down_in_sequence: NDArray[np.int64]
    down_in_position: NDArray[np.int64]
    output_max: NDArray[np.float32]
    output_channel: NDArray[np.int64]
    output_sequence: NDArray[np.int64]
    output_position: NDArray[np.int64]
    first_row: NDArray[np.float32]
    margins: NDArray[np.int64]
    outputs: NDArray[Any]
    sums: ExpertSums | None
    input_squares: NDArray[np.float64] | None

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens that reached each expert, (L, A)."""
        return self.per_sequence.sum(axis=0)
