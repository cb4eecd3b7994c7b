"""Sums over tokens that no table holds: each expert's inputs by column and outputs by channel, added up in the forward pass.

They belong to a capture, whatever a study asks, so the magnitudes at which values are counted are fixed. Integers and
selections are the same in any order of batches; float64 sums are added in the order of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.experts.table import ExpertShapes

LADDER = (3.0, 4.5, 6.0, 8.0, 12.0, 20.0, 50.0, 100.0)
"""Magnitudes at which the values of `down_in` are counted."""
PATTERNS = 65_536
"""Bins of the histogram of `down_in`: signed 16-bit patterns of bfloat16 or float16; float32 rounded to bfloat16."""


@dataclass
class ExpertSums:
    """L layers, E routed experts, S shared ones, A = E + S, I and J their widths, H hidden dimensions, K magnitudes.

    sequences: (N,) int64, sorted. rows: (L, A) int64, tokens of each expert. nonfinite: (L, A) int64, values of its down_in that
    are not finite; the others are of the finite values. nonfinite_outputs: (L, A) int64, tokens whose output has a value that is
    not finite. total, squares: (L, E, I) float64; low, high: (L, E, I) float32, inf and
    -inf where nothing was finite; shared_*: the same, (L, S, J). hits: (K, L, A) int64, values with abs(x) >= LADDER[k].
    histogram: (L, 65536) int64 of the routed experts' down_in. energy: (L, A, H) float64, sum of squares of the weighted
    output; block: (L, H) float64, sum of squares of what the layer of experts adds to its residual stream.
    """

    shapes: ExpertShapes
    sequences: NDArray[np.int64]
    rows: NDArray[np.int64]
    nonfinite: NDArray[np.int64]
    nonfinite_outputs: NDArray[np.int64]
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    shared_total: NDArray[np.float64]
    shared_squares: NDArray[np.float64]
    shared_low: NDArray[np.float32]
    shared_high: NDArray[np.float32]
    hits: NDArray[np.int64]
    histogram: NDArray[np.int64]
    energy: NDArray[np.float64]
    block: NDArray[np.float64]

    @classmethod
    def zero(cls, shapes: ExpertShapes) -> ExpertSums:
        """The neutral element. All shared experts of a layer have one width."""
        layers, everyone = len(shapes.layers), shapes.all_experts
        own = (layers, shapes.experts, shapes.width)
        common = (layers, shapes.shared, max(shapes.shared_widths, default=0))
        return cls(
            shapes=shapes,
            sequences=np.zeros(0, np.int64),
            rows=np.zeros((layers, everyone), np.int64),
            nonfinite=np.zeros((layers, everyone), np.int64),
            nonfinite_outputs=np.zeros((layers, everyone), np.int64),
            total=np.zeros(own),
            squares=np.zeros(own),
            low=np.full(own, np.inf, np.float32),
            high=np.full(own, -np.inf, np.float32),
            shared_total=np.zeros(common),
            shared_squares=np.zeros(common),
            shared_low=np.full(common, np.inf, np.float32),
            shared_high=np.full(common, -np.inf, np.float32),
            hits=np.zeros((len(LADDER), layers, everyone), np.int64),
            histogram=np.zeros((layers, PATTERNS), np.int64),
            energy=np.zeros((layers, everyone, shapes.hidden)),
            block=np.zeros((layers, shapes.hidden)),
        )

    def of_layer(self, index: int) -> ExpertSums:
        """A copy of the sums of one layer, by its place among the layers, with the same sequences."""
        shapes = replace(self.shapes, layers=self.shapes.layers[index : index + 1])
        one: dict[str, Any] = {name: values.copy() for name, values in self._rows(index).items()}
        return ExpertSums(shapes=shapes, sequences=self.sequences.copy(), **one)

    def put_layer(self, index: int, other: ExpertSums) -> None:
        """Put the sums of one layer, as `of_layer` gives them, in the place of its own; the sequences stay."""
        rows = other._rows(0)
        for name, values in self._rows(index).items():
            values[:] = rows[name]

    def _rows(self, index: int) -> dict[str, NDArray[Any]]:
        """Views of every array but the sequences, cut to one layer."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("shapes", "sequences")}
        cut = slice(index, index + 1)
        return {name: values[:, cut] if name == "hits" else values[cut] for name, values in own.items()}

    def merged(self, other: ExpertSums) -> ExpertSums:
        """The sums of both sets of sequences, which are disjoint."""
        return self._joined(other, [None] * len(fields(self)))

    def joined(self, other: ExpertSums) -> ExpertSums:
        """The same, in the arrays of this one, which holds them all then: no third set is in memory."""
        return self._joined(other, [getattr(self, f.name) for f in fields(self)])

    def _joined(self, other: ExpertSums, into: list[Any]) -> ExpertSums:
        pick: dict[str, Any] = {
            "low": np.minimum,
            "high": np.maximum,
            "shared_low": np.minimum,
            "shared_high": np.maximum,
        }
        found: dict[str, Any] = {"sequences": np.sort(np.concatenate([self.sequences, other.sequences]))}
        for f, out in zip(fields(self), into, strict=True):
            if f.name not in ("shapes", "sequences"):
                found[f.name] = pick.get(f.name, np.add)(getattr(self, f.name), getattr(other, f.name), out=out)
        return ExpertSums(shapes=self.shapes, **found)
