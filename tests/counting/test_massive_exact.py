"""Massive activations of float32 values, where a median rounded to bfloat16 decides otherwise: brute force."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.corpus.tokens import load_corpus
from outliers.counting.analyze import analyze
from outliers.counting.merge import merge_summaries
from outliers.counting.second_look import bin_ends, bin_of
from outliers.results.write import load_findings, summarize_study, write_results
from outliers.workspace import open_workspace
from tests.support import oracle, synthetic

SHAPE = (3, 4, 30, 16)


def middle(values):
    """The median as the mean of the two middle ones, exactly."""
    ordered = sorted(abs(float(x)) for x in values)
    return (Fraction(ordered[(len(ordered) - 1) // 2]) + Fraction(ordered[len(ordered) // 2])) / 2


def brute(resid):
    """(layer, sequence, position, feature) of every massive activation, and the median of each layer."""
    found, medians = set(), []
    for layer, values in enumerate(resid):
        finite = values[np.isfinite(values)]
        medians.append(middle(finite))
        for at in np.argwhere(np.isfinite(values) & (np.abs(values) > 100)):
            if Fraction(abs(float(values[tuple(at)]))) >= 1000 * medians[-1]:
                found.add((layer, *at.tolist()))
    return found, medians


def on_the_edge(seed, crowd=0, shape=SHAPE):
    """Medians between two bfloat16, and values a float32 above, on and below 1,000 times them. crowd: more of these a layer."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(shape) * rng.uniform(0.3, 3, (shape[0], 1, 1, 1))).astype(np.float32)
    values[0, 0, 0, 0] = np.nan
    for layer in range(shape[0]):
        places = rng.choice(values[layer].size, 9 + crowd, replace=False)
        flat = values[layer].reshape(-1)
        flat[places] = 1e30  # the median as it will be, whatever stands there in the end
        edge = np.float32(float(1000 * middle(flat[np.isfinite(flat)])))
        below, above = np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(np.inf))
        near = edge * rng.uniform(0.996, 1.004, places.size - 3).astype(np.float32)
        flat[places] = np.concatenate([[edge, -below, above], near]) * rng.choice([-1, 1], places.size)
    return values.astype(np.float32)


def study_of(tmp_path, resid, **options):
    stored, _ = synthetic.store(resid, "float32")
    prepared = synthetic.prepared_for({"resid": stored}, "float32")
    workspace = open_workspace(tmp_path)
    synthetic.write_capture(prepared, workspace, {"resid": stored}, chunk_bytes=900)
    return (prepared, workspace, *synthetic.study(prepared, workspace, **options))


def equals_brute_force(content, resid):
    found, medians = brute(resid)
    assert content["massive_count"] == len(found) > 0
    assert content["massive_undecided"] == 0
    named = {(m["layer"], m["sequence"], m["position"], m["feature"]): m for m in content["massive"]}
    assert len(named) == len(content["massive"]) == min(1000, len(found))
    assert named.keys() <= found
    for at, cell in named.items():
        assert cell["ratio"] == abs(float(resid[at])) / float(medians[at[0]])


@pytest.mark.parametrize("seed", range(4))
def test_the_verdict_is_of_the_exact_median(tmp_path, seed):
    resid = on_the_edge(seed)
    _, _, _, content = study_of(tmp_path, resid)
    equals_brute_force(content, resid)
    # what a median rounded to bfloat16 says differs: the example could fail
    finite = [values[np.isfinite(values)] for values in resid]
    rounded = [Fraction(oracle.to_bfloat16(float(middle(own)))) for own in finite]
    sizes = [np.abs(own[np.abs(own) > 100]) for own in finite]
    by_rounded = sum(Fraction(float(x)) >= 1000 * m for own, m in zip(sizes, rounded, strict=True) for x in own)
    assert by_rounded != content["massive_count"]


def test_more_than_are_kept_are_counted_exactly(tmp_path):
    """1,700 values about the border in each layer: the list ends after the largest 1,000, the count does not."""
    resid = on_the_edge(5, crowd=1700, shape=(2, 4, 60, 40))
    _, _, summary, content = study_of(tmp_path, resid)
    assert summary.massive_cells.min() > 1000
    equals_brute_force(content, resid)


@pytest.mark.parametrize("crowd", [0, 700])
def test_parts_make_the_whole(tmp_path, crowd):
    """Shards count bins about their own medians: merged, and by an executor, the numbers are those of one machine."""
    shape = SHAPE if not crowd else (2, 4, 60, 20)
    resid = on_the_edge(7, crowd, shape)
    prepared, _, _, content = study_of(tmp_path / "whole", resid)
    equals_brute_force(content, resid)
    assert study_of(tmp_path / "spread", resid, executor=ThreadPoolExecutor(2), workers=2)[3] == content
    stored, _ = synthetic.store(resid, "float32")
    folders = []
    for number, chosen in enumerate((range(1), range(1, 4))):
        workspace = open_workspace(tmp_path / str(number))
        synthetic.write_capture(prepared, workspace, {"resid": stored})
        folders.append(analyze(prepared, workspace, synthetic.Silent(), sequences=chosen))
    home = open_workspace(tmp_path / "home")
    synthetic.write_capture(prepared, home, {"resid": stored})
    found = load_findings(prepared, merge_summaries(folders, home).folder)
    assert synthetic.plain(summarize_study(prepared, found, load_corpus(prepared.corpus, home))) == content


def test_what_merged_parts_cannot_tell_is_said(tmp_path):
    """Medians of the shards far from each other, and too many values for further bins: a bound, and what it leaves open."""
    rng = np.random.default_rng(3)
    resid = np.empty((1, 2, 300, 500), np.float32)
    resid[0, 0], resid[0, 1] = rng.uniform(0.1, 0.2, (300, 500)), rng.uniform(0.3, 0.4, (300, 500))
    resid[0, 0, :150], resid[0, 1, :2] = 0.25 * rng.uniform(0.999, 1.001, (150, 500)), 0.25
    flat = resid[0, 0, 0]
    flat[:3] = [251.0, 1000.0, 249.9]
    stored, _ = synthetic.store(resid, "float32")
    prepared = synthetic.prepared_for({"resid": stored}, "float32")
    folders = []
    for number in range(2):
        workspace = open_workspace(tmp_path / str(number))
        synthetic.write_capture(prepared, workspace, {"resid": stored})
        folders.append(analyze(prepared, workspace, synthetic.Silent(), sequences=range(number, number + 1)))
    home = open_workspace(tmp_path / "home")
    synthetic.write_capture(prepared, home, {"resid": stored})
    folder = merge_summaries(folders, home).folder
    found, corpus = load_findings(prepared, folder), load_corpus(prepared.corpus, home)
    content = synthetic.plain(summarize_study(prepared, found, corpus))
    truth, medians = brute(resid)
    sure = {(m["layer"], m["sequence"], m["position"], m["feature"]) for m in content["massive"]}
    assert sure < truth or sure == truth
    assert content["massive_undecided"] > 0
    assert content["massive_count"] <= len(truth) <= content["massive_count"] + content["massive_undecided"]
    (note,) = [note for note in content["notes"] if "neither counted nor ruled out" in note]
    assert "layers 0" in note
    assert abs(content["massive"][0]["ratio"] / (1000.0 / float(medians[0])) - 1) < 0.004
    assert json.loads((write_results(prepared, home) / "summary.json").read_text())["massive_undecided"] > 0


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 0x7F7F_FFFF))
def test_a_bin_is_what_rounds_to_it(bits):
    value = float(np.uint32(bits).view(np.float32))
    number = int(bin_of(np.array([bits], np.uint32))[0])
    low, high = bin_ends(number, number)
    assert low <= value <= high
    if bits >= 0x0080_0000 and number < 0x7F7F:
        assert float((np.uint32(number) << np.uint32(16)).view(np.float32)) == oracle.to_bfloat16(value)
    for end, other in ((low, number), (high, number)):
        assert int(bin_of(np.array([end], np.float32).view(np.uint32))[0]) == other


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_median_of_zero_a_layer_of_nan_and_the_largest_float(tmp_path, dtype):
    """Of zeros any value above 100 is massive, and there is no ratio; a layer without a finite value has none."""
    resid = np.zeros((3, 2, 10, 6), np.float32)
    resid[0, 0, 3, 1], resid[0, 1, 2, 5], resid[0, 1, 2, 4] = 101.0, np.finfo(np.float32).max, 100.0
    resid[1] = np.nan
    resid[2] = 1e-30
    resid[2, 0, 0, 0] = np.inf
    resid[2, 0, 0, 1] = -150.0
    stored, exact = synthetic.store(resid, dtype)
    prepared = synthetic.prepared_for({"resid": stored}, dtype)
    workspace = open_workspace(tmp_path)
    synthetic.write_capture(prepared, workspace, {"resid": stored})
    _, content = synthetic.study(prepared, workspace)
    wanted = {(0, 0, 3, 1), (2, 0, 0, 1)} | ({(0, 1, 2, 5)} if np.isfinite(exact[0, 1, 2, 5]) else set())
    found = {(m["layer"], m["sequence"], m["position"], m["feature"]): m["ratio"] for m in content["massive"]}
    assert found.keys() == wanted
    assert (content["massive_count"], content["massive_undecided"]) == (len(wanted), 0)
    assert found[0, 0, 3, 1] is None
    assert found[2, 0, 0, 1] == 150 / float(exact[2, 1, 0, 0])
    assert content["layers"][1]["standard_deviation"] is None
