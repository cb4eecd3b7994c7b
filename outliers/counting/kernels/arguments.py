"""What the compiled loops are given, as NamedTuples of arrays and numbers.

numba finds the type of a plain tuple in C and the type of a NamedTuple in Python, which takes about 1 us for each array of
it. So the functions that Python calls take NamedTuples, pass plain tuples to a compiled function of the same name with an
underscore, and that one makes NamedTuples of them again, for nothing. Knows no loops, and no numba.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

KEY_SHIFT = 17
"""A key is magnitude << 17 | (65535 - source) << 1 | sign: the largest has the largest magnitude, of the first source."""
LAST_SOURCE = 0xFFFF
BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
"""Kinds of value: how bits become numbers."""


class Limits(NamedTuple):
    """The bits that magnitudes are compared with, in one dtype.

    kind: BFLOAT16, FLOAT16 or FLOAT32. infinity: its bits. ladder: (K,) int64, ascending. floor: the least magnitude that is
    counted anywhere, at most ladder[0]. deciding: of the study. legacy: of the rule that rounds to bfloat16 first. massive:
    massive activations exceed it.
    """

    kind: int
    infinity: int
    ladder: NDArray[np.int64]
    floor: int
    deciding: int
    legacy: int
    massive: int


class Counters(NamedTuple):
    """What is counted of one layer of a span, at one site or at the two of the block. W features, K magnitudes.

    extremes: (2, 2, W) int16 or int32, least and greatest finite value of each site, as `tile._ordered` integers. moments:
    (2, 4, W) float64, sums of x, x^2, x^3, x^4. histograms: (2, 65536) uint32, by pattern. nonfinite: (2, W) int64. hits:
    (3, K, W) uint32, of both sites, and third of the cells that are hits at both; first_hits: the same of the first token of
    a sequence.
    """

    extremes: NDArray[Any]
    moments: NDArray[np.float64]
    histograms: NDArray[np.uint32]
    nonfinite: NDArray[np.int64]
    hits: NDArray[np.uint32]
    first_hits: NDArray[np.uint32]


class Scratch(NamedTuple):
    """Arrays that each tile overwrites.

    tops: (2, W), bits of the tile's largest magnitudes, left for the caller. floats: (GROUP, W) float32. transposed:
    (2, LANES, rows), columns of the tile as rows.
    """

    tops: NDArray[Any]
    floats: NDArray[np.float32]
    transposed: NDArray[Any]


class TileKeys(NamedTuple):
    """Where a tile raises the keys of its tokens.

    keys: of each site, (W, position), see KEY_SHIFT. sources: of each site, its number among layers and sites. column: the
    position of the tile's first row. begins: whether that row is the first token of a sequence.
    """

    keys: tuple[NDArray[Any], ...]
    sources: tuple[int, ...]
    column: int
    begins: bool


class Place(NamedTuple):
    """Whose counters are flushed.

    layer: among the captured. row: of `Found`. tokens: of the span. step: of the deciding magnitude in the ladder. kind: as
    in `Limits`.
    """

    layer: int
    row: int
    tokens: int
    step: int
    kind: int


class Totals(NamedTuple):
    """The arrays of `summary.SiteTotals` that a flush adds to, with its shapes; the last three are empty for the block."""

    hits: NDArray[np.int64]
    first_hits: NDArray[np.int64]
    min: NDArray[np.float32]
    max: NDArray[np.float32]
    finite: NDArray[np.int64]
    nonfinite: NDArray[np.int64]
    histogram: NDArray[np.int64]


class Found(NamedTuple):
    """What a flush writes into one row of.

    hits: (row, W) int64, at the deciding magnitude. moments: (4, row, W) float64.
    """

    hits: NDArray[np.int64]
    moments: NDArray[np.float64]


class SpanKeys(NamedTuple):
    """The keys of a span's tokens over all layers.

    one, other: (W, position) of the two sites of the block, or the same array twice for a single site. columns: (n,) int64,
    the features that have a key.
    """

    one: NDArray[Any]
    other: NDArray[Any]
    columns: NDArray[np.int64]


class Union(NamedTuple):
    """Tokens with a hit in any layer, added to.

    hits: (K, W) int64. first_hits: the same of the first token of a sequence. own: (2, W) int64, at the limits `deciding`
    and `legacy`.
    """

    hits: NDArray[np.int64]
    first_hits: NDArray[np.int64]
    own: NDArray[np.int64]


class Positions(NamedTuple):
    """Where in a sequence the hits of the deciding site are.

    start: position of column 0. bin_positions: positions in a bin. marks: (kind, position) bool. bins: (bin, W) int64, and
    marked: (kind, W) int64, tokens with a hit, added to.
    """

    start: int
    bin_positions: int
    marks: NDArray[np.bool_]
    bins: NDArray[np.int64]
    marked: NDArray[np.int64]


class TopTokens(NamedTuple):
    """The tokens of largest magnitude of each feature in a span.

    floors: (W,) int64, magnitudes below which a token cannot be among a feature's largest. columns: (n, keep) int64,
    overwritten with the columns of the largest magnitudes, in order, -1 where there are no more. keys: the same shape, their
    keys.
    """

    floors: NDArray[np.int64]
    columns: NDArray[np.int64]
    keys: NDArray[Any]
