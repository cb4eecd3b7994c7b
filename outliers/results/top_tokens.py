"""On which tokens outliers sit: a Summary and the corpus -> tokens.json, with the text around them where it may be shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.corpus.tokens import Corpus
from outliers.counting.summary import Frame, Summary
from outliers.results.schema import (
    MassiveFeature,
    MassiveRow,
    MassiveToken,
    Positions,
    StudySummary,
    TokenFeature,
    Tokens,
    TopToken,
)
from outliers.study.prepare import Prepared

SCHEMA_VERSION = 1
CONTEXT_CHARACTERS = 60
TOKEN_FEATURES = 64
"""Systematic features, massive features and massive activations that tokens.json shows, by magnitude. features.parquet
describes the others."""


def describe_tokens(prepared: Prepared, summary: Summary, content: StudySummary, corpus: Corpus) -> Tokens:
    """The content of tokens.json. content: that of summary.json."""
    frame, massive = summary.frame, content.massive or []
    return Tokens.model_validate(
        {
            "schema_version": SCHEMA_VERSION,
            "study_id": prepared.study_id,
            "site": frame.site,
            "text": prepared.text,
            "features": [
                _systematic(prepared, summary, corpus, row.feature) for row in content.systematic[:TOKEN_FEATURES]
            ],
            "massive": [_massive_token(prepared, corpus, row) for row in massive[:TOKEN_FEATURES]],
            "massive_features": _massive_features(frame, corpus, massive),
        }
    )


def _massive_token(prepared: Prepared, corpus: Corpus, row: MassiveRow) -> MassiveToken:
    return MassiveToken(
        layer=row.layer,
        sequence=row.sequence,
        position=row.position,
        feature=row.feature,
        value=row.value,
        **context(prepared, corpus, row.sequence, row.position),
    )


def _systematic(prepared: Prepared, summary: Summary, corpus: Corpus, number: int) -> TokenFeature:
    frame = summary.frame
    tokens = int(summary.sites[frame.site].union[frame.deciding_step, number])
    return TokenFeature(
        feature=number,
        tokens=tokens,
        first_token_share=int(summary.first_tokens[number]) / tokens,
        delimiter_share=int(summary.delimiter_tokens[number]) / tokens,
        special_share=int(summary.special_tokens[number]) / tokens,
        positions=_positions(frame, summary.position_tokens[:, number]),
        top=[_top_token(prepared, frame, corpus, cell) for cell in summary.top[summary.top["feature"] == number]],
    )


def _top_token(prepared: Prepared, frame: Frame, corpus: Corpus, cell: Any) -> TopToken:
    """One of the largest cells. cell: a record of `Summary.top`."""
    sequence, position = int(cell["sequence"]), int(cell["position"])
    value = {
        "sequence": sequence,
        "position": position,
        "layer": prepared.layers[int(cell["layer"])],
        "site": frame.captured[int(cell["site"])],
        "value": float(cell["value"]),
    }
    return TopToken.model_validate(value | context(prepared, corpus, sequence, position))


def _positions(frame: Frame, counts: NDArray[np.int64]) -> Positions:
    return Positions(bin_tokens=frame.bin_positions, counts=[int(n) for n in counts])


def _massive_features(frame: Frame, corpus: Corpus, massive: Sequence[MassiveRow]) -> list[MassiveFeature]:
    """The features of the listed massive activations, in the list's order: on how many tokens, and which."""
    found: dict[int, dict[tuple[int, int], None]] = {}
    for row in massive:
        found.setdefault(row.feature, {})[row.sequence, row.position] = None
    return [_massive_feature(frame, corpus, number, tokens) for number, tokens in list(found.items())[:TOKEN_FEATURES]]


def _massive_feature(frame: Frame, corpus: Corpus, number: int, tokens: Iterable[tuple[int, int]]) -> MassiveFeature:
    """Of one feature. tokens: (sequence, position) of each."""
    where = list(tokens)
    positions = np.array([position for _, position in where])
    return MassiveFeature(
        feature=number,
        tokens=len(where),
        first_token_share=int((positions == 0).sum()) / len(where),
        delimiter_share=sum(corpus.is_delimiter(*token) for token in where) / len(where),
        special_share=sum(corpus.is_special(*token) for token in where) / len(where),
        positions=_positions(frame, np.bincount(positions // frame.bin_positions, minlength=frame.bins)),
    )


def context(prepared: Prepared, corpus: Corpus, sequence: int, position: int) -> dict[str, str | None]:
    """A token and the text around it, as `text_at`; all None where text must not be published."""
    if not prepared.text:
        return {"token": None, "before": None, "after": None}
    return dict(zip(("token", "before", "after"), text_at(corpus, sequence, position), strict=True))


def text_at(corpus: Corpus, sequence: int, position: int) -> tuple[str, str, str]:
    """A token, the text before it and the text after it, in whole characters.

    Where the token is shown by its name or its bytes, the text after it begins with the token's own characters.
    """
    token, text = corpus.shown(sequence, position), corpus.texts[sequence]
    start = corpus.start(sequence, position)
    end = start + len(token) if token == corpus.piece(sequence, position) else start
    return token, text[max(0, start - CONTEXT_CHARACTERS) : start], text[end : end + CONTEXT_CHARACTERS]
