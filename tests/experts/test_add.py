"""The compiled loops against loops of Python, element by element; and that threads and orders of rows change no bit."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.errors import SiteError
from outliers.experts.add import add_layer
from outliers.experts.routed import Routed, Shared
from outliers.experts.sums import LADDER, ExpertSums
from outliers.experts.table import FIELDS, ExpertShapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYERS, E, K, WIDTH, OTHER, HIDDEN = 2, 5, 2, 7, 3, 6


def shapes_of(applied=False, shared=(OTHER,)):
    return ExpertShapes(
        layers=tuple(range(LAYERS)),
        experts=E,
        slots=K,
        width=WIDTH,
        shared_widths=shared,
        hidden=HIDDEN,
        applied=applied,
    )


def made(seed, dtype, lengths, positions, *, applied=False, shared=1, wild=False):
    """A layer with values on and around the ladder, equal largest ones, and, where `wild`, values that are not finite."""
    rng = np.random.default_rng(seed)
    tokens = len(lengths) * positions

    def values(*shape):
        found = rng.choice([*LADDER, 0.0, -0.0, 1e-6, -3.0, 2.9999, 65504.0, 0.1, -7.3], size=shape)
        found = np.where(rng.random(shape) < 0.5, rng.normal(size=shape), found)
        if wild:
            found = np.where(rng.random(shape) < 0.1, rng.choice([np.nan, np.inf, -np.inf], size=shape), found)
            found[rng.integers(len(found))] = np.nan
        return torch.from_numpy(found).to(dtype)

    index = torch.from_numpy(
        np.stack([rng.permutation(E - 1)[:K] for _ in range(tokens)])
    )  # no token reaches the last one
    weights = torch.from_numpy(rng.random((tokens, K)).astype(np.float32))
    gate = torch.from_numpy(rng.random(tokens).astype(np.float32)) if seed % 2 else None
    others = tuple(Shared(values(tokens, OTHER), values(tokens, HIDDEN), gate) for _ in range(shared))
    rows = torch.from_numpy(rng.permutation(tokens * K))
    margin = torch.from_numpy(rng.random(tokens).astype(np.float32))
    block = values(tokens, HIDDEN)
    return Routed(
        1, index, weights, applied, margin, rows, values(tokens * K, WIDTH), values(tokens * K, HIDDEN), block, others
    )


def table_of(shapes, sequences, positions):
    return {
        field: np.full((LAYERS, sequences, positions, shapes.slots_of(field)), empty, dtype)
        for field, (dtype, empty) in FIELDS.items()
    }


def added(shapes, layers, lengths, positions, threads=2):
    """Sums and table after some layers, all of layer 1."""
    sums, table = ExpertSums.zero(shapes), table_of(shapes, len(lengths), positions)
    for routed in layers:
        add_layer(sums, table, 1, routed, lengths, positions, threads)
    return sums, table


def pattern_of(value, dtype):
    """The 16 bits that a histogram counts a value under."""
    if dtype != torch.float32:
        return int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF
    rounded = torch.tensor(value, dtype=torch.float32).bfloat16()
    if bool(rounded.isinf()):
        rounded = torch.tensor(math.copysign(torch.finfo(torch.bfloat16).max, value), dtype=torch.bfloat16)
    return int(rounded.view(torch.int16)) & 0xFFFF


def largest_of(row):
    """(largest finite magnitude, its first place) of a list, (nan, 65535) where nothing is finite."""
    best, where = math.nan, 65_535
    for place, value in enumerate(row):
        if math.isfinite(value) and not abs(value) <= best:
            best, where = abs(value), place
    return best, where


def by_loops(shapes, routed, lengths, positions, sums, table):
    """Add one layer with a loop over experts, tokens and slots."""
    row_of = {slot: row for row, slot in enumerate(routed.rows.tolist())}
    tokens = [s * positions + p for s, length in enumerate(lengths) for p in range(length)]
    index = routed.experts.tolist()
    everyone = [(e, t, n) for e in range(E) for t in tokens for n in range(K) if index[t][n] == e]
    for e, t, n in everyone:
        row, factor = row_of[t * K + n], float(routed.weights[t, n])
        one(sums, table, (e, t, n), routed.down_in[row], routed.output[row], factor, lengths, positions, routed.applied)
    for s, shared in enumerate(routed.shared):
        for t in tokens:
            factor = 1.0 if shared.weight is None else float(shared.weight[t])
            one(sums, table, (E + s, t, K + s), shared.down_in[t], shared.output[t], factor, lengths, positions, False)
    for t in tokens:
        table["router_margin"][1, t // positions, t % positions, 0] = float(routed.margin[t])
        for channel, value in enumerate(routed.block[t].tolist()):
            if math.isfinite(value):
                sums.block[1, channel] += value * value


def one(sums, table, place, inputs, outputs, factor, lengths, positions, applied):
    """One row of one expert."""
    e, t, n = place
    at = (1, t // positions, t % positions, n)
    table["expert"][at], table["expert_weight"][at] = e, factor
    for name, column, row in (
        ("expert_down_in", "expert_down_in_column", inputs),
        ("expert_output", "expert_output_channel", outputs),
    ):
        table[name][at], table[column][at] = largest_of(row.tolist())
    sums.rows[1, e] += 1
    shared = e >= E
    names = (
        ("shared_total", "shared_squares", "shared_low", "shared_high")
        if shared
        else ("total", "squares", "low", "high")
    )
    total, squares, low, high = (getattr(sums, name)[1, e - E if shared else e] for name in names)
    for column, value in enumerate(inputs.tolist()):
        if not math.isfinite(value):
            sums.nonfinite[1, e] += 1
            continue
        total[column] += value
        squares[column] += value * value
        low[column], high[column] = min(low[column], value), max(high[column], value)
        for k, magnitude in enumerate(LADDER):
            sums.hits[k, 1, e] += abs(value) >= magnitude
        if not shared:
            sums.histogram[1, pattern_of(value, inputs.dtype)] += 1
    sums.nonfinite_outputs[1, e] += any(not math.isfinite(value) for value in outputs.tolist())
    for channel, value in enumerate(outputs.tolist()):
        if math.isfinite(value):
            weighted = value if applied else value * factor
            sums.energy[1, e, channel] += weighted * weighted


def same(found, wanted):
    for (name, a), (_, b) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def arrays_of(sums, table):
    kept = [(f.name, getattr(sums, f.name)) for f in fields(sums) if f.name != "shapes"]
    return [*kept, *sorted(table.items())]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    padding=st.integers(0, 2),
    applied=st.booleans(),
    shared=st.integers(0, 2),
    wild=st.booleans(),
)
def test_equals_loops(seed, dtype, lengths, padding, applied, shared, wild):
    """Every array, to the last bit: sums are of float64 in the same order."""
    positions = max(lengths) + padding
    shapes = shapes_of(applied, (OTHER,) * shared)
    layers = [made(seed + n, dtype, lengths, positions, applied=applied, shared=shared, wild=wild) for n in range(2)]
    wanted = ExpertSums.zero(shapes), table_of(shapes, len(lengths), positions)
    for layer in layers:
        by_loops(shapes, layer, lengths, positions, *wanted)
    same(arrays_of(*added(shapes, layers, lengths, positions)), arrays_of(*wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_the_order_of_rows_change_no_bit(dtype):
    lengths, positions = (40, 3, 33), 41
    routed = made(3, dtype, lengths, positions, wild=True)
    again = np.random.default_rng(5).permutation(routed.rows.numel())
    other = replace(routed, rows=routed.rows[again], down_in=routed.down_in[again], output=routed.output[again])
    first = [v.tobytes() for _, v in arrays_of(*added(shapes_of(), [routed], lengths, positions, 1))]
    for threads, layer in ((2, routed), (5, routed), (2, other)):
        found = arrays_of(*added(shapes_of(), [layer], lengths, positions, threads))
        assert [v.tobytes() for _, v in found] == first


def test_an_expert_without_tokens_has_no_extremes_and_nothing_to_count():
    sums, table = added(shapes_of(), [made(0, torch.float32, (4,), 4)], (4,), 4)
    assert sums.rows[1, E - 1] == 0
    assert np.isposinf(sums.low[1, E - 1]).all() and np.isneginf(sums.high[1, E - 1]).all()
    assert not (table["expert"] == E - 1).any() and (sums.rows[0] == 0).all()


@pytest.mark.parametrize("bits", [0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_largest_finite_float32_is_counted_as_the_largest_bfloat16(bits, sign):
    """Also what bfloat16 would round to infinity, which is the second and the third."""
    routed = made(0, torch.float32, (4,), 4)
    routed.down_in[:] = sign * torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    sums, _ = added(shapes_of(), [routed], (4,), 4)
    pattern = 0x7F7F if sign > 0 else 0xFF7F
    assert sums.histogram[1, pattern] == routed.down_in.numel() and sums.histogram[1].sum() == routed.down_in.numel()


@pytest.mark.parametrize(("bits", "pattern"), [(0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81)])
def test_a_float32_between_two_bfloat16_is_counted_as_the_even_one(bits, pattern):
    """Halfway between two it goes to the even one, above that up."""
    routed = made(0, torch.float32, (4,), 4)
    routed.down_in[:] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    sums, _ = added(shapes_of(), [routed], (4,), 4)
    assert sums.histogram[1, pattern] == routed.down_in.numel() == sums.histogram[1].sum()


@pytest.mark.parametrize("what", ["a row twice", "a row beyond", "an expert beyond", "fewer rows", "other positions"])
def test_rows_that_are_not_each_slot_once_are_refused(what):
    routed, positions = made(0, torch.float32, (4, 2), 4), 4
    if what == "a row twice":
        routed.rows[0] = routed.rows[1]
    elif what == "a row beyond":
        routed.rows[0] = 16
    elif what == "an expert beyond":
        routed.experts[0, 0] = E
    elif what == "fewer rows":
        routed = replace(routed, rows=routed.rows[:-1], down_in=routed.down_in[:-1], output=routed.output[:-1])
    else:
        positions = 5
    with pytest.raises(SiteError, match="should have one row for each"):
        added(shapes_of(), [routed], (4, 2), positions)


def test_a_layer_of_routing_alone_is_refused():
    routed = replace(made(0, torch.float32, (4,), 4), rows=None, down_in=None, output=None, block=None, shared=())
    with pytest.raises(SiteError, match="nothing to add up"):
        added(shapes_of(), [routed], (4,), 4)
