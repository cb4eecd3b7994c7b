"""Where outliers sit: a Summary and the corpus -> tokens.json, with the text around them where it may be shown.

Before it: `analyze`, `massive`. After it: `report`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.corpus.tokens import Corpus
from outliers.counting.summary import Frame, Summary
from outliers.study.prepare import Prepared

SCHEMA_VERSION = 1
CONTEXT_CHARACTERS = 60
TOKEN_FEATURES = 64
"""Systematic features, massive features and massive activations that tokens.json shows, by magnitude: a model with more is
no less described by its table."""


def describe_tokens(prepared: Prepared, summary: Summary, content: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """The content of tokens.json. content: that of summary.json."""
    frame = summary.frame
    massive = content["massive"] or []
    kept = ("layer", "sequence", "position", "feature", "value")
    return {
        "schema_version": SCHEMA_VERSION,
        "study_id": prepared.study_id,
        "site": frame.site,
        "text": prepared.text,
        "features": [
            _systematic(prepared, summary, corpus, item["feature"]) for item in content["systematic"][:TOKEN_FEATURES]
        ],
        "massive": [
            {name: cell[name] for name in kept} | context(prepared, corpus, cell["sequence"], cell["position"])
            for cell in massive[:TOKEN_FEATURES]
        ],
        "massive_features": _massive_features(frame, corpus, massive),
    }


def _systematic(prepared: Prepared, summary: Summary, corpus: Corpus, number: int) -> dict[str, Any]:
    frame = summary.frame
    tokens = int(summary.sites[frame.site].union[frame.deciding_step, number])
    cells = summary.top[summary.top["feature"] == number]
    return {
        "feature": number,
        "tokens": tokens,
        "first_token_share": int(summary.first_tokens[number]) / tokens,
        "delimiter_share": int(summary.delimiter_tokens[number]) / tokens,
        "special_share": int(summary.special_tokens[number]) / tokens,
        "positions": _positions(frame, summary.position_tokens[:, number]),
        "top": [
            {
                "sequence": int(cell["sequence"]),
                "position": int(cell["position"]),
                "layer": prepared.layers[int(cell["layer"])],
                "site": frame.captured[int(cell["site"])],
                "value": float(cell["value"]),
            }
            | context(prepared, corpus, int(cell["sequence"]), int(cell["position"]))
            for cell in cells
        ],
    }


def _positions(frame: Frame, counts: NDArray[np.int64]) -> dict[str, Any]:
    return {"bin_tokens": frame.bin_positions, "counts": [int(n) for n in counts]}


def _massive_features(frame: Frame, corpus: Corpus, massive: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The features of the listed massive activations, in the list's order: on how many tokens, and which."""
    found: dict[int, dict[tuple[int, int], None]] = {}
    for cell in massive:
        found.setdefault(cell["feature"], {})[cell["sequence"], cell["position"]] = None
    return [_massive_feature(frame, corpus, number, tokens) for number, tokens in list(found.items())[:TOKEN_FEATURES]]


def _massive_feature(frame: Frame, corpus: Corpus, number: int, tokens: Iterable[tuple[int, int]]) -> dict[str, Any]:
    places = list(tokens)
    positions = np.array([position for _, position in places])
    return {
        "feature": number,
        "tokens": len(places),
        "first_token_share": int((positions == 0).sum()) / len(places),
        "delimiter_share": sum(corpus.is_delimiter(*place) for place in places) / len(places),
        "special_share": sum(corpus.is_special(*place) for place in places) / len(places),
        "positions": _positions(frame, np.bincount(positions // frame.bin_positions, minlength=frame.bins)),
    }


def context(prepared: Prepared, corpus: Corpus, sequence: int, position: int) -> dict[str, str | None]:
    """A token and the text around it, in whole characters, or nothing of them where text must not be shown.

    A token that is shown by its name or its bytes stands between what is before its characters and what begins with them.
    """
    if not prepared.text:
        return {"token": None, "before": None, "after": None}
    token, text = corpus.shown(sequence, position), corpus.sequence_texts[sequence]
    start = int(corpus.starts[sequence, position])
    end = start + len(token) if token == corpus.piece(sequence, position) else start
    return {
        "token": token,
        "before": text[max(0, start - CONTEXT_CHARACTERS) : start],
        "after": text[end : end + CONTEXT_CHARACTERS],
    }
