"""The totals of experts against loops over tokens and slots, and that parts join to the whole bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from outliers.errors import CaptureError, CorruptCapture, SummaryMismatch
from outliers.experts.count import _add_sequence
from outliers.experts.sums import LADDER
from outliers.experts.sums_files import choose, has_sums, sums_path
from outliers.experts.table import MARGIN
from outliers.experts.totals import OUTPUTS_KEPT, ExpertTotals
from outliers.experts.totals_files import read_totals, write_totals
from outliers.results.routing import mean_weight_sums, weight_sums
from outliers.store.chunks import ChunkFiles
from tests.support.expert_tables import LENGTHS, SEQUENCES, count


def test_counts_are_those_of_a_loop_over_tokens_and_slots(capture):
    _, plan, _, table, _, marks = capture
    shapes, found = plan.experts, count(capture)
    everyone = shapes.all_experts
    for layer in range(len(shapes.layers)):
        for expert in range(everyone):
            tokens, weights, kinds = 0, 0.0, [0, 0, 0]
            largest = {"down_in": None, "output": None}
            per_sequence, first_rows = [], []
            for sequence, length in enumerate(LENGTHS):
                own, first_row = 0, None
                for position in range(length):
                    for slot in range(shapes.all_slots):
                        at = layer, sequence, position, slot
                        if table["expert"][at] != expert:
                            continue
                        own += 1
                        weights += float(table["expert_weight"][at])
                        kinds[0] += position == 0
                        kinds[1] += bool(marks[sequence, 0, position])
                        kinds[2] += bool(marks[sequence, 1, position])
                        if not shapes.values:
                            continue
                        if first_row is None:
                            first_row = float(table["expert_output"][at])
                        for name, place in (("down_in", "column"), ("output", "channel")):
                            value = float(table[f"expert_{name}"][at])
                            if not math.isnan(value) and (largest[name] is None or value > largest[name][0]):
                                where = int(table[f"expert_{name}_{place}"][at])
                                largest[name] = (value, where, sequence, position)
                per_sequence.append(own)
                tokens += own
                if first_row is not None and not math.isnan(first_row):
                    first_rows.append(first_row)
            assert found.tokens[layer, expert] == tokens
            assert found.per_sequence[:, layer, expert].tolist() == per_sequence
            units = found.weight_whole[layer, expert] + found.weight_units[layer, expert] / 2**40
            assert units == pytest.approx(weights, rel=1e-9)
            assert found.by_kind[:, layer, expert].tolist() == kinds
            for name, place in (("down_in", "column"), ("output", "channel")):
                own = [getattr(found, f"{name}_{p}")[layer, expert] for p in ("max", place, "sequence", "position")]
                if largest[name] is None:
                    assert math.isnan(own[0]) and own[1:] == [-1, -1, -1]
                else:
                    assert own == list(largest[name])
            assert [v for v in [found.first_row[layer, expert]] if not math.isnan(v)] == first_rows[:0] + (
                [max(first_rows)] if first_rows else []
            )
    assert found.tokens[0, 4] == 0
    assert found.kinds.tolist() == [
        6,
        *(sum(int(marks[s, kind, : LENGTHS[s]].sum()) for s in range(SEQUENCES)) for kind in (0, 1)),
    ]


def test_margins_are_counted_by_their_upper_bits(capture):
    _, plan, _, table, _, _ = capture
    found = count(capture)
    for layer in range(2):
        seen = {}
        for sequence, length in enumerate(LENGTHS):
            for position in range(length):
                high = int(table[MARGIN][layer, sequence, position, 0].view(np.uint32)) >> 16
                seen[high] = seen.get(high, 0) + 1
        assert {int(b): int(found.margins[layer, b]) for b in np.flatnonzero(found.margins[layer])} == seen
    assert plan.experts.fields[-1] == MARGIN


def test_the_largest_outputs_come_in_a_total_order(capture):
    _, plan, _, table, _, _ = capture
    if not plan.experts.values:
        return
    found = count(capture)
    for layer in range(2):
        cells = []
        for sequence, length in enumerate(LENGTHS):
            for position in range(length):
                for slot in range(plan.experts.all_slots):
                    value = float(table["expert_output"][layer, sequence, position, slot])
                    if not math.isnan(value):
                        expert = int(table["expert"][layer, sequence, position, slot])
                        cells.append((-value, sequence, position, expert))
        own = found.outputs[found.outputs["layer"] == layer]
        assert [(-o["magnitude"], o["sequence"], o["position"], o["expert"]) for o in own] == sorted(cells)[
            :OUTPUTS_KEPT
        ]


def test_inputs_are_the_squares_of_mlp_in_of_each_experts_tokens(capture):
    _, plan, _, table, exact, _ = capture
    shapes, found = plan.experts, count(capture)
    if not shapes.values:
        assert found.input_squares is None
        return
    wanted = np.zeros((2, shapes.experts, shapes.hidden))
    for index, layer in enumerate(shapes.layers):
        for sequence, length in enumerate(LENGTHS):
            for position in range(length):
                for slot in range(shapes.slots):
                    expert = table["expert"][index, sequence, position, slot]
                    for column in range(shapes.hidden):
                        x = exact[layer, sequence, position, column]
                        if shapes.applied:
                            import torch

                            weight = float(table["expert_weight"][index, sequence, position, slot])
                            x = float((torch.tensor(x) * torch.tensor(weight)).bfloat16())
                        if math.isfinite(x):
                            wanted[index, expert, column] += float(x) ** 2
    np.testing.assert_allclose(found.input_squares, wanted, rtol=1e-12)


def same(a, b, exact=True):
    for name, value in a.__dict__.items():
        other = getattr(b, name)
        if name == "sums":
            assert (value is None) == (other is None)
            if value is not None:
                same(value, other, exact)
        elif isinstance(value, np.ndarray) and (not exact and value.dtype == np.float64):
            np.testing.assert_allclose(value, other, rtol=1e-12)
        elif isinstance(value, np.ndarray):
            assert value.tobytes() == other.tobytes() and value.shape == other.shape, name
        else:
            assert value == other


def test_parts_join_to_the_whole_in_any_order_and_through_files(capture, tmp_path):
    whole = count(capture)
    first, second = count(capture, range(4)), count(capture, range(4, 6))
    for name, part in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        write_totals(tmp_path / name, part)
    a, b = (read_totals(tmp_path / name) for name in ("a", "b"))
    same(first, a)
    same(whole, a.merged(b), exact=False)
    same(whole, b.merged(a), exact=False)
    with pytest.raises(SummaryMismatch, match="counts once"):
        a.merged(first)
    with pytest.raises(SummaryMismatch, match="do not merge"):
        a.merged(replace(b, study_id="another"))


def test_a_capture_that_lacks_sums_or_has_changed_bytes_is_refused(capture):
    folder, plan, _, _, _, _ = capture
    if plan.experts.values:
        sums_path(folder, range(4, 6)).unlink()
        assert not has_sums(folder, plan.experts, range(SEQUENCES))
        with pytest.raises(CaptureError, match="of 2 of 6 sequences"):
            count(capture)
        assert len(choose(folder, plan.experts, range(4))) == 1
        count(capture, range(4))
    path = ChunkFiles(folder, plan).path("expert", 0, 3, 0)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptCapture, match="its bytes changed"):
        count(capture, range(4))


def test_many_tokens_do_not_overflow_the_sum_of_weights(capture):
    """64 bits of units of 2^-40 hold 2^23 tokens of weight 1; 30 doublings are a billion tokens more."""
    found = count(capture)
    found.sequences, found.lengths, found.per_sequence = (
        v[:0] for v in (found.sequences, found.lengths, found.per_sequence)
    )
    found.sums = None
    whole = [
        [int(w) * 2**40 + int(u) for w, u in zip(ws, us, strict=True)]
        for ws, us in zip(found.weight_whole, found.weight_units, strict=True)
    ]
    for _ in range(30):
        found = found.merged(found)
    assert (found.weight_units < 2**40).all() and (found.weight_units >= 0).all()
    for at in np.ndindex(found.weight_units.shape):
        assert int(found.weight_whole[at]) * 2**40 + int(found.weight_units[at]) == whole[at[0]][at[1]] * 2**30


def test_a_weight_that_is_not_finite_leaves_its_expert_without_a_sum(capture):
    _, plan, _, table, _, _ = capture
    shapes, marks = plan.experts, np.zeros((2, 7), bool)
    own = {name: np.array(values[:, 0, :7]) for name, values in table.items()}
    own["expert_weight"][0, 3, 1] = np.nan
    own["expert_weight"][1, 2, 0] = np.inf
    totals = ExpertTotals.zero("s", shapes)
    totals.per_sequence = _add_sequence(totals, shapes, 0, own, marks)[None].astype(np.int32)
    totals.lengths = np.array([7])
    lost = {(0, int(own["expert"][0, 3, 1])), (1, int(own["expert"][1, 2, 0]))}
    assert set(zip(*np.nonzero(totals.weight_lost), strict=True)) == lost
    sums = weight_sums(totals)
    for at in np.ndindex(sums.shape):
        assert math.isnan(sums[at]) == (at in lost or totals.tokens[at] == 0)
    assert np.isnan(mean_weight_sums(totals)).all()


def test_a_summary_that_claims_other_shapes_is_refused(capture, tmp_path):
    found = count(capture)
    shapes, sums = found.shapes, found.sums
    last = {
        name: getattr(found, name)
        for name in ("output_position", "output_sequence", "output_channel", "down_in_column")
    }
    beyond = (
        {name: np.where(found.tokens > 0, 1 << 20, values) for name, values in last.items()} if shapes.values else {}
    )
    outputs = [found.outputs.copy() for _ in range(2)]
    for rows, name in zip(outputs, ("layer", "sequence"), strict=True):
        rows[name] += 40
    claims = [
        {"per_sequence": found.per_sequence[:, :1]},
        {"kinds": found.kinds.astype(np.int32)},
        {"shapes": replace(shapes, experts=1 << 30)},
        {"shapes": replace(shapes, layers=(1, "2"))},
        {"shapes": replace(shapes, layers=tuple(range(5_000)))},
        {"lengths": found.lengths[:2]},
        {"lengths": found.lengths - 40},
        {"sequences": found.sequences[::-1]},
        {"per_sequence": -found.per_sequence},
        *({name: values} for name, values in beyond.items()),
    ]
    if sums is not None:
        claims += [{"outputs": rows} for rows in outputs]
        # 40 gigabytes each, from a file of kilobytes
        claims += [{"shapes": replace(shapes, width=1 << 30)}, {"shapes": replace(shapes, hidden=1 << 30)}]
        claims += [{"sums": replace(sums, rows=sums.rows + 1)}, {"sums": replace(sums, sequences=sums.sequences + 1)}]
    for changes in claims:
        write_totals(tmp_path, replace(found, **changes))
        with pytest.raises(CorruptCapture):
            read_totals(tmp_path)
    assert len(LADDER) == 8
