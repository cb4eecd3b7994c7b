"""Cases of one kind, of which `make test` runs the first and `make test-studies` runs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first_here(cases: Iterable[Any], here: int = 1) -> list[Any]:
    """Parameters of `pytest.mark.parametrize`: all but the first `here` are marked `studies`. A tuple is one case of several."""
    found = []
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=[pytest.mark.studies] if number >= here else []))
    return found
