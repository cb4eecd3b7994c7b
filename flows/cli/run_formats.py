"""`outliers runs show --formats`: what each number format would do to the values of a study, from quantization.parquet."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

_RANGES = {"without_first_tokens": "no first tokens"}
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


def format_table(lines: list[FormatLine], block: dict[str, Any]) -> Any:
    """The lines as a table of the terminal. block: summary.json's `quantization`."""
    from rich.table import Table
    from rich.text import Text

    from outliers.untrusted.visible import visible_values

    title = f"quantization.parquet: SQNR in dB over {block['tokens']:,} tokens in {block['sequences']:,} sequences"
    table = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    for name in ("site", "format", "range"):
        table.add_column(name, no_wrap=True)
    for name in ("held", "dB", "worst layer", "dB"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in lines:
        table.add_row(
            *(
                Text(visible_values(text))
                for text in (one.site, one.format, _RANGES.get(one.range or "", one.range or ""))
            ),
            f"{one.held_out:,}" if one.held_out else "",
            _shown(one.sqnr_db),
            str(one.worst_layer),
            _shown(one.worst_db),
        )
    return table


def _shown(decibels: float | None) -> str:
    return "exact" if decibels is None else f"{decibels:.2f}"
