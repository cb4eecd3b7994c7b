"""Lines of the journal that say how far a study has counted what it frees."""

from __future__ import annotations

import pytest

from outliers.errors import CorruptCapture
from outliers.store.journal import COUNT, DONE, LOOK, Counted, Journal


def line(sequence, crc=1):
    return {"sequence": sequence, "crc32": {"a": [crc]}, "sizes": {"a": [1]}, "bytes": 4}


@pytest.fixture
def journal(tmp_path):
    """Four of ten sequences, the last one written twice; nothing is counted yet."""
    made = Journal.open(tmp_path / "journal.jsonl", repair=True)
    made.mark_counted(Counted("study", 0, 10, 0, COUNT, 2), range(0))
    made.append([line(sequence) for sequence in range(4)])
    made.redo([3])
    made.append([line(3, crc=2)])
    return made


@pytest.mark.parametrize(
    ("phase", "upto", "kept", "freed"),
    [
        (COUNT, 0, 2, []),
        (COUNT, 1, 2, []),
        (COUNT, 4, 2, [2, 3]),
        (LOOK, 0, 2, [2, 3, 4, 5]),
        (DONE, 6, 0, [0, 1, 2, 3, 4, 5]),
        (DONE, 6, 99, []),
    ],
)
def test_what_a_line_has_freed(phase, upto, kept, freed):
    assert list(Counted("s", 0, 6, upto, phase, kept).freed) == freed


def test_a_part_that_begins_behind_what_stays_keeps_nothing():
    assert list(Counted("s", 4, 8, 8, DONE, 2).freed) == [4, 5, 6, 7]


def test_counting_takes_the_lines_of_what_is_freed(journal):
    journal.mark_counted(Counted("study", 0, 10, 4, COUNT, 2), range(4))
    found = Journal.open(journal.path)
    assert set(found.done) == set(journal.done) == {0, 1}
    assert found.freed == {2, 3}
    assert found.done[1]["crc32"] == {"a": [1]}  # the file has the checksums that this process does not keep
    assert len(journal.path.read_bytes().splitlines()) == 2 + 1
    # one that is captured again is there
    journal.append([line(3)])
    assert Journal.open(journal.path).freed == {2}


def test_two_studies_have_a_line_each_and_one_can_be_withdrawn(journal):
    journal.mark_counted(Counted("other", 0, 10, 2, COUNT, 2), range(2))
    assert {key[0] for key in Journal.open(journal.path).counted} == {"study", "other"}
    journal.forget_counted(("study", 0, 10))
    assert {key[0] for key in Journal.open(journal.path).counted} == {"other"}
    assert set(Journal.open(journal.path).done) == {0, 1, 2, 3}


def test_a_changed_line_is_damage(journal):
    content = journal.path.read_bytes()
    journal.path.write_bytes(content.replace(b'"upto": 0', b'"upto": 9'))
    with pytest.raises(CorruptCapture, match="line 1"):
        Journal.open(journal.path)
    assert Journal.open(journal.path, tolerant=True).damaged == [1]
    with pytest.raises(CorruptCapture, match="changed while it was written"):
        journal.mark_counted(Counted("study", 0, 10, 4, COUNT, 2), range(4))
