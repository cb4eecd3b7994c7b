"""The table of docs/reliability.md has a row for each fault and step that a story tells, and no other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.faults.test_fault_suite import LONG, SHARDS, SHORT, SSH, SWEEP
from tests.support.fault_case import Case
from tests.support.fault_kinds import RemoteCase, ShardsCase, SweepCase
from tests.support.fault_suite import STRIKES
from tests.support.fault_table import STEPS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def told():
    """(fault, step) of all stories, as the table calls them."""
    stories = [(Case, story) for _, story in (*SHORT.values(), *LONG.values())]
    stories += [(ShardsCase, story) for _, story in SHARDS.values()]
    stories += [(RemoteCase, story) for _, story in SSH.values()]
    stories += [(SweepCase, [(fault, "extract")]) for fault in SWEEP]
    return {(fault, step + kind.kind) for kind, story in stories for fault, step in story}


def rows():
    """The cells of each row."""
    lines = PAGE.read_text().partition("| fault | step |")[2].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_table_has_each_fault_and_step_of_the_stories_and_no_other():
    counted = Counter((row[0], row[1]) for row in rows())
    assert set(counted) == told()
    assert set(counted.values()) == {1}


def test_every_row_ends_bit_for_bit_the_same():
    assert {len(row) for row in rows()} == {6}
    assert all(row[5].startswith("bit-identical, ") for row in rows())


def test_the_table_is_in_the_order_of_faults_and_steps():
    order = [(list(STRIKES).index(row[0]), list(STEPS).index(row[1].partition(",")[0]), row[1]) for row in rows()]
    assert order == sorted(order)
