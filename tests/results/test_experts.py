"""What experts do, against loops over the tokens of a made-up mixture: load, entropy, coverage, super experts, attribution."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.errors import CorruptCapture
from outliers.results.attribution import feature_experts, kinds_of, massive_experts, outputs_floor
from outliers.results.expert_tables import experts_table, router_table
from outliers.results.experts import expert_findings, expert_notes
from outliers.results.routing import below, margin_quantiles, tokens_to_reach
from outliers.results.schema import EXPERTS_SCHEMA, ROUTER_SCHEMA, MassiveRow
from outliers.results.super_experts import as_published, over_all_tokens
from tests.support.expert_world import totals_of, world

WORLDS = [
    {"seed": 1},
    {"seed": 2, "skew": 4.0, "experts": 9, "lengths": (3, 2)},  # experts that no token reaches
    {"seed": 3, "shared": 0, "slots": 1, "experts": 4},
    {"seed": 4, "layers": (1, 3, 4, 7), "experts": 3, "slots": 3, "shared": 2},
    {"seed": 5, "experts": 1, "slots": 1, "lengths": (5,)},
]


def rows_of(made, layer, expert):
    """The (sequence, position, slot) at which an expert was reached, in order."""
    return [at[1:] for at in made.slots() if at[0] == layer and made.expert[at] == expert]


def number(made, expert):
    return expert if expert < made.shapes.experts else made.shapes.experts - 1 - expert


def largest(made, values, layer, expert):
    """(magnitude, column, sequence, position) of an expert's largest value; the first token of equals."""
    best = None
    for at in rows_of(made, layer, expert):
        for column, value in enumerate(values[(layer, *at)].tolist()):
            if best is None or abs(value) > best[0]:
                best = (abs(value), column, at[0], at[1])
    return best or (None,) * 4


@pytest.mark.parametrize("asked", WORLDS)
def test_the_tables_are_those_of_loops(asked):
    made = world(**asked)
    found = expert_findings(totals_of(made), num_layers=8)
    table = experts_table(found, 6.0)
    assert table.schema.equals(EXPERTS_SCHEMA)
    rows = iter(table.to_pylist())
    tokens_of_all = sum(made.lengths.tolist())
    for index, layer in enumerate(made.shapes.layers):
        for expert in range(made.shapes.all_experts):
            row, at = next(rows), rows_of(made, index, expert)
            routed = expert < made.shapes.experts
            assert (row["layer"], row["expert"], row["tokens"]) == (layer, number(made, expert), len(at))
            for kind, name in enumerate(("first_tokens", "delimiter_tokens", "special_tokens")):
                assert row[name] == sum(bool(made.kinds[kind][where[:2]]) for where in at)
            if not at:
                assert not any(isinstance(row[name], float) for name in row)
                assert (row["hits"], row["super_expert"]) == (None, None)
                assert (row["load"], row["weight_sum"], row["output_max"], row["down_in_column"]) == (None,) * 4
                continue
            mean = Fraction(tokens_of_all * made.shapes.slots, made.shapes.experts)
            assert row["load"] == (pytest.approx(float(len(at) / mean), rel=1e-12) if routed else None)
            assert row["weight_sum"] == pytest.approx(
                math.fsum(made.weight[(index, *w)] for w in at), abs=1e-11 * len(at)
            )
            names = ("down_in_max", "down_in_column", "down_in_sequence", "down_in_position")
            assert tuple(row[name] for name in names) == largest(made, made.down_in, index, expert)
            names = ("output_max", "output_channel", "output_sequence", "output_position")
            assert tuple(row[name] for name in names) == largest(made, made.output, index, expert)
            firsts = {}
            for where in at:
                firsts.setdefault(where[0], max(abs(v) for v in made.output[(index, *where)].tolist()))
            assert row["output_first"] == max(firsts.values())
            assert row["hits"] == sum(abs(v) >= 6.0 for w in at for v in made.down_in[(index, *w)].tolist())
    assert next(rows, None) is None


@pytest.mark.parametrize("asked", WORLDS)
def test_the_routers_are_those_of_loops(asked):
    made = world(**asked)
    totals = totals_of(made)
    table = router_table(expert_findings(totals, num_layers=8))
    assert table.schema.equals(ROUTER_SCHEMA)
    experts = made.shapes.experts
    for index, row in enumerate(table.to_pylist()):
        counts = [len(rows_of(made, index, expert)) for expert in range(experts)]
        whole = sum(counts)
        assert (row["layer"], row["tokens"]) == (made.shapes.layers[index], sum(made.lengths.tolist()))
        entropy = -math.fsum(n / whole * math.log(n / whole) for n in counts if n)
        assert row["entropy"] == (None if experts == 1 else pytest.approx(entropy / math.log(experts), abs=1e-9))
        assert [row[f"at_most_{n}"] for n in (0, 10, 50, 100)] == [
            sum(c <= n for c in counts) for n in (0, 10, 50, 100)
        ]
        assert row["busiest_expert"] == counts.index(max(counts))
        assert row["busiest_load"] == pytest.approx(max(counts) * experts / whole)
        sums = []
        margins = []
        for sequence, length in enumerate(made.lengths.tolist()):
            for position in range(length):
                sums.append(math.fsum(made.weight[index, sequence, position, : made.shapes.slots].tolist()))
                margins.append(float(made.margins[index, sequence, position]))
        assert row["mean_weight_sum"] == pytest.approx(math.fsum(sums) / len(sums), abs=1e-11)
        assert row["margin_tokens"] == len(margins)
        for name, level in (("margin_p01", 0.01), ("margin_p25", 0.25), ("margin_p50", 0.5), ("margin_p75", 0.75)):
            exact = sorted(margins)[max(1, math.ceil(level * len(margins))) - 1]
            assert row[name] <= exact < row[name] * (1 + 2**-7) or row[name] == exact == 0
        if len(made.lengths) < 2:
            assert row["entropy_low"] is None
        elif experts > 1:
            assert 0 <= row["entropy_low"] <= row["entropy_high"] <= 1


def test_the_ends_are_those_of_resamples_of_whole_sequences():
    made = world(seed=6, lengths=(7, 4, 9, 5, 3, 8), experts=4, shared=0)
    totals = totals_of(made)
    found = expert_findings(totals, 3)
    random = np.random.RandomState(0)
    loads, entropies, never = [], [], []
    for _ in range(1000):
        drawn = random.randint(0, 6, 6).tolist()
        layers = []
        for layer in range(2):
            counts = [sum(int(totals.per_sequence[s, layer, e]) for s in drawn) for e in range(4)]
            layers.append([n * 4 / sum(counts) for n in counts])
            shares = [n / sum(counts) for n in counts]
            layers[-1].append(-sum(s * math.log(s) for s in shares if s) / math.log(4))
        loads.append(layers[1][2])
        entropies.append((layers[0][4] + layers[1][4]) / 2)
        never.append(sum(v == 0 for own in layers for v in own[:4]) / 8)
    for ends, values in (
        ((found.drawn.load[0][1, 2], found.drawn.load[1][1, 2]), loads),
        (found.drawn.entropy_mean, entropies),
        (found.drawn.never, never),
    ):
        assert ends == pytest.approx((sorted(values)[25], sorted(values)[974]), abs=1e-8)
    assert found.drawn.resamples == 1000


def test_routing_that_is_not_of_every_token_is_refused():
    totals = totals_of(world())
    totals.per_sequence[1, 0, 2] += 1
    with pytest.raises(CorruptCapture, match="the routing of layer 0"):
        expert_findings(totals, 3)


def linear_percentile(values, share):
    ordered = sorted(values)
    rank = share * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 30]), st.integers(0, 2), st.floats(0, 3))
def test_super_experts_are_those_of_both_definitions(seed, experts, shared, skew):
    def values(rng, shape):
        found = rng.normal(0, 4, shape)
        return np.where(rng.random(shape) < 0.002, found * 100, found).round(1)

    layers = (0, 2, 3, 5, 6, 7, 9)
    made = world(seed, layers=layers, experts=experts, slots=1, shared=shared, lengths=(5, 3), skew=skew, values=values)
    totals = totals_of(made)
    ours, published = over_all_tokens(totals), as_published(totals, 10)
    known, counted = {}, {}
    for index, layer in enumerate(layers):
        for expert in range(made.shapes.all_experts):
            outputs = [np.abs(made.output[(index, *at)]).max() for at in rows_of(made, index, expert)]
            if outputs and expert < experts:
                known[index, expert] = float(max(outputs))
            if layer < 8:  # round(7.5) is 8
                first = {}
                for at, value in zip(rows_of(made, index, expert), outputs, strict=True):
                    first.setdefault(at[0], float(value))
                counted[index, expert] = max(first.values(), default=0.0)
    for found, population, bound in (
        (ours, known, max(known.values()) / 10),
        (published, counted, max(counted.values()) // 10),
    ):
        level = linear_percentile(population.values(), 0.995)
        assert found.percentile == pytest.approx(level, rel=1e-12) and found.bound == bound
        assert found.population == len(population)
        assert found.largest == max(population.values())
        marked = {at for at in np.ndindex(found.marks.shape) if found.marks[at]}
        near = {at for at, value in population.items() if abs(value - level) < 1e-9}
        assert marked - near == {at for at, value in population.items() if value > level and value > bound} - near
        assert len(marked) <= found.at_most
        assert (found.none_because is None) == bool(marked)
    assert ours.unknown == len(layers) * experts - len(known)
    assert published.layers_below == 8


def test_outputs_that_are_not_finite_are_named():
    totals = totals_of(world(seed=8, experts=3, slots=2, shared=0, lengths=(2, 2)))
    said = "3 outputs of experts have values that are not finite"
    assert not any(said in note for note in expert_notes(expert_findings(totals, 2)))
    totals.sums.nonfinite_outputs[0, 1] = 3
    assert any(said in note for note in expert_notes(expert_findings(totals, 2)))


def test_a_tie_at_the_top_leaves_no_super_expert_and_says_so():
    made = world(seed=8, experts=3, slots=3, shared=0, lengths=(2, 2))
    made.output[:] = np.clip(made.output, -1, 1)
    made.output[0, 0, 1, :2, 3] = -50.0
    totals = totals_of(made)
    reading = over_all_tokens(totals)
    assert (reading.none_because, reading.population, reading.at_most, reading.largest) == ("tie", 6, 1, 50.0)
    assert any(
        "no super expert: the largest output is that of several" in note
        for note in expert_notes(expert_findings(totals, 2))
    )
    made.output[:] = 0
    assert over_all_tokens(totals_of(made)).none_because == "zero"


def test_an_expert_that_nothing_reached_lowers_the_published_bound_alone():
    """Four experts, of which one has no token: it is in the published population as 0, and in ours not at all."""
    made = world(seed=9, layers=(0,), experts=4, slots=1, shared=0, lengths=(3, 3))
    made.expert[0, :, :, 0] = np.arange(3)
    totals = totals_of(made)
    ours, published = over_all_tokens(totals), as_published(totals, 4)
    assert (ours.population, ours.unknown, published.population, published.unknown) == (3, 1, 4, 1)
    assert published.values[0, 3] == 0 and np.isnan(ours.values[0, 3])
    rows = experts_table(expert_findings(totals, 4), 6.0).to_pylist()
    assert (rows[3]["super_expert"], rows[3]["super_expert_as_published"], rows[3]["output_max"]) == (None, False, None)


@pytest.mark.parametrize("applied", [False, True])
def test_features_are_given_by_the_experts_of_the_largest_energy(applied):
    made = world(seed=10, experts=6, slots=3, shared=1, applied=applied)
    (first, second) = feature_experts(totals_of(made), [4, 1])
    assert (first.feature, second.feature) == (4, 1)
    for index, row in enumerate(second.layers):
        energy = [0.0] * 7
        for expert in range(7):
            for at in rows_of(made, index, expert):
                weight = 1.0 if applied else float(made.weight[(index, *at)])
                energy[expert] += (weight * float(made.output[(index, *at)][1])) ** 2
        order = sorted(range(7), key=lambda e: -energy[e])[:4]
        assert row.experts == [number(made, e) for e in order]
        assert row.shares == pytest.approx([energy[e] / sum(energy) for e in order], rel=1e-5)
        assert row.experts_squares == pytest.approx(sum(energy), rel=1e-5)
        assert row.block_squares > 0
    assert feature_experts(totals_of(made, routing=True), [4]) is None


def test_energy_that_is_not_finite_or_zero_names_nobody():
    totals = totals_of(world(seed=11))
    totals.sums.energy[0, 1, 2] = np.inf
    totals.sums.energy[1] = 0
    (found,) = feature_experts(totals, [2])
    assert (found.layers[0].experts, found.layers[0].experts_squares) == ([], None)
    assert (found.layers[1].experts, found.layers[1].experts_squares) == ([], 0)


def massive_row(layer, sequence, position, feature, value):
    return MassiveRow(
        layer=layer, sequence=sequence, position=position, token=None, feature=feature, value=value, ratio=None,
        token_median=0.0, token_ratio=None,
    )  # fmt: skip


def test_a_massive_activation_is_given_by_experts_below_it_whose_output_is_there():
    made = world(seed=12, layers=(0, 2, 4), experts=4, slots=2, shared=1, hidden=5)
    for index, slot in ((0, 1), (1, 0), (1, 2), (2, 0)):
        made.output[index, 1, 2, slot] = 0
        made.output[index, 1, 2, slot, 3] = -100.0 * (index + 1) - slot
    totals = totals_of(made)
    listed = [massive_row(2, 1, 2, 3, -400.0), massive_row(3, 1, 2, 3, -500.0), massive_row(1, 0, 0, 4, 450.0)]
    first, second = massive_experts(totals, listed)
    assert (first.sequence, first.position, first.feature) == (1, 2, 3)
    assert (first.first_layer, first.last_layer, first.value) == (2, 3, -500.0)
    wanted = {(0, 101.0), (2, 200.0), (2, 202.0)}
    assert {(giver.layer, giver.output) for giver in first.experts if giver.output >= 100} == wanted
    assert [giver.output for giver in first.experts] == sorted((g.output for g in first.experts), reverse=True)
    shared = next(giver for giver in first.experts if giver.output == 202.0)
    assert (shared.expert, shared.weight) == (-1, 1.0)
    assert (second.first_layer, second.last_layer) == (1, 1)
    for giver in second.experts:
        assert giver.layer == 0
    assert massive_experts(totals, None) is None
    assert massive_experts(totals_of(made, routing=True), listed) is None


def test_the_floor_of_the_outputs_is_said_where_some_are_left_out():
    few, many = world(seed=13, lengths=(7, 4)), world(seed=13, lengths=(60, 60))
    assert outputs_floor(totals_of(few), 0) is None
    sizes = sorted((np.abs(many.output[at]).max() for at in many.slots() if at[0] == 1), reverse=True)
    assert outputs_floor(totals_of(many), 1) == sizes[255]


def test_kinds_of_tokens_by_expert():
    made = world(seed=14, experts=5, slots=2, lengths=(7, 4, 9))
    made.kinds[2] = False
    found = kinds_of(totals_of(made))
    assert [one.kind for one in found] == ["first", "delimiter"]
    for kind, one in enumerate(found):
        of_kind = [(s, p) for s, n in enumerate(made.lengths.tolist()) for p in range(n) if made.kinds[kind, s, p]]
        assert one.tokens == len(of_kind)
        excess = {}
        for index in range(2):
            for expert in range(5):
                at = [where[:2] for where in rows_of(made, index, expert)]
                own, everything = sum(where in of_kind for where in at), len(at)
                if (much := Fraction(own, len(of_kind)) - Fraction(everything, 20)) > 0:
                    excess[index, expert] = (-much, own, everything)
        order = sorted(excess, key=lambda at: (excess[at][0], at))[:16]
        assert [(row.layer, row.expert) for row in one.experts] == [(made.shapes.layers[i], e) for i, e in order]
        assert [row.tokens for row in one.experts] == [excess[at][1] for at in order]
        assert [row.share_of_all for row in one.experts] == [excess[at][2] / 20 for at in order]


def poisson_below(mean, times):
    term, total = math.exp(-mean), 0.0
    for step in range(times):
        total += term
        term *= mean / (step + 1)
    return total


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.sampled_from([1, 2, 100]))
def test_the_tokens_that_reach_every_expert_are_the_least(counts, times):
    whole = sum(counts)
    found = tokens_to_reach(np.array([counts]), whole, times)

    def missed(tokens):
        return sum(poisson_below(n / whole * tokens, times) for n in counts)

    assert missed(found) <= 0.05 * (1 + 1e-6)
    step = 10 ** max(0, len(str(found)) - 3)
    assert found <= times or missed(found - 2 * step - 1) > 0.05
    assert tokens_to_reach(np.array([[*counts, 0]]), whole, times) is None


def test_far_tails_are_zero_and_others_are_sums():
    means = np.array([1e-9, 0.5, 3.0, 99.0, 500.0])
    for times in (1, 3, 100):
        assert below(means, times)[:4] == pytest.approx([poisson_below(m, times) for m in means[:4].tolist()], rel=1e-9)
    assert below(means, 100)[4] < 1e-20


def test_margins_may_be_negative_zero_or_unknown():
    values = np.array([-2.0, -0.0, 0.0, 1.00390625, np.nan, np.inf], np.float32)
    counts = np.zeros(65536, np.int64)
    np.add.at(counts, values.view(np.uint32) >> 16, 1)
    assert margin_quantiles(counts, (0.01, 0.4, 0.8, 1.0)) == (5, [-2.0, 0.0, 1.0, None])
    assert margin_quantiles(np.zeros(65536, np.int64), (0.5,)) == (0, [None])


def test_routing_alone_leaves_outputs_unknown():
    totals = totals_of(world(seed=15, shared=0), routing=True)
    found = expert_findings(totals, 3)
    assert (found.ours, found.published) == (None, None)
    for row in experts_table(found, 6.0).to_pylist():
        assert row["tokens"] and row["weight_sum"] is not None
        unknown = ("down_in_max", "output_max", "output_first", "hits", "super_expert", "super_expert_as_published")
        assert [row[name] for name in unknown] == [None] * 6
    assert router_table(found)["outputs_floor"].null_count == 2
    assert any("routing alone" in note for note in expert_notes(found))


def test_hits_are_unknown_at_a_magnitude_that_the_ladder_lacks():
    found = expert_findings(totals_of(world()), 3)
    assert experts_table(found, 5.0)["hits"].null_count == 12
    assert experts_table(found, 6.0)["hits"].null_count == 0
