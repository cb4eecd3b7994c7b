"""What a study is called on a page, and the text that stands on it.

On the machine of its owner a study is called by the names of his own files, and his own text is shown (`Shown`). What is
published is rendered without one: from the numbers alone, by their public names. It knows no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel

from outliers.results.notes import TEXT_LEFT_OUT
from outliers.results.schema import Probes, StudySummary, Tokens

TextAt = tuple[str, str, str]
"""A token, the text before it, and the text after it."""
Texts = Mapping[tuple[int, int], TextAt]
"""By (sequence, position)."""

Row = TypeVar("Row", bound=BaseModel)


@dataclass(frozen=True)
class Shown:
    """The names and texts of a study on its owner's machine. texts: empty where the numbers hold them, or there are none.

    published: one line that says what is published in their place; empty where that is the same.
    """

    model: str
    corpus: str
    published: str = ""
    texts: Texts = field(default_factory=dict, repr=False, compare=False)


def shown_summary(summary: StudySummary, shown: Shown | None) -> StudySummary:
    """A summary as a page shows it: its model and corpus by their names, and the tokens of `shown`."""
    model, corpus = (summary.model.called, summary.corpus.called) if shown is None else (shown.model, shown.corpus)
    own = {
        "model": summary.model.model_copy(update={"id": model}),
        "corpus": summary.corpus.model_copy(update={"source": corpus}),
    }
    if shown is None or not shown.texts:
        return summary.model_copy(update=own)
    texts, lists = shown.texts, {}
    for name in ("massive", "massive_by_token"):
        rows = getattr(summary, name)
        lists[name] = None if rows is None else [_with_token(row, texts) for row in rows]
    notes = [note for note in summary.notes if note != TEXT_LEFT_OUT]
    return summary.model_copy(update=own | lists | {"notes": notes, "experts": _shown_experts(summary, texts)})


def _shown_experts(summary: StudySummary, texts: Texts) -> object:
    block = summary.experts
    if block is None:
        return None
    found: dict[str, object] = {}
    if block.largest_output is not None:
        found["largest_output"] = _with_token(block.largest_output, texts)
    for name in ("super_experts", "super_experts_as_published"):
        if (reading := getattr(block, name)) is not None:
            rows = [_with_token(row, texts) for row in reading.experts]
            found[name] = reading.model_copy(update={"experts": rows})
    return block.model_copy(update=found)


def shown_tokens(tokens: Tokens, shown: Shown | None) -> Tokens:
    """tokens.json as a page shows it, with the texts of `shown`."""
    if shown is None or not shown.texts:
        return tokens
    texts = shown.texts
    features = [
        row.model_copy(update={"top": [_in_text(token, texts) for token in row.top]}) for row in tokens.features
    ]
    massive = None if tokens.massive is None else [_in_text(row, texts) for row in tokens.massive]
    return tokens.model_copy(update={"text": True, "features": features, "massive": massive})


def shown_probes(probes: Probes, shown: Shown | None, names: tuple[str, str]) -> Probes:
    """The numbers of a probe as a page shows them. names: the public ones of its model and corpus."""
    model, corpus = names if shown is None else (shown.model, shown.corpus)
    return probes.model_copy(update={"model": model, "corpus": corpus})


def places_of(summary: StudySummary, tokens: Tokens) -> Iterator[tuple[int, int]]:
    """(sequence, position) of every token that a page may name, some of them more than once."""
    for feature in tokens.features:
        yield from ((token.sequence, token.position) for token in feature.top)
    for row in (*(tokens.massive or ()), *(summary.massive or ()), *(summary.massive_by_token or ())):
        yield row.sequence, row.position
    block = summary.experts
    readings = [] if block is None else [block.super_experts, block.super_experts_as_published]
    experts = [row for reading in readings if reading is not None for row in reading.experts]
    for one in (*experts, *([block.largest_output] if block is not None and block.largest_output else [])):
        if one.sequence is not None and one.position is not None:
            yield one.sequence, one.position


def _with_token(row: Row, texts: Texts) -> Row:
    found = texts.get((getattr(row, "sequence"), getattr(row, "position")))  # noqa: B009 - of several models
    return row if found is None else row.model_copy(update={"token": found[0]})


def _in_text(row: Row, texts: Texts) -> Row:
    found = texts.get((getattr(row, "sequence"), getattr(row, "position")))  # noqa: B009 - of several models
    return row if found is None else row.model_copy(update=dict(zip(("token", "before", "after"), found, strict=True)))
