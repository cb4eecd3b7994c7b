"""Tokens by kind as rows, for the picture and the table of the report: all tokens, then each systematic feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from outliers.report.figures import percent
from outliers.results.schema import TokenKinds
from outliers.results.schema.pictures import KindName

KIND_WORDS: Mapping[KindName, str] = {
    "special": "special",
    "delimiter": "delimiter",
    "digit": "digit",
    "word_start": "word start",
    "word_piece": "word piece",
}
OTHER_WORD = "other"


@dataclass(frozen=True)
class KindCell:
    """Tokens of one kind. share: of all tokens of the kind, as text; empty for those themselves, and where there is none."""

    count: int
    share: str


@dataclass(frozen=True)
class KindLine:
    """One line of the table."""

    name: str
    tokens: int
    share: str
    cells: tuple[KindCell, ...]


def kind_rows(found: TokenKinds) -> list[tuple[str, int, list[int]]]:
    """(name, tokens, tokens by kind in the order of KIND_WORDS, and of no kind) of all tokens, and of each feature."""
    rows = [("all tokens", found.tokens, found.kinds)]
    rows += [(str(row.feature), row.tokens, row.kinds) for row in found.features]
    return [
        (name, tokens, [*(known.get(kind, 0) for kind in KIND_WORDS), tokens - sum(known.values())])
        for name, tokens, known in rows
    ]


def kind_table(found: TokenKinds) -> list[KindLine]:
    """The same with shares, as the page has them."""
    (name, whole, all_counts), *features = kind_rows(found)
    lines = [KindLine(name, whole, "", tuple(KindCell(count, "") for count in all_counts))]
    for name, tokens, counts in features:
        shares = (_share(count, own) for count, own in zip(counts, all_counts, strict=True))
        cells = tuple(KindCell(count, share) for count, share in zip(counts, shares, strict=True))
        lines.append(KindLine(f"feature {name}", tokens, _share(tokens, whole), cells))
    return lines


def _share(count: int, whole: int) -> str:
    return percent(count / whole) if whole else ""
