"""Each kind of file of a finished study's workspace, damaged in each way: no raw error, and no other answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.damage_table import KINDS, World, cases, files_of, kind_of, table, with_jobs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
FAST = (
    # one that is read at each stage; all others are `long`
    ("results: summary.json", "edit"),
    ("results: manifest.json", "zeros"),
    ("summary: totals.npz", "bit flip"),
    ("summary: sequences/*.npz", "deletion"),
    ("capture: journal.jsonl", "truncation"),
    ("capture: chunks", "deletion"),
    ("model: what is known of it", "edit"),
    ("model: hashes", "edit"),
    ("studies: what a step is given", "zeros"),
)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A finished study in a workspace, with a job that has ended."""
    world = World(tmp_path_factory.mktemp("here"))
    with_jobs(world.root)
    return world


def rows():
    """The rows of the table in the docs: kind -> cells."""
    lines = PAGE.read_text().partition("| file | what else is gone |")[2].splitlines()[2:]
    found = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[name] = cells
    return found


def test_the_docs_have_a_row_for_each_kind_of_file_and_every_file_is_of_a_kind(here):
    assert list(rows()) == [kind[0] for kind in KINDS]
    assert set(files_of(here.root)) <= set(rows())
    with pytest.raises(KeyError, match="give it a row"):
        kind_of("captures/x/something.new")


@pytest.mark.parametrize(("kind", "how"), FAST)
def test_a_damaged_file_changes_no_answer(here, kind, how):
    (case, *_) = (case for case in cases(here.root) if (case.kind, case.damage) == (kind, how))
    assert here.outcome_of(case)


@pytest.mark.long
@pytest.mark.parametrize("published", [False, True], ids=["here", "published"])
def test_no_damage_of_any_file_changes_an_answer_or_is_a_raw_error(tmp_path, published):
    """It prints the table: the docs have what was seen."""
    world = World(tmp_path, published=published)
    with_jobs(world.root)
    print(table([world]))
