"""Files with sums of experts: damaged, noted as whole, joined."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from outliers.errors import CaptureError, CorruptCapture
from outliers.experts import sums_files
from outliers.experts.sums_files import choose, has_sums, sums_path, write_sums
from tests.support.expert_tables import SEQUENCES, count, made_sums


def test_a_damaged_file_of_sums_counts_as_absent(capture):
    folder, plan, _, _, _, _ = capture
    if not plan.experts.values:
        return
    path = sums_path(folder, range(4))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not has_sums(folder, plan.experts, range(4))


def test_whether_sums_are_there_is_asked_without_reading_them(capture, monkeypatch):
    """A file that is as it was when it was written is not opened; any write into it is noticed."""
    folder, plan, _, _, _, _ = capture
    if not plan.experts.values:
        return
    wanted, path, read = range(SEQUENCES), sums_path(folder, range(4)), []

    def counted(*arguments, **options):
        read.append(arguments[0])
        return load(*arguments, **options)

    load = np.load
    monkeypatch.setattr(sums_files.np, "load", counted)
    assert has_sums(folder, plan.experts, wanted) and read == []
    note, times = path.with_suffix(".json"), path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a time that a program can't set has changed
    assert has_sums(folder, plan.experts, wanted) and read == [path]
    assert has_sums(folder, plan.experts, wanted) and read == [path], "it was found whole, and noted"
    note.write_text(note.read_text().replace('"bytes"', '"bites"'))
    assert has_sums(folder, plan.experts, wanted) and read == [path, path], (
        "a note that is not what was written counts for nothing"
    )
    note.unlink()
    other = replace(plan.experts, width=plan.experts.width + 1)
    assert not has_sums(folder, other, wanted) and has_sums(folder, plan.experts, wanted)
    assert not has_sums(folder, other, wanted), "what is noted is of the shapes too"


def test_damage_that_no_time_shows_is_found_when_sums_are_counted_and_read_again(capture, monkeypatch):
    """A disk that gives other bytes: counting says what lacks, and the next question no longer says that the sums are there."""
    folder, plan, _, _, _, _ = capture
    if not plan.experts.values:
        return
    path = sums_path(folder, range(4))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    sums_files.write_sealed(path.with_suffix(".json"), sums_files._noted(path, plan.experts, [0, 1, 2, 3]))
    assert has_sums(folder, plan.experts, range(SEQUENCES))
    with pytest.raises(CaptureError, match="of 4 of 6 sequences: extract again"):
        count(capture)
    assert not has_sums(folder, plan.experts, range(SEQUENCES))
    assert len(choose(folder, plan.experts, range(SEQUENCES))) == 1, "the sequences are read again"


def test_sums_are_joined_in_place_to_the_same_bits(capture):
    folder, plan, _, _, _, _ = capture
    if not plan.experts.values:
        return
    one, two = (sums_files.read_sums(sums_path(folder, span), plan.experts) for span in (range(4), range(4, 6)))
    wanted, arrays = one.merged(two), one.total
    joined = one.joined(two)
    assert joined.total is arrays
    for name, value in vars(wanted).items():
        assert name == "shapes" or value.tobytes() == getattr(joined, name).tobytes(), name


def test_sums_of_other_tokens_than_the_routing_are_refused(capture):
    """A sequence twice, or not at all, in sums that name it."""
    folder, plan, _, table, _, _ = capture
    if not plan.experts.values:
        return
    for sequences in ((0, 1, 2), (0, 1, 2, 3, 3)):
        sums = made_sums(plan.experts, sequences, np.random.default_rng(0), table)
        sums.sequences = np.arange(4)
        write_sums(sums_path(folder, range(4)), sums)
        with pytest.raises(CorruptCapture, match="sums of other tokens than the routing"):
            count(capture)
