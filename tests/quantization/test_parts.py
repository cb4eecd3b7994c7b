"""Formats of a study in parts: each part's machine has its own sequences alone, and the joined errors are those of one
machine, bit for bit."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outliers.counting.analyze import analyze
from outliers.counting.merge import merge_summaries
from outliers.counting.summary_files import read_summary
from outliers.errors import BadInput, CaptureError, CorruptCapture, SummaryMismatch
from outliers.files.sealed import seal_folder
from outliers.quantization.joining import join_errors, join_ranges, plan_of
from outliers.quantization.measure import measure_formats, measure_part
from outliers.results.format_errors import errors_table, read_errors, read_part_errors, write_errors
from outliers.steps import run_formats
from tests.support import synthetic
from tests.support.format_parts import EVERY, World, errors_of


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    cuts=st.sets(st.integers(1, 5), min_size=1, max_size=3).map(sorted),
    formats=st.sets(st.sampled_from(EVERY), min_size=1, max_size=4).map(sorted).map(tuple),
    tokens=st.integers(1, 60),
    backwards=st.booleans(),
)
def test_parts_give_what_one_machine_gives(tmp_path_factory, seed, dtype, cuts, formats, tokens, backwards):
    world = World(tmp_path_factory.mktemp("w"), cuts, seed=seed, dtype=dtype, formats=formats, tokens=tokens)
    folders = world.count()
    found, _ = world.merged(folders[::-1] if backwards else folders)
    assert errors_of(found) == errors_of(world.whole())


def test_what_is_held_out_and_what_needs_no_second_pass(tmp_path):
    """Feature 9 is systematic by its hits in the first part alone: the second part holds it out all the same."""
    world = World(tmp_path / "a", [2])
    found, rounds = world.merged(world.count())
    assert rounds == ["ranges", "errors"]
    rows = errors_table(read_errors(found, world.prepared)).to_pylist()
    assert {row["held_out"] for row in rows} == {0, 3}
    second = read_part_errors(world.own(world.places[1]), world.prepared)
    assert second.ranges and second.sequences.size and {row.held_out for row in second.rows} == {0, 3}
    with pytest.raises(CaptureError, match="are of a part of the corpus: merge those of all parts"):
        read_errors(world.own(world.places[1]), world.prepared)
    plain = World(tmp_path / "b", [2], formats=("int8_token", "int8_channel"))
    assert plain.merged(plain.count())[1] == ["errors"]  # every range is in the summaries


def test_a_part_measures_once_and_counts_once(tmp_path, monkeypatch):
    world = World(tmp_path, [2])
    folders = world.count()
    whole, _ = world.merged(folders)
    before = errors_of(whole)
    monkeypatch.setattr("outliers.quantization.measure._Tiles.of", None)
    monkeypatch.setattr("outliers.counting.analyze.analyze", None)
    assert world.count() == folders
    for place, span in zip(world.places, world.spans, strict=True):
        measure_part(world.prepared, place, synthetic.Silent(), span, whole)
    assert errors_of(world.merged(folders)[0]) == before


def test_errors_beside_other_ranges_are_not_joined(tmp_path):
    world = World(tmp_path, [2])
    folders = world.count()
    whole, _ = world.merged(folders)
    plan = plan_of(world.prepared, world.home, read_summary(whole))
    ranges = join_ranges(plan, folders)
    assert join_errors(ranges, folders[:1]) is None and join_ranges(plan, folders[:1]) is None
    for key in ranges.largest:
        ranges.largest[key] = ranges.largest[key] * np.float32(2)
    del ranges.digest
    assert join_errors(ranges, folders) is None
    # a part that is counted anew, with a larger value, makes another plan
    larger = world.acts["attn_in"].copy()
    larger[0, 1, 1, 1] = 0x4640  # 12,288 in bfloat16
    world.acts["attn_in"] = larger
    shutil.rmtree(world.places[0].capture(world.prepared.capture_id))
    again = world.place("part0", world.spans[0])
    analyze(world.prepared, again, synthetic.Silent(), sequences=world.spans[0])
    summary = read_summary(merge_summaries(folders, world.home).folder)
    assert join_ranges(plan_of(world.prepared, world.home, summary), folders) is None
    assert errors_of(world.merged(folders)[0]) == errors_of(world.whole())


@pytest.mark.parametrize(
    ("change", "how"),
    [
        ("errors", lambda found: found.errors * -1),
        ("squares", lambda found: found.squares * np.nan),
        ("tokens", lambda found: found.tokens + 100),
        ("errors", lambda found: found.errors[:, :1]),
        ("sequences", lambda found: found.sequences + 1),
        ("lengths", lambda found: found.lengths + 1),
        ("rows", lambda found: found.rows[::-1]),
        ("errors", lambda found: found.errors.astype(np.float32)),
    ],
)
def test_errors_that_are_none_are_refused(tmp_path, change, how):
    from dataclasses import replace

    world = World(tmp_path, [3], formats=("int8_token", "int8_tensor"))
    folders = world.count()
    whole, _ = world.merged(folders)
    ranges = join_ranges(plan_of(world.prepared, world.home, read_summary(whole)), folders)
    found = read_part_errors(folders[0], world.prepared)
    write_errors(folders[0], replace(found, **{change: how(found)}))
    with pytest.raises(CorruptCapture, match=r"of this study|of another study"):
        join_errors(ranges, folders)


def test_ranges_that_are_none_are_refused(tmp_path):
    world = World(tmp_path, [3])
    folders = world.count()
    whole, _ = world.merged(folders)
    plan, path = plan_of(world.prepared, world.home, read_summary(whole)), folders[0] / "ranges" / "ranges.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    for name, value, said in (
        ("largest.0", -arrays["largest.0"] - 1, "holds no magnitudes"),
        ("largest.0", arrays["largest.0"] * np.nan, "holds no magnitudes"),
        ("largest.0", arrays["largest.0"][:1], "holds no magnitudes"),
        ("keys", np.array("[]"), "of other formats"),
    ):
        np.savez(path, **(arrays | {name: value}))
        seal_folder(path.parent, ("ranges.npz",))
        with pytest.raises(CorruptCapture, match=said):
            join_ranges(plan, folders)
    path.write_bytes(path.read_bytes()[:-5])
    assert join_ranges(plan, folders) is None  # its checksum is another: it counts as absent


def test_what_a_part_can_not_measure_is_refused(tmp_path):
    world = World(tmp_path, [3])
    place, span, prepared = world.places[0], world.spans[0], world.prepared
    folders = world.count()
    whole, _ = world.merged(folders)
    with pytest.raises(CaptureError, match=r"is of 3 of 6 sequences.*merge the summaries of all parts first"):
        measure_part(prepared, place, synthetic.Silent(), span, folders[0])
    with pytest.raises(CaptureError, match=r"of the sequences 0:3, and not of 0:2: analyze those first"):
        measure_part(prepared, place, synthetic.Silent(), range(2), whole)
    with pytest.raises(CaptureError, match="need the range of all"):
        measure_formats(prepared, place, synthetic.Silent())
    other = World(tmp_path / "other", [3], seed=8)
    smaller, _ = other.merged(other.count())
    with pytest.raises(SummaryMismatch, match="was not joined from the one in"):
        measure_part(prepared, place, synthetic.Silent(), span, smaller)
    formats = prepared.spec.formats.model_copy(update={"formats": ()})
    none = prepared.model_copy(update={"spec": prepared.spec.model_copy(update={"formats": formats})})
    with pytest.raises(BadInput, match="the study names no formats"):
        run_formats(none, place, synthetic.Silent(), sequences=span, summary=whole)
