"""Standard output: what a command was asked for. Progress, notices and errors go to standard error, which `console` shows.

A table has whole values and one row a line, also in a pipe and where the terminal is narrow, so that `| grep`, `| less -S` and
`> file` get what is there. With --plain its cells are separated by tabs.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import IO

from rich.console import Console
from rich.table import Table

WIDEST = 10_000
"""Columns of a line that is not broken: a terminal breaks it by itself, a pipe keeps it whole."""


class Answers(Console):
    """A Console on standard output that breaks no line."""

    def __init__(self, arguments: argparse.Namespace | None = None, *, file: IO[str] | None = None) -> None:
        """arguments: of a command that may have --plain. file: in the place of standard output."""
        super().__init__(file=file, markup=False, emoji=False, highlight=False, soft_wrap=True, width=WIDEST)
        self.plain: bool = getattr(arguments, "plain", False)
        """Whether the cells of tables are separated by tabs."""

    def prose(self, text: str, columns: int | None = None) -> None:
        """Print a paragraph, broken between words on a terminal, in one line elsewhere. columns: its width."""
        if self.is_terminal:
            text = textwrap.fill(
                text, columns or shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False
            )
        self.print(text)

    def table(self, table: Table) -> None:
        """Print a table; with --plain a line of names and a line for each row."""
        if not self.plain:
            self.print(table)
            return
        columns = [[column.header, *column.cells] for column in table.columns]
        for cells in zip(*columns, strict=True):
            # not by rich, which makes spaces of tabs
            self.file.write("\t".join(_cell(cell) for cell in cells) + "\n")


def _cell(cell: object) -> str:
    """A cell as text that holds neither tab nor line break."""
    return " ".join(str(cell).split())
