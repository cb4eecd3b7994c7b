"""Silent experts: bit-equal to a model whose expert has no second projection; their controls; what is refused and said."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.errors import SiteError
from outliers.probe.changes import Change
from outliers.probe.engine import Batch, Engine
from outliers.probe.expert_choice import ExpertChoice, choose_controls, choose_experts
from outliers.probe.silence import count_load, silenced
from tests.probe.test_families import engine_of
from tests.support import tiny

FAMILIES = [
    name for name in tiny.CONFIGS if "oe" in name or name in ("Mixtral", "GptOss", "Llama4", "DeepseekV3", "Qwen3Next")
]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
LENGTHS = (12, 7)


def modules_of(engine):
    """layer -> its module of experts, by the path alone."""
    found = {}
    for name, module in engine.base.named_modules():
        if name.endswith(".experts"):
            found[int(name.split(".")[-3])] = module
    return found


def without(engine, batch, experts):
    """The last hidden state of a copy whose experts have no second projection."""
    model = copy.deepcopy(engine.model)
    base = model.get_submodule(engine.anatomy.backbone)
    for layer, expert in experts:
        module = modules_of(Engine(model, engine.anatomy, {}))[layer]
        with torch.no_grad():
            module.down_proj[expert] = 0
            if hasattr(module, "down_proj_bias"):
                module.down_proj_bias[expert] = 0
    mask = torch.tensor([[place < length for place in range(12)] for length in batch.lengths])
    with torch.inference_mode():
        return base(input_ids=batch.ids, attention_mask=None if mask.all() else mask.long(), use_cache=False)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silent_expert_is_one_without_its_second_projection(family):
    engine, batch, _, _ = engine_of(family)
    modules, layers = modules_of(engine), engine.anatomy.moe_layers
    assert tuple(modules) == layers
    engine.silent_layers = layers
    for implementation in IMPLEMENTATIONS if family != "Llama4" else ("eager",):
        engine.model.set_experts_implementation(implementation)
        untouched = engine.forward(batch)
        same = engine.run(Change("identity", "identity", (), layers), batch, None, None)
        assert torch.equal(same, untouched)
        moved = []
        for experts in ([(layers[0], 1)], [(layers[-1], 3)], [(layers[0], 0), (layers[0], 2), (layers[-1], 1)]):
            change = Change("", "silence", layers=tuple({layer for layer, _ in experts}), experts=tuple(experts))
            found = engine.run(change, batch, None, None)
            assert torch.equal(found, without(engine, batch, experts)), (implementation, experts)
            moved.append(not torch.equal(found, untouched))
        assert any(moved)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_load_is_what_each_token_chooses(family):
    """Against the router's own choice for each token, in a loop; padding is left out, and added up over passes."""
    engine, batch, _, _ = engine_of(family)
    batch = Batch(batch.sequences, batch.ids, LENGTHS, 2)
    modules = modules_of(engine)
    routers = {layer: engine.base.get_submodule(engine.anatomy.router.replace("*", str(layer))) for layer in modules}
    wanted = {layer: np.zeros(4) for layer in modules}

    def see(layer):
        def after(_module, _args, output):
            if family == "Llama4":
                chosen = [set(np.flatnonzero(row).tolist()) for row in output[0].numpy()]
            else:
                index = next(part for part in output if not part.is_floating_point())
                chosen = [set(row) for row in index.tolist()]
            for sequence, length in enumerate(LENGTHS):
                for position in range(length):
                    for expert in chosen[sequence * 12 + position]:
                        wanted[layer][expert] += 1

        return after

    handles = [router.register_forward_hook(see(layer)) for layer, router in routers.items()]
    load = {layer: np.zeros(4) for layer in modules}
    for _ in range(2):
        with count_load(modules, load, LENGTHS, engine.now):
            engine.forward(batch)
    for handle in handles:
        handle.remove()
    slots = 1 if family == "Llama4" else 2
    for layer, own in wanted.items():
        assert own.sum() == 2 * 19 * slots
        assert load[layer].tolist() == own.tolist()


def test_experts_that_receive_something_else_are_refused():
    """Kernels that sort the tokens before give neither the chosen experts nor their weights."""

    class Kernel(torch.nn.Module):
        def forward(self, hidden, routing, gather):
            return hidden

    engine, _, _, _ = engine_of("Mixtral")
    engine.now.sequences, engine.now.positions = 1, 4
    hidden, routing = torch.zeros(4, 8), torch.zeros(4, 4)
    kernel = Kernel()
    with (
        silenced({1: kernel}, {1: {0}}, engine.now),
        pytest.raises(SiteError, match=r"layer 1 .Kernel. receive .*neither"),
    ):
        kernel(hidden, routing, torch.zeros(8, dtype=torch.int32))
    assert not kernel._forward_pre_hooks


def test_experts_with_a_bias_are_not_silenced_by_their_input():
    class Biased(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 8, 4))

        def forward(self, hidden):
            return hidden + 1

    engine, _, _, _ = engine_of("Llama4")
    engine.now.sequences, engine.now.positions = 1, 4
    biased = Biased()
    with (
        silenced({0: biased}, {0: {1}}, engine.now),
        pytest.raises(SiteError, match="gives more than 0 for an input of 0"),
    ):
        biased(torch.ones(8, 8))


@settings(deadline=None)
@given(
    load=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    expert=st.integers(0, 11),
    others=st.sets(st.integers(0, 11), max_size=4),
)
def test_controls_are_reached_and_the_one_of_equal_load_is_nearest(load, expert, others):
    expert %= len(load)
    counts = np.array(load, np.int64)
    found = choose_controls(counts, expert, others, "seed")
    left = [number for number, count in enumerate(load) if count and number != expert and number not in others]
    assert set(found.values()) <= set(left)
    assert len(found) == len(set(found.values())) == min(2, len(left))
    if left:
        distances = {number: abs(load[number] - load[expert]) for number in left}
        nearest = [number for number in left if distances[number] == min(distances.values())]
        assert found["load"] == nearest[0]
    assert found == choose_controls(counts, expert, others, "seed")


def test_the_random_control_hangs_on_the_seed():
    counts = np.full(64, 5)
    drawn = {choose_controls(counts, 3, (), f"seed {number}")["random"] for number in range(40)}
    assert len(drawn) > 20 and 3 not in drawn


def test_super_experts_that_no_token_reaches_are_unknown():
    load = {1: np.array([3, 0, 2, 5]), 2: np.array([1, 1, 0, 0])}
    wanted = [((1, 1), "super"), ((1, 3), "super"), ((2, 0), "super"), ((2, 3), "asked")]
    found = choose_experts(wanted, load, "s")
    assert found.unreached == ((1, 1), (2, 3)) and found.together == ((1, 3), (2, 0)) and found.layers == (1, 2)
    names = [(one.at, one.role, one.of, one.tokens) for one in found.singles]
    assert names[0] == ((1, 3), "super", None, 5)
    assert {names[1][0], names[2][0]} == {(1, 0), (1, 2)} and {names[1][1], names[2][1]} == {"random", "load"}
    # expert 0 of layer 1 has 3 tokens and is nearest to 5
    assert [at for at, role, _, _ in names if role == "load"] == [(1, 0), (2, 1)]
    assert found.load == ((1, 0), (2, 1)) and found.random == ()  # layer 2 has one other that is reached
    assert ExpertChoice().layers == ()


def test_super_experts_of_one_layer_stand_beside_different_ones():
    load = {0: np.array([4, 4, 4, 4, 9, 9, 9, 9, 0])}
    found = choose_experts([((0, 0), "super"), ((0, 1), "super"), ((0, 2), "super")], load, "s")
    assert found.load == ((0, 3), (0, 4), (0, 5))
    assert len(set(found.random)) == 3 and not {(0, 0), (0, 1), (0, 2), (0, 8)} & set(found.random)
    many = {0: np.full(40, 3)}
    found = choose_experts([((0, number), "super") for number in range(12)], many, "s")
    assert len(found.together) == len(set(found.load)) == len(set(found.random)) == 12
    assert [one.at[1] for one in found.singles if one.role == "super"] == list(range(8))
