"""What goes with the lists: intervals over sequences, readings without first tokens, quantiles, massive by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.counting.kernels.massive import above
from outliers.results import bootstrap, ladders, lists
from outliers.results.criteria import quantile_magnitudes
from outliers.workspace import open_workspace
from tests.counting.test_counting import BLOCK, DTYPES, random_acts
from tests.support import oracle, synthetic

RESAMPLES = 40


def findings(tmp_path, acts, dtype="bfloat16", criteria=None, **options):
    workspace = open_workspace(tmp_path)
    prepared = synthetic.prepared_for(acts, dtype, criteria, **options)
    synthetic.write_capture(prepared, workspace, acts, **options)
    return synthetic.study(prepared, workspace)


@pytest.mark.parametrize("seed", range(3))
def test_intervals_equal_the_oracle_on_every_draw(tmp_path, monkeypatch, seed):
    """Each draw built for real, as a corpus with sequences twice or not at all, and judged by the brute-force oracle."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", RESAMPLES)
    monkeypatch.setattr(bootstrap, "BLOCK_CELLS", 300)  # several blocks of features
    acts, exact = random_acts(seed, "bfloat16", shape=(4, 5, 8), width=7)
    shares = ("0.5", ["0.1", "0.06", "0.2"][seed])
    criteria = {"layer_fraction": float(shares[0]), "position_fraction": float(shares[1]), "ladder": (6.0,)}
    _, content = findings(tmp_path, acts, criteria=criteria)
    assert content["intervals"]["resamples"] == RESAMPLES
    assert content["intervals"]["shares"] == "range over sequences"
    between = 0
    for site, mask in oracle.hit_masks(exact, 6.0).items():
        drawn = oracle.resampled(mask, RESAMPLES, *shares)
        for reading, passing in drawn.items():
            numbers = sorted(map(len, passing))
            low, high = content["intervals"]["counts"][site][reading]
            assert (low, high) == (numbers[1], numbers[-2]), (site, reading)  # 2.5% of 40 is one draw at each end
            for row in content["readings"][site][reading]:
                interval = row["interval"]
                assert interval["passes"] == sum(row["feature"] in one for one in passing) / RESAMPLES
                assert "layer_fraction" not in interval
                wanted = oracle.sequence_shares(mask, row["feature"], reading)
                if wanted is None:
                    assert interval["position_fraction"] is None
                    continue
                assert interval["position_fraction"] == pytest.approx([min(wanted), max(wanted)], abs=1e-9)
                between += min(wanted) < max(wanted)
    assert between, "every draw is alike: the example says nothing"


def test_an_interval_by_hand(tmp_path, monkeypatch):
    """Two sequences, one full of hits and one without: a draw holds it 0, 1 or 2 times, and its share is 0, 1/2 or 1."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 400)
    values = np.zeros((4, 2, 10, 1), np.float32)
    values[:, 0] = 7.0
    _, content = findings(tmp_path, {"mlp_in": synthetic.store(values, "bfloat16")[0]})
    (row,) = content["systematic"]
    random = np.random.RandomState(0)
    times = [int((random.randint(0, 2, 2) == 0).sum()) for _ in range(400)]
    assert row["position_fraction"] == 0.5
    assert row["interval"] == {"position_fraction": [0.0, 1.0], "passes": sum(n > 0 for n in times) / 400}
    assert content["intervals"] == {
        "level": 0.95,
        "resamples": 400,
        "seed": 0,
        "counts": {"mlp_in": {reading: [0, 1] for reading in ("pooled", "union", "per_layer", "affected")}},
        "shares": "range over sequences",
    }


@pytest.mark.parametrize("lengths", [None, [10 + n % 7 for n in range(16)]])
def test_from_16_sequences_on_an_interval_equals_the_oracle(tmp_path, monkeypatch, lengths):
    """Student's on the logit scale about a ratio of sums, from a table of t and plain loops."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 20)
    acts, exact = random_acts(1, "bfloat16", shape=(3, 16, 16), width=5)
    for site in BLOCK:
        acts[site][..., 4] = synthetic.store(np.full((3, 16, 16), 7.0, np.float32), "bfloat16")[0]
        exact[site][..., 4] = 7.0
    options = {} if lengths is None else {"lengths": lengths}
    _, content = findings(tmp_path, acts, criteria={"ladder": (6.0,)}, **options)
    assert content["intervals"]["shares"] == "95% interval"
    seen = 0
    for site, mask in oracle.hit_masks(exact, 6.0).items():
        for reading, rows in content["readings"][site].items():
            for row in rows["features"] if reading == "legacy" else rows:
                wanted = None if reading == "legacy" else oracle.logit_interval(mask, row["feature"], reading, lengths)
                ends = row.get("interval", {}).get("position_fraction")
                assert (ends is None) == (wanted is None)
                if wanted is not None:
                    assert ends == pytest.approx(wanted, abs=2e-9)
                    assert ends[0] <= row["position_fraction"] <= ends[1]
                    seen += ends[0] < ends[1]
    assert seen
    full = [row for row in content["readings"]["block"]["union"] if row["feature"] == 4]
    assert full[0]["interval"]["position_fraction"] == [1.0, 1.0]


def test_sequences_of_unequal_length_weigh_by_their_tokens(tmp_path, monkeypatch):
    """A draw's share is of its own tokens: 10 of hits and 30 without are a quarter, not a half."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 200)
    values = np.zeros((1, 2, 30, 1), np.float32)
    values[:, 0, :10] = 7.0
    lengths = [10, 30]
    acts = {"mlp_in": synthetic.store(values, "bfloat16")[0]}
    _, content = findings(tmp_path, acts, criteria={"position_fraction": 0.25}, lengths=lengths)
    (row,) = content["systematic"]
    assert row["position_fraction"] == 0.25
    random = np.random.RandomState(0)
    times = [int((random.randint(0, 2, 2) == 0).sum()) for _ in range(200)]
    assert row["interval"]["position_fraction"] == [0.0, 1.0]
    assert row["interval"]["passes"] == sum(10 * n / (10 * n + 30 * (2 - n)) >= 0.25 for n in times) / 200


def test_legacy_counts_below_the_lowest_magnitude_of_the_ladder(tmp_path):
    """5.99 in float32 rounds to 6 in bfloat16: a hit by the legacy rule alone, though nothing else counts it."""
    values = np.full((2, 1, 10, 1), 5.99, np.float32)
    acts = {site: synthetic.store(values, "float32")[0] for site in BLOCK}
    _, content = findings(tmp_path, acts, "float32", {"ladder": (6.0,)})
    assert content["systematic"] == []
    assert content["readings"]["block"]["legacy"]["feature_sequence_pairs"] == 1


def test_one_sequence_has_no_intervals(tmp_path):
    values = np.full((2, 1, 10, 2), 7.0, np.float32)
    _, content = findings(tmp_path, {"mlp_in": synthetic.store(values, "bfloat16")[0]})
    assert content["intervals"] is None
    assert [row["interval"] for row in content["systematic"]] == [None, None]
    assert any("no confidence intervals" in note for note in content["notes"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_readings_without_first_tokens_equal_the_oracle(tmp_path, dtype):
    acts, exact = random_acts(2, dtype)
    for site in BLOCK:  # a feature that is there on first tokens alone, as attention sinks are
        exact[site][..., 0] = 0.0
        exact[site][:, :, 0, 0] = 90.0
        exact[site][..., 1] = 0.0  # and one that has a token more: enough layers, too few tokens
        exact[site][:, :, 0, 1] = exact[site][:, 0, 5, 1] = 90.0
        acts[site] = synthetic.store(exact[site].astype(np.float32), dtype)[0]
    criteria = {"position_fraction": 0.05, "ladder": (3.0, 4.5)}
    _, content = findings(tmp_path, acts, dtype, criteria)
    sweep = content["sweep"]
    for step, magnitude in enumerate(sweep["magnitudes"]):
        for site, mask in oracle.hit_masks(exact, magnitude).items():
            whole = oracle.readings(mask, "0.25", "0.05")
            rest = oracle.readings(mask[:, :, 1:], "0.25", "0.05")
            for reading, features in rest.items():
                assert sweep["counts_without_first_tokens"][site][reading][step] == len(features)
                assert sweep["counts"][site][reading][step] == len(whole[reading])
                if magnitude == 6.0:
                    assert content["without_first_tokens"][site][reading] == sorted(features)
    assert 0 in {row["feature"] for row in content["readings"]["block"]["pooled"]}
    assert 0 not in content["without_first_tokens"]["block"]["pooled"]


def test_quantiles_and_inf_norms_equal_the_oracle(tmp_path):
    acts, exact = random_acts(4, "bfloat16")
    _, content = findings(tmp_path, acts)
    assert content["quantile_levels"] == [0.9, 0.99, 0.999, 0.9999]
    for row in content["layers"]:
        values = exact[row["site"]][row["layer"]]
        sizes = np.abs(values[np.isfinite(values)])
        assert row["quantiles"] == [oracle.quantile(sizes.tolist(), level) for level in ladders.QUANTILES]
        norms = [np.abs(one[np.isfinite(one)]).max() for one in values]
        assert row["mean_inf_norm"] == pytest.approx(np.mean(norms), rel=1e-15)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=5, max_size=5).filter(any), st.fractions(0, 1))
def test_a_quantile_is_the_nearest_rank(counts, level):
    values = np.array([-3.0, 0.5, 2.0, -0.25, 9.0])
    (found,) = quantile_magnitudes(np.array(counts), values, (level,))
    sizes = [abs(value) for value, count in zip(values, counts, strict=True) for _ in range(count)]
    assert found == oracle.quantile(sizes, f"{level.numerator}/{level.denominator}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_a_tokens_median_is_exact(dtype, width):
    values = np.random.default_rng(width).standard_t(1, (9, width)).astype(np.float32) * 200
    values[3] = values[3, 0]  # ties
    values[4, : width // 2] = 0.0
    stored, exact = synthetic.store(values, dtype)
    bits = stored.view(np.uint32 if dtype == "float32" else np.uint16)
    limit = int(synthetic.store(np.float32([[100.0]]), dtype)[0].view(bits.dtype)[0, 0])
    rows, columns, lower, upper = above(bits, limit)
    assert list(zip(rows, columns, strict=True)) == list(zip(*np.nonzero(np.abs(exact) > 100), strict=True))
    for row, low, high in zip(rows, lower, upper, strict=True):
        ordered = np.sort(bits[row] & ~np.array(1 << (8 * bits.itemsize - 1), bits.dtype))
        assert (low, high) == (ordered[(width - 1) // 2], ordered[width // 2])


def test_massive_by_the_tokens_own_median(tmp_path):
    """The layer's median is 1; one token is small all over, one large: the variants pick one each, and one value is both."""
    values = np.ones((1, 1, 40, 8), np.float32)
    values[0, 0, 3] = 0.0625
    values[0, 0, 3, 2] = 200.0  # 3,200 times its token's median, 200 times its layer's
    values[0, 0, 5] = 8.0
    values[0, 0, 5, 4] = -2000.0  # 250 times its token's, 2,000 times its layer's
    values[0, 0, 7, 1] = 1000.0  # both
    _, content = findings(tmp_path, {"resid": synthetic.store(values, "bfloat16")[0]})
    assert [(m["position"], m["feature"]) for m in content["massive"]] == [(5, 4), (7, 1)]
    assert [(m["position"], m["feature"]) for m in content["massive_by_token"]] == [(7, 1), (3, 2)]
    assert (content["massive_count"], content["massive_by_token_count"]) == (2, 2)
    assert [m["token_ratio"] for m in content["massive_by_token"]] == [1000.0, 3200.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_massive_cells_than_are_kept_are_still_counted(tmp_path, monkeypatch, dtype):
    """The list is the largest of a total order, also where the lists of a layer overflow again and again."""
    from outliers.counting import accumulate, summary

    for module in (accumulate, summary):
        monkeypatch.setattr(module, "MASSIVE_KEPT", 10)
    values = np.random.default_rng(0).standard_t(1, (2, 3, 40, 16)) * 30
    values[:, :, :, :8] *= 0.001  # small medians
    stored, exact = synthetic.store(np.clip(values, -6e4, 6e4).astype(np.float32), dtype)
    found, _ = findings(tmp_path, {"resid": stored}, dtype)
    for layer in range(2):
        sizes = np.abs(exact[layer])
        medians = np.median(sizes, axis=-1, keepdims=True)
        assert found.massive_cells[layer] == (sizes > 100).sum() > 40
        assert found.massive_by_token[layer] == ((sizes > 100) & (sizes >= 1000 * medians)).sum()
        kept = found.massive[found.massive["layer"] == layer]
        order = sorted((-sizes[at], *map(int, at)) for at in zip(*np.nonzero(sizes > 100), strict=True))[:10]
        names = ("sequence", "position", "feature")
        assert [(-float(cell["magnitude"]), *(int(cell[name]) for name in names)) for cell in kept] == order


def test_long_lists_are_cut_and_their_length_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "LISTED", 5)
    values = {site: np.full((2, 2, 10, 12), 7.0, np.float32) for site in (*BLOCK, "resid")}
    acts = {site: synthetic.store(value, "bfloat16")[0] for site, value in values.items()}
    _, content = findings(tmp_path, acts)
    assert len(content["systematic"]) == len(content["readings"]["block"]["pooled"]) == 12
    assert len(content["readings"]["resid"]["pooled"]) == len(content["readings"]["block"]["union"]) == 5
    assert content["reading_counts"]["resid"] == dict.fromkeys(("pooled", "union", "per_layer", "affected"), 12)
    assert content["reading_counts"]["block"]["legacy"] == 12
    assert len(content["readings"]["block"]["legacy"]["features"]) == 5
    assert content["readings"]["block"]["legacy"]["feature_sequence_pairs"] == 24
    assert any("cut to their largest features" in note and "pooled at resid" in note for note in content["notes"])
