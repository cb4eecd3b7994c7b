"""What the pictures of a study are drawn from: its files as the models of `results.schema`, and the cells with a hit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outliers.results.schema import Pictures, StudySummary, Tokens
from outliers.spec import BLOCK, BLOCK_SITES, SITES, AnySiteName, SiteName

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cells:
    """The (layer, feature) pairs with a hit at the deciding site; four arrays of one length."""

    layer: Ints
    feature: Ints
    hits: Ints
    extreme: Floats  # signed value of the largest magnitude


@dataclass(frozen=True)
class Content:
    """The files of one study. pictures: None of studies that were made before pictures.json."""

    summary: StudySummary
    tokens: Tokens
    cells: Cells
    pictures: Pictures | None


def captured_layers(summary: StudySummary) -> tuple[int, ...]:
    """The layers that were read, ascending."""
    return tuple(sorted({row.layer for row in summary.layers}))


def captured_sites(summary: StudySummary) -> tuple[SiteName, ...]:
    """The sites that were read, in the order of the model; `block` is not one of them."""
    return tuple(site for site in SITES if any(row.site == site for row in summary.layers))


def stream_sites(summary: StudySummary) -> tuple[AnySiteName, ...]:
    """Where the residual stream is looked at: `resid` where it was read, else the deciding site's own captured ones."""
    if "resid" in captured_sites(summary):
        return ("resid",)
    site = summary.criteria.site
    return BLOCK_SITES if site == BLOCK else (site,)
