"""Which rows quantization.parquet has at a site and layer, and the ranges that their scales need. Knows no files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from outliers.counting.summary import Summary
from outliers.results.criteria import judge
from outliers.results.lists import rules_of
from outliers.spec import BLOCK, BLOCK_SITES
from outliers.spec.formats import Format, parse_format
from outliers.study.prepare import Prepared

ALL, WITHOUT_FIRST = "all", "without_first_tokens"
BESIDE = (64, 32, 16)
"""Block sizes of the rotation that is tried with each 4-bit format; the largest that divides the features is used."""
WHOLE_TENSOR = ("int8_tensor", "fp8_tensor")
"""Formats that one token's magnitude decides for all: they are tried with the range of the other tokens too."""


@dataclass(frozen=True)
class Variant:
    """One format at a site. held: (feature,) bool, features that are kept as they are. range: of a static format, else None."""

    format: Format
    held: NDArray[np.bool_] = field(compare=False)
    held_out: int
    range: str | None

    @property
    def scans(self) -> bool:
        """Whether its range is not in the summary: of rotated values, or without the first tokens."""
        return self.range is not None and (self.format.rotation > 0 or self.range == WITHOUT_FIRST)


def formats_at(names: tuple[str, ...], width: int) -> tuple[Format, ...]:
    """The formats of a study at a site: those asked for, and after each 4-bit format its largest rotation that fits."""
    asked = [parse_format(name) for name in names]
    found: list[Format] = []
    for fmt in asked:
        found.append(fmt)
        block = next((block for block in BESIDE if width % block == 0), 0)
        if not fmt.rotation and "4" in fmt.base and block:
            found.append(Format(fmt.base, block))
    return tuple(dict.fromkeys(found))


def variants_at(prepared: Prepared, summary: Summary, site: str) -> tuple[Variant, ...]:
    """The rows of a captured site, the same in each layer: plain, then with its systematic features held out."""
    width = summary.frame.width(site)
    masks = [np.zeros(width, np.bool_)]
    systematic = systematic_at(prepared, summary, site)
    if systematic.any():
        masks.append(systematic)
    return tuple(
        Variant(fmt, mask, int(mask.sum()), ranged)
        for fmt in formats_at(prepared.spec.formats.formats, width)
        for mask in masks
        for ranged in _ranges(fmt, later=summary.tokens > summary.sequences.size)
    )


def _ranges(fmt: Format, *, later: bool) -> Iterator[str | None]:
    """later: whether a sequence has a token after its first."""
    yield ALL if fmt.is_static else None
    if fmt.base in WHOLE_TENSOR and later:
        yield WITHOUT_FIRST


def systematic_at(prepared: Prepared, summary: Summary, site: str) -> NDArray[np.bool_]:
    """(feature,) bool: the features that pass the study's reading at a site; at the sites of the block, those of the block."""
    where = BLOCK if site in BLOCK_SITES and BLOCK in summary.frame.sites else site
    counts = summary.sites[where].counts(summary.frame.deciding_step)
    verdict = judge(*counts, summary.tokens, rules_of(prepared))[prepared.spec.criteria.reading]
    return np.asarray(verdict.passes, np.bool_)


def corpus_range(summary: Summary, site: str, layer: int) -> NDArray[np.float32]:
    """(feature,) float32: the largest finite magnitude of the whole corpus, 0 where nothing was finite. layer: from 0."""
    totals = summary.sites[site]
    largest = np.maximum(np.abs(totals.max[layer]), np.abs(totals.min[layer]))
    return np.where(np.isfinite(largest), largest, np.float32(0)).astype(np.float32)


def spread_evenly(lengths: NDArray[np.int64], most_tokens: int) -> NDArray[np.int64]:
    """Numbers of whole sequences, ascending, evenly spread, of at most `most_tokens` tokens, but at least two where there are.

    lengths: (sequence,) tokens of every sequence of the corpus.
    """
    total, count = int(lengths.sum()), lengths.size
    chosen = min(count, max(2, most_tokens * count // max(1, total)))
    while True:
        found = np.arange(chosen, dtype=np.int64) * count // chosen
        tokens = int(lengths[found].sum())
        if tokens <= most_tokens or chosen <= 2:
            return found
        chosen = max(2, min(chosen - 1, chosen * most_tokens // tokens))
