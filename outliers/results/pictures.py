"""A Summary -> pictures.json: the extremes and kinds of tokens that the pictures show, bounded whatever the model's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.corpus.kinds import KINDS
from outliers.corpus.tokens import Corpus
from outliers.counting.summary import SiteTotals, Summary
from outliers.results.schema import Pictures, StudySummary
from outliers.results.schema.pictures import MAX_LARGEST, MAX_SHOWN
from outliers.spec import OWN_WIDTH_SITES
from outliers.study.prepare import Prepared

SCHEMA_VERSION = 1


def describe_pictures(prepared: Prepared, summary: Summary, content: StudySummary, corpus: Corpus) -> Pictures:
    """The content of pictures.json. content: that of summary.json."""
    frame = summary.frame
    systematic = [row.feature for row in content.systematic][:MAX_SHOWN]
    return Pictures.model_validate(
        {
            "schema_version": SCHEMA_VERSION,
            "study_id": prepared.study_id,
            "layers": [
                {"site": site, "layer": layer, "largest": _largest(summary.sites[site], index)}
                for site in frame.captured
                for index, layer in enumerate(prepared.layers)
            ],
            "features": _shown(summary, systematic),
            "kinds": _kinds(summary, systematic, corpus),
        }
    )


def _extremes(totals: SiteTotals) -> NDArray[np.float64]:
    """(layer, feature): the signed value of largest magnitude, the positive one of two; NaN where no value is finite."""
    high, low = totals.max.astype(np.float64), totals.min.astype(np.float64)
    return np.where(np.isfinite(high), np.where(np.abs(low) > np.abs(high), low, high), np.nan)


def _largest(totals: SiteTotals, layer: int) -> list[dict[str, Any]]:
    values = _extremes(totals)[layer]
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.lexsort((known, -np.abs(values[known])))][:MAX_LARGEST]
    return [{"feature": int(feature), "value": float(values[feature])} for feature in order]


def _shown(summary: Summary, systematic: Sequence[int]) -> list[dict[str, Any]]:
    """The systematic features and the largest others, at the deciding site and at the others of the same features."""
    site = summary.frame.site
    alone = site in OWN_WIDTH_SITES
    sites = (site,) if alone else tuple(s for s in summary.frame.sites if s not in OWN_WIDTH_SITES)
    values = {own: _extremes(summary.sites[own]) for own in sites}
    reach = np.nanmax(np.abs(np.nan_to_num(values[site], nan=0.0)), axis=0)
    others = [int(j) for j in np.lexsort((np.arange(reach.size), -reach)) if reach[j] > 0]
    listed = list(dict.fromkeys([*systematic, *others[: MAX_SHOWN + len(systematic)]]))[:MAX_SHOWN]
    return [
        {"feature": j, "values": {own: [_plain(x) for x in values[own][:, j].tolist()] for own in sites}}
        for j in listed
    ]


def _plain(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _kinds(summary: Summary, systematic: Sequence[int], corpus: Corpus) -> dict[str, Any] | None:
    """Tokens by kind, of the corpus and of each systematic feature; None where they were not counted."""
    counted = summary.kind_tokens
    if counted is None:
        return None
    frame = summary.frame
    whole = np.stack([summary.delimiter_tokens, summary.special_tokens, *counted])  # (kind, feature)
    union = summary.sites[frame.site].union[frame.deciding_step]
    of_corpus = _corpus_kinds(corpus)
    return {
        "tokens": int(summary.tokens),
        "kinds": dict(zip(KINDS, of_corpus, strict=True)),
        "features": [
            {
                "feature": j,
                "tokens": int(union[j]),
                "kinds": {kind: int(n) for kind, n in zip(KINDS, whole[:, j], strict=True)},
            }
            for j in systematic
        ],
    }


ROWS = 64
"""Sequences whose kinds are held at once."""


def _corpus_kinds(corpus: Corpus) -> list[int]:
    total = np.zeros(len(KINDS), np.int64)
    for first in range(0, len(corpus.lengths), ROWS):
        found = corpus.kinds(range(first, min(first + ROWS, len(corpus.lengths))))
        total += np.bincount(found[found >= 0], minlength=len(KINDS))
    return [int(n) for n in total]
