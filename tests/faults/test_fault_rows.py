"""The table of faults is one, however many processes tell the stories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = "from tests.support.fault_rows import pytest_terminal_summary, pytest_testnodedown\n"
STORIES = """\
from dataclasses import dataclass
import pytest
from tests.support.fault_rows import keep

@dataclass
class Row:
    fault: str
    step: str
    state: str = "Crashed"
    message: str = "it says"
    then: str = "Retry"
    ended: str = "bit-identical"

@pytest.fixture(scope="module")
def rows(request):
    found = []
    yield found
    keep(request.config, found)

@pytest.mark.parametrize("step", ["sync", "analyze", "extract", "merge", "provision"])
def test_story(rows, step):
    rows.append(Row("flow killed", step))
"""


@pytest.mark.long  # of the table of `make test-faults`
@pytest.mark.parametrize("processes", [(), ("-n", "2", "--dist", "worksteal")])
def test_rows_of_all_processes_come_into_one_table(tmp_path, processes):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_stories.py").write_text(STORIES)
    place = tmp_path / "table.md"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OUTLIERS_FAULTS_TABLE": str(place)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *processes, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
    steps = [line.split(" | ")[1] for line in place.read_text().splitlines()[2:]]
    assert steps == ["provision", "extract", "analyze", "merge", "sync"]  # each once, by steps
    assert place.read_text().strip() in done.stdout
