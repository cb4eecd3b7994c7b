"""The numbers: SCIENCE.md's worked example, a brute-force oracle that shares no code, and what must not matter."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outliers.counting.bits import legacy_threshold_bits, threshold_bits
from outliers.counting.summary import Summary, merge
from outliers.counting.summary_files import read_counts
from outliers.errors import SummaryMismatch
from outliers.workspace import open_workspace
from tests.support import oracle, synthetic

DTYPES = ("bfloat16", "float16", "float32")
BLOCK = ("attn_in", "mlp_in")


def worked_example(value=5.999):
    """8 layers x 100 tokens, one site; features a to e of SCIENCE.md."""
    acts = np.zeros((8, 1, 100, 5), np.float32)
    acts[0:2, 0, 0:24, 0] = 7
    acts[0, 0, 0:47, 1] = 7
    acts[1, 0, 0, 1] = 7
    for layer in range(8):
        acts[layer, 0, layer, 2] = 7
    acts[:, 0, 0, 3] = 7
    acts[:, 0, :, 4] = value
    return acts


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        # feature e, 5.999 everywhere, is a hit in bfloat16 alone: there it is 6.0
        ("float32", {"pooled": {0, 1}, "union": {0, 1, 2}, "per_layer": {0}, "affected": {0, 1}}),
        ("bfloat16", {"pooled": {0, 1, 4}, "union": {0, 1, 2, 4}, "per_layer": {0, 4}, "affected": {0, 1, 4}}),
    ],
)
def test_worked_example(workspace, dtype, expected):
    stored, _ = synthetic.store(worked_example(), dtype)
    prepared = synthetic.prepared_for({"attn_in": stored}, dtype)
    synthetic.write_capture(prepared, workspace, {"attn_in": stored})
    _, content = synthetic.study(prepared, workspace)
    found = {name: {f["feature"] for f in features} for name, features in content["readings"]["attn_in"].items()}
    assert found == expected
    a = next(f for f in content["systematic"] if f["feature"] == 0)
    assert (a["layer_fraction"], a["position_fraction"], a["layers"]) == (0.25, 0.06, [0, 1])
    assert (a["hits"], a["sequences"], a["of_sequences"], a["first_token_hits"]) == (48, 1, 1, 2)


def random_acts(seed, dtype, sites=BLOCK, shape=(4, 3, 20), width=6, nonfinite=True):
    """Heavy-tailed values around the threshold, columns that hit often, exact ties, and a few non-finite values."""
    rng = np.random.default_rng(seed)
    acts, exact = {}, {}
    for site in sites:
        values = rng.standard_t(3, (*shape, width)).astype(np.float32) * rng.uniform(0.2, 5, width).astype(np.float32)
        values[rng.random(values.shape) < 0.05] = 6.0
        values[rng.random(values.shape) < 0.03] = -5.99
        values[rng.random(values.shape) < 0.03] = 0.0
        values[rng.random(values.shape) < 0.03] = -0.0
        if nonfinite:
            values[rng.random(values.shape) < 0.01] = np.nan
            values[rng.random(values.shape) < 0.01] = -np.inf
        acts[site], exact[site] = synthetic.store(values, dtype)
    return acts, exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_readings_equal_the_oracle(tmp_path, dtype, seed):
    acts, exact = random_acts(seed, dtype, sites=(*BLOCK, "resid"))
    criteria = {
        "layer_fraction": 0.5,
        "position_fraction": round(0.1 + 0.05 * seed, 2),
        "magnitude": [6.0, 4.5, 2.0, 9.0][seed],
    }
    workspace = open_workspace(tmp_path)
    prepared = synthetic.prepared_for(acts, dtype, criteria)
    synthetic.write_capture(prepared, workspace, acts)
    summary, content = synthetic.study(prepared, workspace)
    shares = (str(criteria["layer_fraction"]), str(criteria["position_fraction"]))
    masks = oracle.hit_masks(exact, criteria["magnitude"])
    passed = 0
    for site, mask in masks.items():
        wanted = oracle.readings(mask, *shares)
        for reading, features in wanted.items():
            rows = content["readings"][site][reading]
            assert {f["feature"] for f in rows} == features, (site, reading)
            passed += len(features)
            alone = [oracle.readings(mask[:, s : s + 1], *shares)[reading] for s in range(3)]
            for row in rows:
                assert row["sequences"] == sum(row["feature"] in one for one in alone)
                assert row["hits"] == int(mask[..., row["feature"]].sum())
                assert row["first_token_hits"] == int(mask[:, :, 0, row["feature"]].sum())
            assert [(-r["max_magnitude"], r["feature"]) for r in rows] == sorted(
                (-r["max_magnitude"], r["feature"]) for r in rows
            )
    assert passed, "the example is too tame to say anything"
    rounded = {site: np.vectorize(oracle.to_bfloat16)(exact[site]) for site in BLOCK}
    pairs = oracle.legacy_pairs(oracle.hit_masks(rounded, 6.0 if seed == 0 else criteria["magnitude"]), *shares)
    assert content["readings"]["block"]["legacy"]["feature_sequence_pairs"] == len(pairs)
    times = {f["feature"]: f["sequences"] for f in content["readings"]["block"]["legacy"]["features"]}
    assert times == {j: sum(pair[1] == j for pair in pairs) for j in {pair[1] for pair in pairs}}
    assert summary.tokens == 60


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_numbers_equal_the_oracle(workspace, dtype):
    acts, exact = random_acts(7, dtype)
    prepared = synthetic.prepared_for(acts, dtype)
    synthetic.write_capture(prepared, workspace, acts)
    summary, content = synthetic.study(prepared, workspace)
    for row in content["layers"]:
        values = exact[row["site"]][row["layer"]].ravel()
        finite = values[np.isfinite(values)]
        assert row["nonfinite"] == values.size - finite.size > 0
        assert row["max_magnitude"] == np.abs(finite).max()
        assert row["hits"] == int((np.abs(finite) >= 6.0).sum())
        if dtype == "float32":
            finite = np.array([oracle.to_bfloat16(x) for x in finite])
        assert row["kurtosis"] == pytest.approx(oracle.pearson_kurtosis(finite), rel=1e-12)
        assert row["median_magnitude"] == np.median(np.abs(finite))
    for site in BLOCK:
        for layer, j in itertools.product(range(4), range(6)):
            column = exact[site][layer, :, :, j].ravel()
            column = column[np.isfinite(column)]
            totals = summary.sites[site]
            assert totals.max[layer, j] == column.max()
            assert totals.min[layer, j] == column.min()
            assert totals.finite[layer, j] == column.size
            for power in range(4):
                assert totals.moments[power, layer, j] == pytest.approx(
                    (column ** (power + 1)).sum(), rel=1e-11, abs=1e-9
                )


def test_sweep_equals_the_oracle_at_every_magnitude(workspace):
    acts, exact = random_acts(3, "bfloat16")
    prepared = synthetic.prepared_for(acts, "bfloat16", {"ladder": (1.0, 3.0, 4.5), "position_fraction": 0.2})
    synthetic.write_capture(prepared, workspace, acts)
    _, content = synthetic.study(prepared, workspace)
    assert content["sweep"]["magnitudes"] == [1.0, 3.0, 4.5, 6.0]
    for step, magnitude in enumerate(content["sweep"]["magnitudes"]):
        for site, mask in oracle.hit_masks(exact, magnitude).items():
            wanted = {reading: len(features) for reading, features in oracle.readings(mask, "0.25", "0.2").items()}
            found = {reading: counts[step] for reading, counts in content["sweep"]["counts"][site].items()}
            assert found == wanted, (site, magnitude)


WHOLE = (
    "sequences",
    "position_tokens",
    "first_tokens",
    "delimiter_tokens",
    "special_tokens",
    "top",
    "massive",
    "massive_cells",
    "massive_by_token",
)


def same_bits(a: Summary, b: Summary) -> None:
    """Everything but the float moments is equal, bit for bit."""
    assert a.frame == b.frame
    assert a.tokens == b.tokens
    for name in WHOLE:
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name
    for site in a.frame.sites:
        for name, value in a.sites[site].__dict__.items():
            other = getattr(b.sites[site], name)
            if name == "moments":
                np.testing.assert_allclose(value, other, rtol=1e-12, atol=1e-9)
            else:
                assert value.tobytes() == other.tobytes(), (site, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunking_codec_order_and_workers_change_nothing(tmp_path, dtype):
    acts, _ = random_acts(11, dtype, sites=(*BLOCK, "resid"), shape=(3, 5, 40))
    for site in BLOCK:  # a feature of zeros of both signs: which of the two a maximum keeps depends on the order
        zeros = np.where(np.random.default_rng(1).random((3, 5, 40)) < 0.5, -0.0, 0.0)
        acts[site][..., 5] = synthetic.store(zeros, dtype)[0]
    acts["resid"], _ = synthetic.store(np.random.default_rng(0).standard_t(2, (3, 5, 40, 6)) * 60, dtype)
    prepared = synthetic.prepared_for(acts, dtype)
    variants = [
        ({}, {"workers": 1}),
        ({"chunk_bytes": 200}, {"workers": 3}),
        ({"order": [4, 2, 0, 3, 1]}, {"workers": 2}),
        ({"codec": "zstd", "chunk_bytes": 333}, {"executor": ThreadPoolExecutor(2), "workers": 5}),
    ]
    found = []
    for number, (written, read) in enumerate(variants):
        workspace = open_workspace(tmp_path / str(number))
        layout = synthetic.write_capture(prepared, workspace, acts, **written)
        summary, content = synthetic.study(prepared, workspace, **read)
        counts = list(read_counts(workspace.summary(prepared.capture_id, prepared.study_id), summary.frame))
        found.append((summary, content, counts, layout))
    assert found[1][3].position_chunks > 1
    assert found[0][0].massive.size
    assert found[0][0].top.size
    for summary, content, counts, _ in found[1:]:
        same_bits(found[0][0], summary)
        assert content == found[0][1]
        for one, other in zip(found[0][2], counts, strict=True):
            assert all((one.hits[site] == other.hits[site]).all() for site in summary.frame.sites)
            assert (one.legacy_union == other.legacy_union).all()
            assert (one.hooks == other.hooks).all()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(5)), st.integers(1, 4))
def test_merge_is_commutative_and_associative(parts, order, cut):
    pieces = [parts[n] for n in order]
    left = pieces[0]
    for piece in pieces[1:]:
        left = merge(left, piece)
    head, tail = pieces[0], pieces[cut]
    for piece in pieces[1:cut]:
        head = merge(head, piece)
    for piece in pieces[cut + 1 :]:
        tail = merge(piece, tail)
    same_bits(left, merge(tail, head))
    same_bits(left, merge(Summary.zero(left.frame), left))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Summaries of the five sequences of one capture, one each."""
    from outliers.corpus.tokens import load_corpus
    from outliers.counting.analyze import WorkItem, frame_of, layout_of_capture, summarize

    acts, _ = random_acts(5, "bfloat16", sites=(*BLOCK, "resid"), shape=(3, 5, 30))
    workspace = open_workspace(tmp_path_factory.mktemp("parts"))
    prepared = synthetic.prepared_for(acts, "bfloat16")
    synthetic.write_capture(prepared, workspace, acts)
    folder, corpus = workspace.capture(prepared.capture_id), load_corpus(prepared.corpus, workspace)
    frame, marks = frame_of(prepared, layout_of_capture(folder)), corpus.marks()
    target = tmp_path_factory.mktemp("summary")
    return [
        summarize(WorkItem(folder, frame, (s,), corpus.lengths[s : s + 1], marks[s : s + 1], target / str(s)))
        for s in range(5)
    ]


def test_merge_refuses_a_shared_sequence_and_another_study(parts):
    with pytest.raises(SummaryMismatch, match="sequence 0 is in both"):
        merge(merge(parts[0], parts[1]), parts[0])
    other = Summary.zero(type(parts[0].frame)(**(parts[0].frame.__dict__ | {"magnitude": 5.0, "ladder": (5.0,)})))
    with pytest.raises(SummaryMismatch, match="does not merge"):
        merge(parts[0], other)


def test_where_the_largest_values_sit(workspace):
    """tokens.json points at the planted cells, and counts first tokens and delimiters by the union of the block."""
    from outliers.corpus.tokens import load_corpus
    from outliers.results.schema import StudySummary
    from outliers.results.top_tokens import describe_tokens

    values = {site: np.full((4, 2, 40, 3), 0.5, np.float32) for site in BLOCK}
    values["attn_in"][:, :, 0:12, 1] = 9.0  # positions 0..11 of both sequences; 0, 5, 10 are delimiters
    values["mlp_in"][2, 1, 7, 1] = -30.0
    acts = {site: synthetic.store(value, "bfloat16")[0] for site, value in values.items()}
    prepared = synthetic.prepared_for(acts, "bfloat16")
    synthetic.write_capture(prepared, workspace, acts, chunk_bytes=90)
    summary, content = synthetic.study(prepared, workspace)
    corpus = load_corpus(prepared.corpus, workspace)
    tokens = synthetic.plain(describe_tokens(prepared, summary, StudySummary.model_validate(content), corpus))
    (feature,) = tokens["features"]
    assert (feature["feature"], feature["tokens"]) == (1, 24)
    assert feature["first_token_share"] == 2 / 24
    assert feature["delimiter_share"] == 6 / 24
    assert feature["special_share"] == 2 / 24
    assert sum(feature["positions"]["counts"]) == 24
    best = feature["top"][0]
    assert (best["value"], best["site"], best["layer"], best["sequence"], best["position"]) == (
        -30.0,
        "mlp_in",
        2,
        1,
        7,
    )
    assert (best["token"], best["before"][-3:], best["after"][:3]) == (" w7", " w6", " w8")
    assert [(t["sequence"], t["position"], t["layer"]) for t in feature["top"][1:3]] == [(0, 0, 0), (0, 1, 0)]


def test_massive_activations_by_hand(workspace):
    """|x| > 100 and at least 1000 times the layer's median: 99 times too small, exactly 100 is not above it."""
    values = np.full((2, 1, 50, 4), 0.25, np.float32)  # median 0.25 in layer 0, so 250 is the least
    values[0, 0, 3, 1] = -250.0
    values[0, 0, 4, 2] = 249.0
    values[1] = 0.0625  # 62.5 would do, but for the strict > 100
    values[1, 0, 9, 0] = 100.0
    values[1, 0, 9, 3] = 101.0
    stored, _ = synthetic.store(values, "bfloat16")
    prepared = synthetic.prepared_for({"resid": stored}, "bfloat16")
    synthetic.write_capture(prepared, workspace, {"resid": stored})
    _, content = synthetic.study(prepared, workspace)
    found = [(m["layer"], m["position"], m["feature"], m["value"], m["ratio"]) for m in content["massive"]]
    assert found == [(0, 3, 1, -250.0, 1000.0), (1, 9, 3, 101.0, 1616.0)]
    assert content["massive_count"] == 2
    assert content["massive"][1]["token_median"] == pytest.approx((0.0625 + 100) / 2)


@pytest.mark.parametrize("dtype", DTYPES)
@given(magnitude=st.floats(0.01, 60000))
@settings(max_examples=80, deadline=None)
def test_threshold_is_the_smallest_value_not_below(dtype, magnitude):
    import torch

    kind = getattr(torch, dtype)
    integer = torch.int32 if dtype == "float32" else torch.int16
    bits = threshold_bits(magnitude, dtype)
    at, below = (torch.tensor([b], dtype=integer).view(kind).double().item() for b in (bits, bits - 1))
    assert below < magnitude <= at


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("magnitude", [6.0, 6.03125, 3.0, 8.0, 5.0, 4.03])
def test_legacy_threshold_is_the_smallest_value_that_rounds_up_to_it(dtype, magnitude):
    import torch

    kind = getattr(torch, dtype)
    integer = torch.int32 if dtype == "float32" else torch.int16
    bits = legacy_threshold_bits(magnitude, dtype)
    at, below = (
        torch.tensor([b], dtype=integer).view(kind).to(torch.bfloat16).double().item() for b in (bits, bits - 1)
    )
    assert below < magnitude <= at
