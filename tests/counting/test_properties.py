"""What must hold of any capture: every array of a Summary equals a brute-force float64 oracle, however it was counted."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.corpus.tokens import load_corpus
from outliers.counting import analyze as analysis
from outliers.counting.analyze import WorkItem, frame_of, layout_of_capture, summarize, summarize_into_folder
from outliers.counting.bits import pattern_values
from outliers.counting.kernels import arguments
from outliers.counting.kernels import tile as kernels
from outliers.counting.summary import TOP_TOKENS, merge
from outliers.counting.summary_files import read_counts, read_summary
from outliers.workspace import open_workspace
from tests.counting.test_counting import same_bits
from tests.support import oracle, synthetic

LADDER = (1.5, 3.0, 6.0, 8.0, 40.0)
SITES = {
    "block": ("attn_in", "mlp_in"),
    "all": ("attn_in", "mlp_in", "resid"),
    "lone": ("mlp_in",),
}


@st.composite
def captures(draw):
    """A small capture: any dtype, site set, width (multiples of 32 have a way of their own), lengths, share of hits."""
    dtype = draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    sites = SITES[draw(st.sampled_from(sorted(SITES)))]
    width = draw(st.sampled_from([1, 5, 31, 32, 33, 64, 96]))
    layers, sequences, positions = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale, nonfinite = draw(st.sampled_from([0.1, 0.8, 2.0, 30.0])), draw(st.sampled_from([0.0, 0.0, 0.02]))
    acts, exact = {}, {}
    for site in sites:
        values = rng.standard_normal((layers, sequences, positions, width)) * scale
        ties = rng.random(values.shape) < 0.03
        values[ties] = rng.choice([*LADDER, -3.0, 5.984375, 6.015625], ties.sum())
        values[rng.random(values.shape) < 0.02] = -0.0
        values[..., rng.random(width) < 0.1] *= 40
        values[..., rng.random(width) < 0.1] = 7.0  # more equal magnitudes than a list of tokens holds
        values[rng.random(values.shape) < nonfinite] = np.nan
        values[rng.random(values.shape) < nonfinite] = -np.inf
        acts[site], exact[site] = synthetic.store(values.astype(np.float32), dtype)
    lengths = draw(st.lists(st.integers(1, positions), min_size=sequences, max_size=sequences))
    return dtype, acts, exact, lengths


@settings(max_examples=60, deadline=None)
@given(captures(), st.sampled_from([200, 4096, 1 << 23]), st.sampled_from([16, 1000, 1 << 19]), st.integers(1, 3))
def test_a_summary_equals_the_oracle(capture, chunk_bytes, tile_bytes, workers):
    dtype, acts, exact, lengths = capture
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "TILE_BYTES", tile_bytes)
        summary, counts = count(Path(place), dtype, acts, lengths, chunk_bytes, workers)
    check_summary(summary, counts, exact, lengths, dtype)


def check_summary(summary, counts, exact, lengths, dtype):
    """A Summary and its sequences' counts equal the oracle's."""
    found = oracle.totals(exact, LADDER, lengths)
    assert summary.tokens == sum(lengths)
    for site, wanted in found.items():
        totals = summary.sites[site]
        for name in ("hits", "first_hits", "union", "first_union", "max", "min", "nonfinite", "finite"):
            if name in wanted:
                np.testing.assert_array_equal(getattr(totals, name), wanted[name], err_msg=f"{site} {name}")
        if "moments" in wanted:
            error = np.abs(totals.moments - wanted["moments"])
            assert (error <= 1e-12 * wanted["absolute"]).all(), site
            check_histogram(totals, exact[site], lengths, dtype)
    check_tokens(summary, exact, lengths)
    for one in counts:
        alone = {site: values[:, one.sequence : one.sequence + 1] for site, values in exact.items()}
        own = oracle.totals(alone, LADDER, lengths[one.sequence : one.sequence + 1])
        step = LADDER.index(6.0)
        assert one.tokens == lengths[one.sequence]
        for site, wanted in own.items():
            np.testing.assert_array_equal(one.hits[site], wanted["hits"][step])
            np.testing.assert_array_equal(one.union[site], wanted["union"][step])
            if site != "block":
                reach = np.maximum(np.abs(wanted["max"]), np.abs(wanted["min"]))
                reach = np.where(np.isfinite(reach), reach, 0.0).max(axis=1)
                np.testing.assert_array_equal(one.reach[site], reach)


def count(place, dtype, acts, lengths, chunk_bytes, workers):
    """The Summary of a capture that is written in chunks of that size, and the counts of its sequences."""
    workspace = open_workspace(place)
    site = "block" if "attn_in" in acts else next(iter(acts))
    prepared = synthetic.prepared_for(acts, dtype, {"ladder": LADDER, "site": site}, lengths=lengths)
    synthetic.write_capture(prepared, workspace, acts, chunk_bytes=chunk_bytes, lengths=lengths)
    folder = analysis.analyze(prepared, workspace, synthetic.Silent(), workers=workers)
    summary = read_summary(folder)
    return summary, list(read_counts(folder, summary.frame))


def check_histogram(totals, exact, lengths, dtype):
    """Counts by value, not by pattern: the oracle knows no bits."""
    values, _ = pattern_values(dtype)
    for layer in range(exact.shape[0]):
        own = np.concatenate([exact[layer, s, :length].ravel() for s, length in enumerate(lengths)])
        own = own[np.isfinite(own)]
        if dtype == "float32":
            own = np.array([oracle.to_bfloat16(x) for x in own])
        wanted, times = np.unique(own, return_counts=True)  # -0.0 and 0.0 are one value here
        used = np.flatnonzero(totals.histogram[layer])
        found = {}
        for pattern in used:
            found[values[pattern]] = found.get(values[pattern], 0) + int(totals.histogram[layer, pattern])
        assert found == dict(zip(wanted.tolist(), times.tolist(), strict=True))


def check_tokens(summary, exact, lengths):
    frame = summary.frame
    best = oracle.largest_tokens(exact, frame.site, 6.0, lengths, TOP_TOKENS)
    cells = {}
    for cell in summary.top:
        place = (int(cell["sequence"]), int(cell["position"]), int(cell["layer"]), frame.captured[cell["site"]])
        cells.setdefault(int(cell["feature"]), []).append((*place, float(cell["value"])))
    assert cells == best
    tokens = oracle.largest_tokens(exact, frame.site, 6.0, lengths, 10**9)
    # synthetic's ids count on from sequence to sequence
    special = {divmod(number, frame.positions) for number in (1, 3)}
    for feature, own in tokens.items():
        assert summary.first_tokens[feature] == sum(cell[1] == 0 for cell in own)
        assert summary.special_tokens[feature] == sum(cell[:2] in special for cell in own)
        delimiters = [cell for cell in own if cell[1] % 5 == 0 and cell[:2] not in special]  # synthetic's pieces
        assert summary.delimiter_tokens[feature] == len(delimiters)
        bins = np.bincount([cell[1] // frame.bin_positions for cell in own], minlength=frame.bins)
        np.testing.assert_array_equal(summary.position_tokens[:, feature], bins)


@settings(max_examples=25, deadline=None)
@given(captures(), st.data())
def test_however_it_is_counted_the_bits_are_the_same(capture, data):
    """Chunks, codec, order of writing, tiles, threads, parts of an executor, and merging in any order."""
    dtype, acts, _, lengths = capture
    sequences = len(lengths)
    with tempfile.TemporaryDirectory() as place:
        first, counts = count(Path(place) / "plain", dtype, acts, lengths, 1 << 23, 1)
        workspace = open_workspace(Path(place) / "other")
        site = first.frame.site
        prepared = synthetic.prepared_for(acts, dtype, {"ladder": LADDER, "site": site}, lengths=lengths)
        written = {
            "chunk_bytes": data.draw(st.sampled_from([100, 777, 1 << 23])),
            "codec": data.draw(st.sampled_from(["none", "zstd"])),
            "order": data.draw(st.permutations(range(sequences))),
        }
        synthetic.write_capture(prepared, workspace, acts, lengths=lengths, **written)
        with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
            patch.setattr(analysis, "TILE_BYTES", data.draw(st.sampled_from([1, 500, 1 << 19])))
            folder = analysis.analyze(prepared, workspace, synthetic.Silent(), executor=pool, workers=2)
        other = read_summary(folder)
        same_bits(first, other)
        for mine, theirs in zip(counts, read_counts(folder, other.frame), strict=True):
            assert_same_counts(mine, theirs)
        pieces = [summarize(part_of(prepared, workspace, [s], Path(place))) for s in range(sequences)]
        total = None
        for number in data.draw(st.permutations(range(sequences))):
            total = pieces[number] if total is None else merge(total, pieces[number])
        same_bits(first, total)


def part_of(prepared, workspace, sequences, place):
    """Some sequences of a capture as a work item."""
    folder, corpus = workspace.capture(prepared.capture_id), load_corpus(prepared.corpus, workspace)
    frame, marks = frame_of(prepared, layout_of_capture(folder)), corpus.marks()
    target = Path(tempfile.mkdtemp(dir=place)) / "part"
    return WorkItem(folder, frame, tuple(sequences), corpus.lengths[sequences], marks[sequences], target)


def assert_same_counts(one, other):
    assert (one.sequence, one.tokens) == (other.sequence, other.tokens)
    for name in ("hits", "union", "reach"):
        for site, values in getattr(one, name).items():
            np.testing.assert_array_equal(values, getattr(other, name)[site])
    np.testing.assert_array_equal(one.hooks, other.hooks)
    np.testing.assert_array_equal(one.legacy_union, other.legacy_union)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_moments_do_not_depend_on_threads_at_all(tmp_path, dtype):
    """Float sums are added in the order of the sequences, whoever was first: the table is the same file every time."""
    values = np.random.default_rng(0).standard_normal((4, 6, 50, 40)).astype(np.float32)
    acts = {site: synthetic.store(values * scale, dtype)[0] for site, scale in (("attn_in", 1), ("mlp_in", 3))}
    prepared = synthetic.prepared_for(acts, dtype)
    workspace = open_workspace(tmp_path)
    synthetic.write_capture(prepared, workspace, acts, chunk_bytes=900)
    moments = []
    for workers in (1, 2, 5, 1):
        summary = read_summary(analysis.analyze(prepared, workspace, synthetic.Silent(), workers=workers))
        moments.append(b"".join(summary.sites[site].moments.tobytes() for site in acts))
    assert len(set(moments)) == 1


def test_a_float32_is_counted_as_the_bfloat16_it_rounds_to():
    """Ties to even, as torch rounds; the largest finite ones would become infinite, and stay the largest finite."""
    bits = np.concatenate([np.array([0x40C08000, 0x40BF8000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x80000001], np.uint32),
                           np.random.default_rng(0).integers(0, 0x7F7F0000, 500, np.uint32)])  # fmt: skip
    histogram = np.zeros(65_536, np.uint32)
    kernels._tally(bits, arguments.FLOAT32, histogram)
    rounded = torch.from_numpy(bits.view(np.float32)).to(torch.bfloat16).view(torch.uint16).numpy().astype(np.int64)
    rounded[(rounded & 0x7FFF) == 0x7F80] -= 1
    np.testing.assert_array_equal(histogram, np.bincount(rounded, minlength=65_536))


def test_a_part_that_is_counted_twice_stays_as_it_was(tmp_path):
    """A worker that was given up and lives writes the same folder again: the first whole one stays, nothing else does."""
    acts = {"mlp_in": synthetic.store(np.random.default_rng(0).standard_normal((2, 3, 9, 5)) * 5, "bfloat16")[0]}
    prepared = synthetic.prepared_for(acts, "bfloat16")
    workspace = open_workspace(tmp_path)
    synthetic.write_capture(prepared, workspace, acts)
    part = part_of(prepared, workspace, [0, 2], tmp_path)
    folder = Path(summarize_into_folder(part))
    before = (folder / "totals.npz").stat().st_mtime_ns
    assert summarize_into_folder(part) == str(folder)
    assert (folder / "totals.npz").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert [one.sequence for one in read_counts(folder, part.frame)] == [0, 2]
