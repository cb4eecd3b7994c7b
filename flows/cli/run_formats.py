"""`outliers runs show --formats`: what each number format would do to the values of a study, from quantization.parquet."""

from __future__ import annotations

from typing import Any

from outliers.results.format_lines import FormatLine

_RANGES = {"without_first_tokens": "no first tokens"}


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
