"""A results folder as it may leave, and the question whether it is refused.

After it: `test_allowlist`, `test_contents`, which import the fixture by name.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from outliers.errors import ForbiddenFile
from outliers.publish.allowlist import check_listing, read_log, read_numbers
from tests.support.results_folder import make_results


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path / "results", manifest=False)


def refused(results: Path, *words: str) -> None:
    """The folder is refused, with a message that holds all `words`."""
    with pytest.raises(ForbiddenFile) as caught:
        check(results)
    for word in words:
        assert word in str(caught.value)


def check(results: Path) -> None:
    """What is looked at before a folder is published."""
    check_listing(results)
    read_numbers(results)
    read_log(results)
