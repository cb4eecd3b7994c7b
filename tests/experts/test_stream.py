"""Experts added one by one as the model computes them: the bits of the whole layer at once, and what is refused."""

from __future__ import annotations

import inspect
import threading
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.errors import SiteError
from outliers.experts import stream as streams
from outliers.experts.add import add_layer
from outliers.experts.routed import Routing
from outliers.experts.stream import ExpertStream
from outliers.experts.sums import ExpertSums
from outliers.experts.watch import ExpertWatch
from tests.experts.test_add import DTYPES, E, K, added, made, shapes_of, table_of
from tests.experts.test_watch import copied, info_of
from tests.support import expert_oracle as oracle

HISTOGRAM = list(inspect.signature(streams.add_experts.py_func).parameters).index("histogram")


def experts_of(routed):
    """(slots, tokens, down_in, output) of each expert that has tokens, its rows in the order of slots, then tokens, as eager."""
    row_of = {slot: row for row, slot in enumerate(routed.rows.tolist())}
    for expert in range(E):
        slots, tokens = torch.where((routed.experts == expert).T)
        rows = [row_of[t * K + n] for n, t in zip(slots.tolist(), tokens.tolist(), strict=True)]
        if rows:
            yield slots, tokens, routed.down_in[rows], routed.output[rows]


def streamed(routed, lengths, positions, threads):
    shapes = shapes_of()
    sums, table = ExpertSums.zero(shapes), table_of(shapes, len(lengths), positions)
    for _ in range(2):  # a second batch is added to the first
        stream = ExpertStream(sums, 1, Routing(1, routed.experts, routed.weights), lengths, positions, threads)
        for one in experts_of(routed):
            stream.add(*one)
        left = replace(routed, rows=None, down_in=None, output=None)
        add_layer(sums, table, 1, left, lengths, positions, threads, stream)
    return sums, table


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    wild=st.booleans(),
    threads=st.sampled_from([1, 3]),
    held=st.sampled_from([0, 100, 1 << 30]),
)
def test_a_stream_gives_the_bits_of_the_whole_layer_at_once(seed, dtype, lengths, padding, wild, threads, held):
    """With values that are not finite, ties, padding, an expert without a token, and any number that waits."""
    lengths, positions = tuple(lengths), max(lengths) + padding
    routed = made(seed, dtype, lengths, positions, wild=wild)
    whole, table = added(shapes_of(), [routed, routed], lengths, positions, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "WAITING_BYTES", held)
        sums, other = streamed(routed, lengths, positions, threads)
    for field in fields(ExpertSums):
        if field.name != "shapes":
            assert getattr(sums, field.name).tobytes() == getattr(whole, field.name).tobytes(), field.name
    for name, values in table.items():
        assert values.tobytes() == other[name].tobytes(), name


def test_tensors_that_do_not_lie_row_by_row_and_dtypes_that_change_give_the_same_sums():
    """Slices of wider tensors, every second of some numbers, and an expert whose values are of another dtype than the others'."""
    lengths, positions = (4, 2), 4
    routed = made(3, torch.bfloat16, lengths, positions)
    given = list(experts_of(routed))

    def sums_of(change):
        sums = ExpertSums.zero(shapes_of())
        stream = ExpertStream(sums, 1, Routing(1, routed.experts, routed.weights), lengths, positions, 2)
        for number, one in enumerate(given):
            stream.add(*change(number, *one))
        stream.finish()
        return [getattr(sums, field.name).tobytes() for field in fields(ExpertSums) if field.name != "shapes"]

    def strided(_, slots, tokens, down_in, output):
        wide = [torch.cat([values, values + 1], 1)[:, : values.shape[1]] for values in (down_in, output)]
        both = torch.stack([slots, tokens, slots - 7], 1)
        assert not wide[0].is_contiguous() and both[:, 0].stride() == (3,)
        return both[:, 0], both[:, 1], *wide

    def wider(number, slots, tokens, down_in, output):
        """float32 holds the same values, and rounds to the same patterns of bfloat16; inputs, outputs, or both are of it."""
        return slots, tokens, down_in.float() if number % 2 else down_in, output.float() if number in (1, 2) else output

    plain = sums_of(lambda _, *one: one)
    assert sums_of(strided) == plain
    assert sums_of(wider) == plain


def test_each_thread_counts_patterns_of_its_own(monkeypatch):
    """Two threads that add to one count lose some of them, now and then."""
    lengths, positions = (4, 2), 4
    routed = made(3, torch.bfloat16, lengths, positions)
    both, threads, real = threading.Barrier(2), {}, streams.add_experts

    def counted(*arguments):
        if threading.get_ident() not in {one for found in threads.values() for one in found}:
            both.wait(60)  # a thread goes on once the other has a piece too
        threads.setdefault(id(arguments[HISTOGRAM]), set()).add(threading.get_ident())
        real(*arguments)

    monkeypatch.setattr(streams, "add_experts", counted)
    stream = ExpertStream(
        ExpertSums.zero(shapes_of()), 1, Routing(1, routed.experts, routed.weights), lengths, positions, 2
    )
    for one in experts_of(routed):
        stream.add(*one)
    stream.finish()
    assert sorted(len(found) for found in threads.values()) == [1, 1]


def test_rows_that_are_not_the_experts_own_are_refused():
    lengths, positions = (4, 2), 4
    routed = made(3, torch.float32, lengths, positions)
    experts = list(experts_of(routed))

    def run(change=lambda found: found, tokens=positions):
        stream = ExpertStream(
            ExpertSums.zero(shapes_of()), 1, Routing(1, routed.experts, routed.weights), lengths, tokens, 1
        )
        for one in change(list(experts)):
            stream.add(*one)
        stream.finish()

    run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "WAITING_BYTES", 0)  # nothing waits: the very `add` raises
        stream = ExpertStream(
            ExpertSums.zero(shapes_of()), 1, Routing(1, routed.experts, routed.weights), lengths, positions, 1
        )
        stream.add(*experts[1])
        with pytest.raises(SiteError, match="behind expert"):
            stream.add(*experts[0])
    with pytest.raises(SiteError, match="rows for 16 slots"):
        run(lambda found: found[1:])
    with pytest.raises(SiteError, match="behind expert"):
        run(lambda found: found[::-1])
    with pytest.raises(SiteError, match="behind expert"):
        run(lambda found: [found[0], *found])
    with pytest.raises(SiteError, match="come twice"):
        run(lambda found: [tuple(torch.cat([x, x]) for x in found[0]), *found[1:]])
    with pytest.raises(SiteError, match="not of its tokens"):
        run(lambda found: [tuple(torch.cat([x, y]) for x, y in zip(*found[:2], strict=True)), *found[2:]])
    with pytest.raises(SiteError, match="values each"):
        run(lambda found: [(*found[0][:2], found[0][3], found[0][2]), *found[1:]])
    with pytest.raises(SiteError, match="int32 tokens"):
        run(lambda found: [(found[0][0], found[0][1].int(), *found[0][2:]), *found[1:]])
    with pytest.raises(SiteError, match="int64 tokens"):
        run(lambda found: [(found[0][0][:, None], *found[0][1:]), *found[1:]])
    with pytest.raises(SiteError, match="float64, which is not one of"):
        run(lambda found: [(*found[0][:3], found[0][3].double()), *found[1:]])
    with pytest.raises(SiteError, match="8 tokens in a pass of 2 x 5"):
        run(tokens=5)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        *((family, "eager") for family in oracle.FAMILIES),
        ("Qwen3Moe", "grouped_mm"),
        ("Mixtral", "batched_mm"),
    ],
)
def test_eager_experts_are_handed_over_as_they_are_computed(family, implementation):
    """What is handed over is what a watcher that waits for the end gets; the outputs have the same bits; others wait."""
    model = oracle.build(family, implementation, torch.float32)
    info, ids = info_of(model, implementation), torch.randint(0, 200, (2, 5))
    kept, left, parts = [], [], {}

    def begin(routing):
        own = parts.setdefault(routing.layer, [])
        return lambda *one: own.append([x.clone() for x in one])

    def run(*callbacks):
        watch = ExpertWatch(model.model, info, info.layers, *callbacks)
        watch.start(*ids.shape)
        with torch.inference_mode():
            hidden = model.model(ids).last_hidden_state
        watch.end()
        watch.detach()
        return hidden

    one = run(lambda routed: kept.append(copied(routed)))
    two = run(lambda routed: left.append(copied(routed)), begin)
    assert torch.equal(one, two)
    hands_over = implementation == "eager" and family != "Llama4"
    assert set(parts) == (set(info.layers) if hands_over else set())
    for whole, rest in zip(kept, left, strict=True):
        assert torch.equal(whole["block"], rest["block"]) and torch.equal(whole["experts"], rest["experts"])
        if not hands_over:
            assert torch.equal(whole["down_in"], rest["down_in"])
            continue
        assert rest["rows"] is rest["down_in"] is rest["output"] is None
        slots, tokens, down_in, output = (torch.cat(part) for part in zip(*parts[rest["layer"]], strict=True))
        own, theirs = np.argsort(tokens * info.slots + slots), np.argsort(whole["rows"])
        assert torch.equal(down_in[own], whole["down_in"][theirs]) and torch.equal(output[own], whole["output"][theirs])
