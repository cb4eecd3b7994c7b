"""The rows of quantization.parquet put together by format: over all layers, and the worst one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

_KINDS = ("format", "held_out", "range")


class FormatLine(NamedTuple):
    """One format at one site: its error over all layers, and the worst layer."""

    site: str
    format: str
    held_out: int
    range: str | None
    sqnr_db: float | None
    worst_layer: int
    worst_db: float | None


def format_lines(rows: list[dict[str, Any]], site: str | None = None, layer: int | None = None) -> list[FormatLine]:
    """A line for each site, format, held-out features and range, in the order of the table; of a layer alone where one is asked.

    The error over all layers is the sum of their squared errors over the sum of their squares.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if site in (None, row["site"]) and layer in (None, row["layer"]):
            groups.setdefault((row["site"], *(row[name] for name in _KINDS)), []).append(row)
    found = []
    for (where, fmt, held_out, known), own in groups.items():
        worst = max(own, key=lambda row: -1.0 if row["relative_error"] is None else row["relative_error"])
        found.append(FormatLine(where, fmt, held_out, known, _decibels(own), worst["layer"], worst["sqnr_db"]))
    return found


def _decibels(rows: Iterable[dict[str, Any]]) -> float | None:
    error = math.fsum(row["squared_error"] for row in rows)
    square = math.fsum(row["squared_norm"] for row in rows)
    return -10 * math.log10(error / square) if error and square else None
