"""Parts of a probe: what is kept of layers, the journal, sets of features, changed weights that come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.probe.changes import Known, feature_sets, matched_features, random_features
from outliers.probe.edits import LastPlace, Mean, Zero
from outliers.probe.journal import ProbeJournal
from outliers.probe.sharing import kept_layers
from outliers.probe.weights import changed_weights, nearest_weight, quantizing, reading_weights, zeroed_weight
from outliers.quantization.emulate import emulate_weight
from outliers.spec.formats import parse_format
from outliers.study.probe_memory import group_size, slice_tokens
from tests.probe.test_families import engine_of


@given(st.sets(st.integers(0, 90), max_size=40), st.integers(1, 1_000), st.integers(0, 20_000))
def test_kept_layers_fit_and_are_wanted(wanted, layer_bytes, most):
    kept = kept_layers(sorted(wanted), layer_bytes, most)
    assert list(kept) == sorted(set(kept)) and set(kept) <= wanted
    assert len(kept) * layer_bytes <= most or not kept
    assert len(kept) == min(len(wanted), most // layer_bytes)


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 22))
def test_groups_and_slices_are_bounded(hidden_bytes, vocabulary):
    size = group_size(hidden_bytes)
    assert 1 <= size <= 8 and (size == 1 or size * hidden_bytes <= 1 << 28)
    tokens = slice_tokens(vocabulary)
    assert tokens >= 1 and (tokens == 1 or tokens * vocabulary * 8 <= 32 * 1024 * 1024)


@given(st.sets(st.integers(0, 19), max_size=12), st.lists(st.floats(0, 100, width=32), min_size=20, max_size=20))
def test_matched_features_are_the_largest_of_the_others(systematic, sizes):
    found = matched_features(sorted(systematic), np.array(sizes))
    others = [f for f in range(20) if f not in systematic]
    assert len(found) == min(len(systematic), len(others)) and len(set(found)) == len(found)
    assert set(found) <= set(others)
    assert all(sizes[f] >= sizes[g] for f in found for g in others if g not in found)


def test_random_features_hang_on_the_seed_alone():
    assert random_features(5, 100, (1, 2), "a") == random_features(5, 100, (1, 2), "a")
    assert random_features(5, 100, (1, 2), "a") != random_features(5, 100, (1, 2), "b")
    assert sorted(random_features(100, 6, (1, 2), "a")) == [0, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_unit_in_the_last_place_is_one_pattern(dtype):
    x = torch.tensor([[[[1.0, -2.5, 0.375]]], [[[0.1, 3.0, -7.0]]]], dtype=dtype)
    moved = LastPlace(1)(x, None)
    wide = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(moved.view(wide) - x.view(wide), torch.tensor([0, 1, 0], dtype=wide).expand(2, 1, 1, 3))


def test_edits_write_into_nothing_that_they_are_given():
    x = torch.randn(1, 2, 3, 4)
    before = x.clone()
    for edit in (Zero((1,)), Mean((1, 2), (5.0, 6.0)), LastPlace(0)):
        assert not torch.equal(edit(x, None), x)
    assert torch.equal(x, before)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.booleans())
def test_a_journal_that_is_cut_or_changed_anywhere_loses_the_end_alone(tmp_path_factory, at, flip):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = ProbeJournal.open(path)
    for sequence in range(4):
        journal.append([{"change": "zero 7", "sequence": sequence, "nll": 0.1 * sequence}])
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    at = min(at, len(data) - 1)
    path.write_bytes(data[:at] + (bytes([data[at] ^ 1]) + data[at + 1 :] if flip else b""))
    sound = 0
    while sound < 4 and sum(map(len, lines[: sound + 1])) <= at:
        sound += 1
    again = ProbeJournal.open(path)
    assert [again.done["zero 7", s]["nll"] for s in range(sound)] == [0.1 * s for s in range(sound)]
    assert len(again.done) == sound and path.read_bytes() == b"".join(lines[:sound])
    again.append([{"change": "zero 7", "sequence": 9, "nll": 1.0}])
    assert ProbeJournal.open(path).done["zero 7", 9]["nll"] == 1.0


QUANTIZED = {
    # family: what reads attn_in and mlp_in, and whether its weights are (in, out)
    "GPT2": (("attn.c_attn.weight", "mlp.c_fc.weight"), True),
    "Mixtral": (("q_proj.weight", "k_proj.weight", "v_proj.weight", "experts.gate_up_proj"), False),
    "GptOss": (("q_proj.weight", "k_proj.weight", "v_proj.weight", "experts.gate_up_proj"), "experts"),
    "Llama4": (
        (
            "q_proj.weight",
            "k_proj.weight",
            "v_proj.weight",
            "experts.gate_up_proj",
            "gate_proj.weight",
            "up_proj.weight",
        ),
        "experts",
    ),
    "Qwen2Moe": (
        (
            "q_proj.weight",
            "k_proj.weight",
            "v_proj.weight",
            "experts.gate_up_proj",
            "gate_proj.weight",
            "up_proj.weight",
        ),
        False,
    ),
    "GraniteMoe": (None, False),
}


@pytest.mark.parametrize("family", list(QUANTIZED))
def test_quantized_weights_are_those_that_read_the_site(family):
    """Beside a model whose parameters are quantized by their names; afterwards every parameter is the object that it was."""
    engine, batch, _, layers = engine_of(family)
    form = parse_format("int4_token")
    own = {place: r for place, r in engine.readers.items() if place[0] in ("attn_in", "mlp_in")}
    objects = dict(engine.model.named_parameters())
    untouched = engine.forward(batch)
    with changed_weights(engine.layers, own, quantizing(form)):
        changed = engine.forward(batch)
    assert all(dict(engine.model.named_parameters())[name] is parameter for name, parameter in objects.items())
    assert torch.equal(engine.forward(batch), untouched) and not torch.equal(changed, untouched)
    names, turned = QUANTIZED[family]
    if names is None:
        names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        for layer in layers:
            (experts,) = [w for w in reading_weights(engine.readers["mlp_in", layer]) if w.tensor.dim() == 3]
            assert experts.rows().shape[-1] == 32 and "out" not in experts.name and "down" not in experts.name
            names += (f".{layer}.block_sparse_moe.experts.{experts.name}",)
    with torch.no_grad():
        for name, parameter in objects.items():
            if name.endswith(names):
                flip = turned is True or (turned == "experts" and "experts" in name and parameter.dim() == 3)
                rows = parameter.transpose(-1, -2) if flip else parameter
                made = (
                    torch.stack([emulate_weight(w, form) for w in rows])
                    if rows.dim() == 3
                    else emulate_weight(rows, form)
                )
                parameter.copy_(made.transpose(-1, -2) if flip else made)
    assert torch.equal(engine.forward(batch), changed)


def test_weights_come_back_from_a_pass_that_fails():
    engine, batch, _, _ = engine_of("Llama")
    objects = dict(engine.model.named_parameters())
    engine.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with (
        pytest.raises(ZeroDivisionError),
        changed_weights(engine.layers, engine.readers, quantizing(parse_format("int8_channel"))),
    ):
        engine.forward(batch)
    assert all(dict(engine.model.named_parameters())[name] is parameter for name, parameter in objects.items())


@pytest.mark.parametrize("turned", [False, True])
def test_one_weight_is_zero_for_a_block(turned):
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(5, 7) if turned else torch.nn.Linear(7, 5)
    original, values = module.weight, module.weight.detach().clone()
    with zeroed_weight(module, 4, 6):
        assert int((module.weight == 0).sum()) == 1
        assert module.weight[(6, 4) if turned else (4, 6)] == 0
    assert module.weight is original and torch.equal(original, values)
    rows = (values.t() if turned else values).numpy()
    sizes = {(r, c): abs(abs(rows[r, c]) - abs(rows[2, 3])) for r in range(5) for c in range(7) if (r, c) != (2, 3)}
    assert nearest_weight(module, 2, 3) == min(sizes, key=lambda at: (sizes[at], at))


def test_a_set_of_many_numbers_has_a_short_name():
    known = Known((), np.zeros(1000))
    names = [str(number) for number in range(100, 356)]
    found = feature_sets(names, known, 1000, "seed")
    assert found[0] == ("the 256 given", "asked", tuple(range(100, 356)))
    assert found[1] == ("100", "asked", (100,)) and len(found) == 257
    assert feature_sets(("systematic", "matched"), known, 1000, "seed") == []
