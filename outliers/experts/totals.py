"""The experts of a study: what the routing table and the sums of its sequences say, as a commutative monoid.

Part of the private summary (`experts.npz`); `merged` joins the totals of disjoint sequences. Integers and selections are
bit-identical under any order; the sums agree to 1e-12. Results are made from this alone, never from a capture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.errors import SummaryMismatch
from outliers.experts.sums import PATTERNS, ExpertSums
from outliers.experts.table import ExpertShapes

WEIGHT_UNITS = 1 << 40
"""Routing weights are added up as integers in units of 2^-40, so that their sum does not depend on an order. Whole numbers are
carried over: 64 bits of units alone would overflow after 2^23 tokens of weight 1."""
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

PLACES = {"down_in": "column", "output": "channel"}
"""What is largest of an expert -> what names its place."""


def largest_outputs(outputs: NDArray[Any]) -> NDArray[Any]:
    """The OUTPUTS_KEPT largest outputs of each layer, in a total order: of equal ones the first token's and expert's."""
    order = np.lexsort(
        (outputs["expert"], outputs["position"], outputs["sequence"], -outputs["magnitude"], outputs["layer"])
    )
    outputs = outputs[order]
    if not outputs.size:
        return outputs
    starts = np.flatnonzero(np.r_[True, np.diff(outputs["layer"]) != 0])
    rank = np.arange(outputs.size) - np.repeat(starts, np.diff(np.r_[starts, outputs.size]))
    return outputs[rank < OUTPUTS_KEPT]


@dataclass
class ExpertTotals:
    """L layers with experts, E routed experts, S shared ones, A = E + S, N sequences, H hidden dimensions.

    sequences: (N,) int64 sorted; lengths: (N,) int64. per_sequence: (N, L, A)
    int32, tokens that reached an expert. weight_whole, weight_units: (L, A) int64, sum of the weights: a whole number, and less
    than 1 in units of 2^-40; weight_lost: (L, A) int64, tokens whose weight is not finite, and in no sum. by_kind: (3, L, A)
    int64, see KINDS. kinds: (3,) int64, tokens of each kind. down_in_max: (L, A) float32, NaN where no token came or nothing was
    finite, with down_in_column, down_in_sequence, down_in_position (L, A) int64, -1 there; output_max likewise with
    output_channel, output_sequence, output_position. Where equal values are largest, the first sequence and position decides.
    first_row: (L, A) float32, the largest output of the first token of each sequence that reached the expert, NaN where none did.
    margins: (L, 65536) int64, router margins by the upper 16 bits of their float32. outputs: OUTPUT, the OUTPUTS_KEPT largest of
    each layer in a total order. sums: of the same sequences, None where routing alone is read. input_squares: (L, E, H) float64,
    sum of squares of the experts' input by column, None where mlp_in is not stored or routing alone is read.
    """

    study_id: str
    shapes: ExpertShapes
    sequences: NDArray[np.int64]
    lengths: NDArray[np.int64]
    per_sequence: NDArray[np.int32]
    weight_whole: NDArray[np.int64]
    weight_units: NDArray[np.int64]
    weight_lost: NDArray[np.int64]
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

    @classmethod
    def zero(cls, study_id: str, shapes: ExpertShapes) -> ExpertTotals:
        """The neutral element; without sums and inputs."""
        own = (len(shapes.layers), shapes.all_experts)
        return cls(
            study_id=study_id,
            shapes=shapes,
            sequences=np.zeros(0, np.int64),
            lengths=np.zeros(0, np.int64),
            per_sequence=np.zeros((0, *own), np.int32),
            weight_whole=np.zeros(own, np.int64),
            weight_units=np.zeros(own, np.int64),
            weight_lost=np.zeros(own, np.int64),
            by_kind=np.zeros((len(KINDS), *own), np.int64),
            kinds=np.zeros(len(KINDS), np.int64),
            down_in_max=np.full(own, np.nan, np.float32),
            down_in_column=np.full(own, -1, np.int64),
            down_in_sequence=np.full(own, -1, np.int64),
            down_in_position=np.full(own, -1, np.int64),
            output_max=np.full(own, np.nan, np.float32),
            output_channel=np.full(own, -1, np.int64),
            output_sequence=np.full(own, -1, np.int64),
            output_position=np.full(own, -1, np.int64),
            first_row=np.full(own, np.nan, np.float32),
            margins=np.zeros((own[0], PATTERNS), np.int64),
            outputs=np.zeros(0, OUTPUT),
            sums=None,
            input_squares=None,
        )

    def take(
        self,
        name: str,
        index: NDArray[np.int64],
        values: NDArray[np.float32],
        places: NDArray[np.int64],
        sequences: Any,
        positions: NDArray[np.int64],
    ) -> None:
        """Take over values that are the largest so far, each with its place; of equal ones the first token's stays.

        name: `down_in` or `output`. index: of the experts in (L, A), flat, each once. values: finite.
        """
        largest, where, first, at = (
            getattr(self, f"{name}_{part}").reshape(-1) for part in ("max", PLACES[name], "sequence", "position")
        )
        owner = np.broadcast_to(np.asarray(sequences, np.int64), index.shape)
        known = np.nan_to_num(largest[index], nan=-np.inf)
        earlier = (owner < first[index]) | ((owner == first[index]) & (positions < at[index]))
        better = np.isfinite(values) & ((values > known) | ((values == known) & earlier))
        chosen = index[better]
        largest[chosen], where[chosen] = values[better], places[better]
        first[chosen], at[chosen] = owner[better], positions[better]

    def carry(self) -> None:
        """Move what is 1 or more of the units to the whole numbers: one sum has one form."""
        self.weight_whole += self.weight_units // WEIGHT_UNITS
        self.weight_units %= WEIGHT_UNITS

    def merged(self, other: ExpertTotals) -> ExpertTotals:
        """The totals of both sets of sequences. Raises SummaryMismatch for other studies or a shared sequence."""
        if (self.study_id, self.shapes) != (other.study_id, other.shapes):
            raise SummaryMismatch(f"the experts of study {self.study_id} do not merge with those of {other.study_id}")
        sequences = np.concatenate([self.sequences, other.sequences])
        order = np.argsort(sequences, kind="stable")
        if np.any(np.diff(sequences[order]) == 0):
            raise SummaryMismatch("a sequence is in the experts of both summaries: each sequence counts once")
        found = ExpertTotals.zero(self.study_id, self.shapes)
        found.sequences = sequences[order]
        for name in ("lengths", "per_sequence"):
            setattr(found, name, np.concatenate([getattr(self, name), getattr(other, name)])[order])
        for name in ("weight_whole", "weight_units", "weight_lost", "by_kind", "kinds", "margins"):
            setattr(found, name, getattr(self, name) + getattr(other, name))
        found.carry()
        for part in (self, other):
            for name, place in PLACES.items():
                parts = [getattr(part, f"{name}_{p}").reshape(-1) for p in ("max", place, "sequence", "position")]
                index = np.flatnonzero(~np.isnan(parts[0]))
                found.take(name, index, *(values[index] for values in parts))
        found.first_row = np.fmax(self.first_row, other.first_row)
        found.outputs = largest_outputs(np.concatenate([self.outputs, other.outputs]))
        found.sums = self.sums.merged(other.sums) if self.sums is not None and other.sums is not None else None
        if self.input_squares is not None and other.input_squares is not None:
            found.input_squares = self.input_squares + other.input_squares
        return found

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens that reached each expert, (L, A)."""
        return np.asarray(self.per_sequence.sum(axis=0, dtype=np.int64))
