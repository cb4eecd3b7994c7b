"""The watcher against loops over tokens and experts: every family, implementation and dtype; and that it changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from outliers.experts.watch import ExpertWatch
from outliers.model.experts import find_experts
from outliers.model.sites import study_anatomy
from tests.support import expert_oracle as oracle

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
ALL = [
    (family, implementation, dtype)
    for family in oracle.FAMILIES
    for implementation in oracle.IMPLEMENTATIONS
    for dtype in TOLERANCE
    if family != "Llama4" or implementation == "eager"  # it knows no implementations
]
QUICK = [case for n, case in enumerate(ALL) if case[2] == list(TOLERANCE)[(n // 3 + n) % 3]]
"""Each family in each implementation, in one dtype each, and each dtype in each implementation."""
ROWS, POSITIONS = 2, 5


def copied(routed):
    """The same with tensors that stay."""
    values = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in vars(routed).items()}
    shared = [
        (s.down_in.clone(), s.output.clone(), None if s.weight is None else s.weight.clone()) for s in routed.shared
    ]
    return values | {"shared": shared}


def watched(model, info, ids, layers=None, **options):
    """What a pass gives, layer by layer, and the hidden states at its end."""
    seen = []
    watch = ExpertWatch(model.model, info, layers or info.layers, lambda routed: seen.append(copied(routed)))
    try:
        watch.start(*ids.shape)
        with torch.inference_mode():
            hidden = model.model(ids, **options).last_hidden_state
        watch.end()
    finally:
        watch.detach()
    return seen, hidden


def info_of(model, implementation="eager", quantization=None):
    anatomy = study_anatomy(model, model.config)
    return find_experts(model.model, anatomy, model.config, implementation, quantization)


def block_inputs(model, family, ids):
    """What each block of experts gets and gives in a pass that nobody watches, by layer, and the hidden states."""
    found, handles = {}, []
    for layer in range(model.config.num_hidden_layers):
        parts = oracle.block_of(model, family, layer)
        if parts is not None:

            def keep(_module, arguments, output, layer=layer):
                first = output[0] if isinstance(output, tuple) else output
                found[layer] = (
                    arguments[0].clone().flatten(0, 1),
                    first.clone().reshape(arguments[0].shape).flatten(0, 1),
                )

            handles.append(parts[0].register_forward_hook(keep))
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state
    for handle in handles:
        handle.remove()
    return found, hidden


def close(found, wanted, dtype):
    scale = max(1.0, float(wanted.abs().max()))
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).abs().max()) <= TOLERANCE[dtype] * scale


def check_layer(model, family, seen, given, output, dtype):
    """One layer against the loops."""
    name = family.partition(",")[0]
    block, router, experts, shared = oracle.block_of(model, family, seen["layer"])
    index, slots = seen["experts"], seen["experts"].shape[1]
    assert sorted(seen["rows"].tolist()) == list(range(index.numel()))
    assert seen["applied"] == (name == "Llama4")
    place = {int(slot): row for row, slot in enumerate(seen["rows"].tolist())}
    for token, x in enumerate(given.double()):
        score, made_of = oracle.scores(name, router, x)
        chosen = index[token].tolist()
        room = TOLERANCE[dtype] * max(1.0, *(abs(value) for value in score if value > -math.inf))
        gap = oracle.margin(score, chosen)
        assert math.isnan(gap) or gap >= -2 * room
        assert (math.isnan(gap) and math.isnan(seen["margin"][token])) or abs(
            float(seen["margin"][token]) - gap
        ) <= 2 * room
        weight = oracle.weights(name, router, model.config, made_of, chosen)
        close(seen["weights"][token], torch.tensor(weight, dtype=torch.float64), dtype)
        total = torch.zeros(len(x), dtype=torch.float64)
        for slot in range(slots):
            row, factor = place[token * slots + slot], float(seen["weights"][token, slot])
            inner, _ = oracle.expert(name, experts, chosen[slot], x * factor if name == "Llama4" else x)
            close(seen["down_in"][row], inner, dtype)
            out = oracle.second_of(name, experts, chosen[slot], seen["down_in"][row])
            close(seen["output"][row], out, dtype)
            total += out if name == "Llama4" else factor * out
        if shared is not None:
            inner, out = oracle.shared_expert(shared, x)
            own_in, own_out, own_weight = seen["shared"][0]
            close(own_in[token], inner, dtype)
            close(own_out[token], out, dtype)
            gate = (
                oracle.sigmoid(float(block.shared_expert_gate.weight.double() @ x)) if own_weight is not None else 1.0
            )
            assert own_weight is None or abs(float(own_weight[token]) - gate) <= TOLERANCE[dtype]
            assert (own_weight is not None) == (name in ("Qwen2Moe", "Qwen3Next"))
            total += gate * out
        assert bool(shared is not None) == bool(seen["shared"])
        close(seen["block"][token], total, dtype)
    assert torch.equal(seen["block"], output)


def check(family, implementation, dtype, **changes):
    """A whole model: every layer against the loops, and its hidden states the same bits with and without the watcher."""
    model = oracle.build(family, implementation, dtype, **changes)
    ids = torch.randint(0, 200, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(1))
    info = info_of(model, implementation)
    given, bare = block_inputs(model, family, ids)
    seen, hidden = watched(model, info, ids)
    assert torch.equal(hidden.view(torch.uint8), bare.view(torch.uint8))
    assert [layer["layer"] for layer in seen] == list(info.layers) == sorted(given)
    for layer in seen:
        check_layer(model, family, layer, *given[layer["layer"]], dtype)


@pytest.mark.parametrize(("family", "implementation", "dtype"), QUICK)
def test_equals_loops(family, implementation, dtype):
    check(family, implementation, dtype)


@pytest.mark.long
@pytest.mark.parametrize(("family", "implementation", "dtype"), [case for case in ALL if case not in QUICK])
def test_equals_loops_everywhere(family, implementation, dtype):
    check(family, implementation, dtype)
