"""What is counted of one sequence, and how its spans add up to that. Knows arrays, nothing of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from outliers.counting.summary import Frame, Summary

if TYPE_CHECKING:
    # the loops are compiled code: whoever reads a summary does without
    from outliers.counting.accumulate import LayerCounts, Span


@dataclass
class SequenceCounts:
    """One sequence's counts at the deciding magnitude.

    hits: site -> (L, W) int64. union: site -> (W,) int64. hooks: (W,) int64, hooks of both block sites with a hit by
    the legacy rule; legacy_union: (W,) int64, tokens with such a hit. tokens: of the sequence. reach: site -> (L,)
    float32, the largest finite magnitude. nll: its negative log-likelihood in nats over nll_tokens tokens, 0 of 0 if it was
    not measured.
    """

    sequence: int
    tokens: int
    hits: dict[str, NDArray[np.int64]]
    union: dict[str, NDArray[np.int64]]
    hooks: NDArray[np.int64]
    legacy_union: NDArray[np.int64]
    reach: dict[str, NDArray[np.float32]]
    nll: float = 0.0
    nll_tokens: int = 0


class OpenSequence:
    """The counts of one sequence while its spans are counted; they are added in their order."""

    def __init__(self, frame: Frame, tokens: int, loss: tuple[float, int] = (0.0, 0)) -> None:
        """loss: nll and nll_tokens of `SequenceCounts`."""
        self.frame, self.tokens, self.loss = frame, tokens, loss
        self.spans: list[Span] = []
        self.hits = {site: np.zeros((frame.num_layers, frame.width(site)), np.int64) for site in frame.sites}
        self.reach = {site: np.zeros(frame.num_layers, np.float32) for site in frame.captured}
        self.hooks = np.zeros((frame.num_layers, 2, frame.block_width), np.bool_)

    def add(self, span: Span, counts: LayerCounts, total: Summary) -> None:
        """Add the counts of some layers of a span, and their moments to the total."""
        if not self.spans or self.spans[-1] is not span:
            self.spans.append(span)
        layers = slice(counts.layers.start, counts.layers.stop)
        for site, hits in counts.hits.items():
            self.hits[site][layers] += hits
        for site, moments in counts.moments.items():
            total.sites[site].moments[:, layers] += moments
            self.reach[site][layers] = np.maximum(self.reach[site][layers], counts.reach[site])
        self.hooks[layers] |= counts.hooks

    def counts(self) -> SequenceCounts:
        """The counts, once every span is closed."""
        width = self.frame.block_width
        legacy = [span.legacy_union for span in self.spans if span.legacy_union is not None]
        return SequenceCounts(
            sequence=self.spans[0].sequence,
            tokens=self.tokens,
            hits=self.hits,
            union={site: np.sum([span.union[site] for span in self.spans], axis=0) for site in self.frame.sites},
            hooks=self.hooks.sum(axis=(0, 1), dtype=np.int64),
            legacy_union=np.sum(legacy, axis=0) if legacy else np.zeros(width, np.int64),
            reach=self.reach,
            nll=self.loss[0],
            nll_tokens=self.loss[1],
        )
