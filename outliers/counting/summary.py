"""Summary: the statistics of a set of tokens, as a commutative monoid.

Its atom is a token with all its captured sites and layers. `merge` joins Summaries of disjoint sequences. Everything that
a reading, a rank or a list depends on is integers or selections and bit-identical under any order, chunking or number of
workers; the per-feature moments are float64 sums and agree to 1e-12. Knows arrays, nothing of files or models.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.counting.bits import PATTERNS
from outliers.counting.kernels.arguments import Totals
from outliers.errors import SummaryMismatch
from outliers.spec import BLOCK, has_block

TEXT_KINDS = ("digit", "word_start", "word_piece")
"""Kinds of tokens that are counted besides delimiters and special ones: those of `corpus.kinds.KINDS` after these two."""
TOP_TOKENS = 16
"""Tokens of largest magnitude that are kept for each feature."""
MASSIVE_MAGNITUDE = 100.0
"""Massive activations exceed this (Sun et al. 2024, arXiv 2402.17762, section 2)."""
MASSIVE_RATIO = 1000.0
"""They are at least MASSIVE_RATIO times the median magnitude of their layer, or of their token."""
MASSIVE_KEPT = 1_000
"""Cells kept for each layer as candidates of massive activations, by magnitude."""
POSITION_BINS = 64
CELL = np.dtype(
    [
        ("feature", "<i4"),
        ("magnitude", "<f4"),
        ("sequence", "<i4"),
        ("position", "<i4"),
        ("layer", "<i4"),
        ("site", "<i4"),
        ("value", "<f4"),
        ("token_median", "<f8"),
    ]
)
"""One value and where it sits. `layer` counts captured layers, `site` is an index into the captured sites."""
FINE = np.dtype([("layer", "<i4"), ("bits", "<u4"), ("count", "<i8")])
"""How often a float32 magnitude occurs at resid in a captured layer, by its bits."""
LAST_BIN = 0x7F7F
"""The largest finite magnitude of bfloat16: the last bin of float32 values."""
ALL_BINS = ((0, LAST_BIN), (0, LAST_BIN))
"""Windows of a layer without values: they leave out nothing."""


@dataclass(frozen=True)
class Frame:
    """What all Summaries of one study share; Summaries with different frames don't merge."""

    study_id: str
    dtype: str
    widths: tuple[tuple[str, int], ...]
    num_layers: int
    positions: int
    magnitude: float
    ladder: tuple[float, ...]
    site: str

    @property
    def captured(self) -> tuple[str, ...]:
        """The sites on disk."""
        return tuple(site for site, _ in self.widths)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are counted: the captured ones, and block if both of its sites are captured."""
        return (*self.captured, BLOCK) if has_block(self.captured) else self.captured

    def width(self, site: str) -> int:
        """Features of a site; the features of block are the hidden dimensions."""
        return dict(self.widths)["attn_in" if site == BLOCK else site]

    @property
    def block_width(self) -> int:
        """Features of block; 0 if its sites are not captured."""
        return self.width(BLOCK) if has_block(self.captured) else 0

    @property
    def bin_positions(self) -> int:
        """Positions in one bin of the position histogram."""
        return -(-self.positions // min(POSITION_BINS, self.positions))

    @property
    def bins(self) -> int:
        """Bins of the position histogram."""
        return -(-self.positions // self.bin_positions)

    @property
    def deciding_step(self) -> int:
        """Index of the deciding magnitude in the ladder."""
        return self.ladder.index(self.magnitude)


@dataclass
class SiteTotals:
    """Counts of one site. K magnitudes of the ladder, L captured layers, W features.

    hits: (K, L, W) int64; first_hits: the same of first tokens alone. union: (K, W) int64, tokens with a hit in any
    layer; first_union: the same of first tokens alone. max, min: (L, W) float32, -inf and inf where nothing was finite.
    moments: (4, L, W) float64 sums of x, x^2, x^3, x^4 over the finite values, finite: (L, W) int64 their number; histogram:
    (L, 65536) int64 by pattern, non-finite patterns left at 0; nonfinite: (L,) int64 (these four are of captured sites;
    empty for block).
    """

    hits: NDArray[np.int64]
    first_hits: NDArray[np.int64]
    union: NDArray[np.int64]
    first_union: NDArray[np.int64]
    max: NDArray[np.float32]
    min: NDArray[np.float32]
    moments: NDArray[np.float64]
    finite: NDArray[np.int64]
    histogram: NDArray[np.int64]
    nonfinite: NDArray[np.int64]

    @classmethod
    def zero(cls, frame: Frame, site: str) -> SiteTotals:
        k, layers, width = len(frame.ladder), frame.num_layers, frame.width(site)
        own = 0 if site == BLOCK else layers
        return cls(
            hits=np.zeros((k, layers, width), np.int64),
            first_hits=np.zeros((k, layers, width), np.int64),
            union=np.zeros((k, width), np.int64),
            first_union=np.zeros((k, width), np.int64),
            max=np.full((layers, width), -np.inf, np.float32),
            min=np.full((layers, width), np.inf, np.float32),
            moments=np.zeros((4, own, width), np.float64),
            finite=np.zeros((own, width), np.int64),
            histogram=np.zeros((own, PATTERNS), np.int64),
            nonfinite=np.zeros(own, np.int64),
        )

    @property
    def arrays(self) -> Totals:
        """The arrays that `kernels.totals` adds to."""
        return Totals(self.hits, self.first_hits, self.min, self.max, self.finite, self.nonfinite, self.histogram)

    def merged(self, other: SiteTotals) -> SiteTotals:
        pick = {"max": np.maximum, "min": np.minimum}
        parts = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return SiteTotals(**{name: pick.get(name, np.add)(a, b) for name, (a, b) in parts.items()})

    def counts(self, step: int, *, first_tokens: bool = True) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hits (L, W) and union (W,) at one magnitude of the ladder, of all tokens or of all but the first ones."""
        if first_tokens:
            return self.hits[step], self.union[step]
        return self.hits[step] - self.first_hits[step], self.union[step] - self.first_union[step]


RESULTS = (
    "sequences",
    "position_tokens",
    "first_tokens",
    "delimiter_tokens",
    "special_tokens",
    "kind_tokens",
    "top",
    "massive",
    "massive_cells",
    "massive_by_token",
)
"""The arrays of a Summary that are results, of which older ones lack `kind_tokens`; `fine` and `fine_windows` lead to the medians
of float32 values."""


@dataclass
class Summary:
    """Totals of a set of sequences.

    sequences: sorted ids. tokens: how many tokens they have. position_tokens: (bins, W) int64, tokens with a hit in any layer of
    the deciding site by position; first_tokens, delimiter_tokens and special_tokens: (W,) int64, those that are the first of
    their sequence, delimiters, or special ones; kind_tokens: (kind, W) int64, those of TEXT_KINDS, None where some of the
    sequences were counted by an earlier version, which did not. top: CELL, the deciding site's tokens of largest magnitude for
    each feature.
    massive: CELL, candidates at resid; massive_cells: (L,) int64, how many values exceed 100 there; massive_by_token: (L,) int64,
    how many of those are massive by their own token's median. fine: FINE, of float32 values at resid those that round to a bin of
    fine_windows, (L, 2, 2) int64: the first and last bin about the median, and about 1,000 times it (`second_look`).
    """

    frame: Frame
    sequences: NDArray[np.int64]
    tokens: int
    sites: dict[str, SiteTotals]
    position_tokens: NDArray[np.int64]
    first_tokens: NDArray[np.int64]
    delimiter_tokens: NDArray[np.int64]
    special_tokens: NDArray[np.int64]
    kind_tokens: NDArray[np.int64] | None
    top: NDArray[Any]
    massive: NDArray[Any]
    massive_cells: NDArray[np.int64]
    massive_by_token: NDArray[np.int64]
    fine: NDArray[Any]
    fine_windows: NDArray[np.int64]

    @classmethod
    def zero(cls, frame: Frame) -> Summary:
        """The neutral element."""
        width = frame.width(frame.site)
        return cls(
            frame=frame,
            sequences=np.zeros(0, np.int64),
            tokens=0,
            sites={site: SiteTotals.zero(frame, site) for site in frame.sites},
            position_tokens=np.zeros((frame.bins, width), np.int64),
            first_tokens=np.zeros(width, np.int64),
            delimiter_tokens=np.zeros(width, np.int64),
            special_tokens=np.zeros(width, np.int64),
            kind_tokens=np.zeros((len(TEXT_KINDS), width), np.int64),
            top=np.zeros(0, CELL),
            massive=np.zeros(0, CELL),
            massive_cells=np.zeros(frame.num_layers, np.int64),
            massive_by_token=np.zeros(frame.num_layers, np.int64),
            fine=np.zeros(0, FINE),
            fine_windows=np.tile(np.array(ALL_BINS, np.int64), (frame.num_layers, 1, 1)),
        )


def merge(a: Summary, b: Summary) -> Summary:
    """The Summary of both sets of sequences. Raises SummaryMismatch for other studies or a shared sequence."""
    if a.frame != b.frame:
        raise SummaryMismatch(f"a summary of study {a.frame.study_id} does not merge with one of {b.frame.study_id}")
    shared = np.intersect1d(a.sequences, b.sequences)
    if shared.size:
        raise SummaryMismatch(f"sequence {int(shared[0])} is in both summaries: each sequence counts once")
    return Summary(
        frame=a.frame,
        sequences=np.sort(np.concatenate([a.sequences, b.sequences])),
        tokens=a.tokens + b.tokens,
        sites={site: a.sites[site].merged(b.sites[site]) for site in a.frame.sites},
        position_tokens=a.position_tokens + b.position_tokens,
        first_tokens=a.first_tokens + b.first_tokens,
        delimiter_tokens=a.delimiter_tokens + b.delimiter_tokens,
        special_tokens=a.special_tokens + b.special_tokens,
        kind_tokens=None if a.kind_tokens is None or b.kind_tokens is None else a.kind_tokens + b.kind_tokens,
        top=largest(np.concatenate([a.top, b.top]), "feature", TOP_TOKENS),
        massive=largest(np.concatenate([a.massive, b.massive]), "layer", MASSIVE_KEPT),
        massive_cells=a.massive_cells + b.massive_cells,
        massive_by_token=a.massive_by_token + b.massive_by_token,
        fine=add_up(np.concatenate([a.fine, b.fine])),
        # what both have counted; an empty window stays one
        fine_windows=np.stack(
            [
                np.maximum(a.fine_windows[..., 0], b.fine_windows[..., 0]),
                np.minimum(a.fine_windows[..., 1], b.fine_windows[..., 1]),
            ],
            axis=-1,
        ),
    )


def add_up(fine: NDArray[Any]) -> NDArray[Any]:
    """FINE with each (layer, bits) once, ascending."""
    if not fine.size:
        return fine
    fine = fine[np.lexsort((fine["bits"], fine["layer"]))]
    starts = np.flatnonzero(np.r_[True, (np.diff(fine["layer"]) != 0) | (np.diff(fine["bits"]) != 0)])
    found = fine[starts]
    found["count"] = np.add.reduceat(fine["count"], starts)
    return found


def largest(cells: NDArray[Any], group: str, keep: int) -> NDArray[Any]:
    """The `keep` cells of largest magnitude in each `group`, in a total order: where equal ones sit decides.

    No two cells of a group may be of one feature and token.
    """
    order = np.lexsort((cells["feature"], cells["position"], cells["sequence"], -cells["magnitude"], cells[group]))
    cells = cells[order]
    if not cells.size:
        return cells
    starts = np.flatnonzero(np.r_[True, np.diff(cells[group]) != 0])
    rank = np.arange(cells.size) - np.repeat(starts, np.diff(np.r_[starts, cells.size]))
    return cells[rank < keep]
