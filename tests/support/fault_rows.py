"""The table of `make test-faults` where several processes tell the stories: each keeps its rows, the end shows them as one.

Its hooks are pytest's: `conftest` takes them in. Before it: `test_fault_suite`, which keeps the rows of its world.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.fault_world import Row

_ROWS = pytest.StashKey[list[Sequence[str]]]()


def keep(config: pytest.Config, rows: Sequence[Row]) -> None:
    """Rows of this process, for the table at the end."""
    plain = [list(astuple(row)) for row in rows]
    worker: dict[str, Any] | None = getattr(config, "workeroutput", None)
    if worker is None:
        config.stash.setdefault(_ROWS, []).extend(plain)
    else:
        worker.setdefault("fault_rows", []).extend(plain)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node: Any) -> None:
    """A process of xdist has ended: its rows come here."""
    rows = getattr(node, "workeroutput", {}).get("fault_rows", ())
    node.config.stash.setdefault(_ROWS, []).extend(rows)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of all stories, also in the file OUTLIERS_FAULTS_TABLE where that is named."""
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    from tests.support.fault_table import table
    from tests.support.fault_world import Row

    text = table([Row(*row) for row in rows])
    terminalreporter.write_line(f"\n{text}\n")
    if place := os.environ.get("OUTLIERS_FAULTS_TABLE"):
        Path(place).write_text(text + "\n")
