"""The watcher against loops over tokens and experts: every family, implementation and dtype; and that it changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from outliers.errors import SiteError
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
    """What each block of experts gets and gives in a pass that is not watched, by layer, and the hidden states."""
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


@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_what_is_known_of_a_family(family):
    """Layers, counts and widths against the modules, read by name."""
    model = oracle.build(family, "eager", torch.float32)
    info = info_of(model)
    blocks = {n: oracle.block_of(model, family, n) for n in range(3)}
    there = [n for n, block in blocks.items() if block is not None]
    block, router, experts, shared = blocks[there[0]]
    assert list(info.layers) == there
    assert model.model.get_submodule(info.router.replace("*", str(there[0]))) is router
    assert model.model.get_submodule(info.experts.replace("*", str(there[0]))) is experts
    assert model.model.get_submodule(info.block.replace("*", str(there[0]))) is block
    assert info.count == len(experts.down_proj) == router.weight.shape[0]
    assert sorted((info.width, 32)) == sorted(experts.down_proj.shape[1:]) and info.width != 32
    assert [model.model.get_submodule(p.replace("*", str(there[0]))) for p in info.shared] == [shared] * (
        shared is not None
    )
    assert info.shared_widths == (() if shared is None else (shared.down_proj.weight.shape[1],))
    assert info.slots == (1 if family == "Llama4" else 2) and info.applied == (family == "Llama4")
    assert info.watch == "all" and info.reason is None


def test_kernels_that_hide_experts_leave_their_routing():
    model = oracle.build("Qwen3Moe", "eager", torch.float32)
    for method in ("mxfp4", "fp8", "bitsandbytes"):
        info = info_of(model, "grouped_mm", method)
        assert info.watch == "routing" and method in info.reason
    assert "sonicmoe" in info_of(model, "sonicmoe").reason
    assert info_of(oracle.build("Llama", "eager", torch.float32)) is None


def test_a_router_that_is_not_known_is_not_read():
    model = oracle.build("Mixtral", "eager", torch.float32)
    for layer in model.model.layers:
        layer.mlp.gate.__class__ = type("OtherRouter", (type(layer.mlp.gate),), {})
    assert info_of(model) is None


@pytest.mark.parametrize("family", ["Mixtral", "Glm4Moe", "Llama4", "GraniteMoe"])
def test_routing_alone_is_the_same_routing(family):
    model = oracle.build(family, "eager", torch.float32)
    ids = torch.randint(0, 200, (2, 3))
    info = info_of(model)
    whole, _ = watched(model, info, ids)
    alone, _ = watched(model, info.model_copy(update={"watch": "routing", "reason": "asked"}), ids)
    for a, b in zip(whole, alone, strict=True):
        for name in ("experts", "weights", "margin"):
            assert torch.equal(torch.nan_to_num(a[name], nan=-1), torch.nan_to_num(b[name], nan=-1))
        assert b["rows"] is None and b["down_in"] is None and b["output"] is None and b["block"] is None
        assert b["shared"] == [] and b["applied"] == (family == "Llama4")


def test_a_block_that_calls_no_router_is_read_by_its_logits():
    """As transformers' MXFP4 does it: the block's forward multiplies by the router's weight and gives (sum, logits)."""
    model = oracle.build("GptOss", "eager", torch.float32)
    info = info_of(model, "eager", "mxfp4")
    ids = torch.randint(0, 200, (2, 3))
    wanted, _ = watched(model, info, ids)

    def forward(block, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = torch.nn.functional.linear(flat, block.router.weight, block.router.bias)
        values, chosen = logits.topk(2)
        return type(block.experts).forward(block.experts, flat, chosen, values.softmax(1)).view_as(hidden), logits

    kernel = type("Mxfp4GptOssExperts", (type(model.model.layers[0].mlp.experts),), {})
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = kernel
        layer.mlp.forward = forward.__get__(layer.mlp)
    found, _ = watched(model, info, ids)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a["experts"], b["experts"]) and torch.equal(a["margin"], b["margin"])
        close(a["weights"], b["weights"].double(), torch.float32)


@pytest.mark.parametrize("implementation", oracle.IMPLEMENTATIONS)
def test_hooks_of_accelerate_and_padding(implementation):
    """Modules under accelerate's hooks, and sequences of unequal length, are read as any others."""
    model = oracle.build("Qwen2Moe", implementation, torch.float32)
    ids = torch.randint(0, 200, (ROWS, POSITIONS))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    info = info_of(model, implementation)
    wanted, bare = watched(model, info, ids, attention_mask=mask)
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    found, hidden = watched(model, info, ids, attention_mask=mask)
    assert torch.equal(hidden, bare)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a["down_in"], b["down_in"]) and torch.equal(a["block"], b["block"])
        assert torch.equal(a["shared"][0][2], b["shared"][0][2])


@pytest.mark.parametrize("implementation", oracle.IMPLEMENTATIONS)
def test_many_small_experts(implementation):
    """512 experts, most of which no token reaches."""
    check("Qwen3Moe", implementation, torch.float32, num_experts=512, num_hidden_layers=1, moe_intermediate_size=8)


def test_groups_and_a_token_that_reaches_every_expert():
    """The margin is within the groups that were chosen; there is no margin where no other expert could be chosen."""
    check("DeepseekV3", "eager", torch.float32, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)
    check("Glm4Moe", "eager", torch.float32, n_routed_experts=8, n_group=4, topk_group=1)
    check("Mixtral", "grouped_mm", torch.float32, num_experts_per_tok=4)


def test_an_error_leaves_no_mode_open_and_the_next_pass_works():
    model = oracle.build("Mixtral", "eager", torch.float32)
    info, ids, seen = info_of(model), torch.randint(0, 200, (1, 4)), []
    watch = ExpertWatch(model.model, info, info.layers, lambda routed: seen.append(routed.layer))

    def fail(*_):
        raise RuntimeError("no memory")

    for module in (model.model.layers[1].mlp.experts.act_fn, model.model.layers[1].mlp.gate):
        failing = module.register_forward_pre_hook(fail)
        watch.start(1, 4)
        with pytest.raises(RuntimeError, match="no memory"), torch.inference_mode():
            model.model(ids)
        assert torch._C._len_torch_function_stack() == 0
        failing.remove()
        seen.clear()
        watch.start(1, 4)
        with torch.inference_mode():
            model.model(ids)
        watch.end()
        assert seen == [0, 1, 2]
    seen.clear()
    with torch.inference_mode():
        model.model(ids)  # between passes the hooks do nothing
    assert seen == []
    watch.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_pass_that_is_not_as_promised_is_refused():
    model = oracle.build("Mixtral", "eager", torch.float32)
    info = info_of(model)
    ids = torch.randint(0, 200, (1, 4))

    def run(change=None, tokens=4, times=1, **options):
        other = info.model_copy(update=change or {})
        watch = ExpertWatch(model.model, other, (0, 2), lambda routed: None)
        try:
            watch.start(1, tokens)
            with torch.inference_mode():
                for _ in range(times):
                    model.model(ids, **options)
            watch.end()
        finally:
            watch.detach()

    run()
    with pytest.raises(SiteError, match=r"not those of layer 0 \(0 times\), 2 \(0 times\)"):
        run(times=0)
    with pytest.raises(SiteError, match=r"layer 0 \(2 times\)"):
        run(times=2)
    with pytest.raises(SiteError, match=r"\(4, 2\) and should be \(5, 2\)"):
        run(tokens=5)
    for change in ({"slots": 1}, {"count": 8}, {"width": 24}):
        with pytest.raises(SiteError, match="can't be read"):
            run(change)
    with pytest.raises(SiteError, match="layer 7 has no experts"):
        ExpertWatch(model.model, info, (7,), lambda routed: None)


def test_a_module_that_multiplies_otherwise_is_refused():
    """Another version of a family's code is not read as if it were the known one."""
    model = oracle.build("Mixtral", "eager", torch.float32)
    experts = model.model.layers[0].mlp.experts
    plain = experts.act_fn.forward
    experts.act_fn.forward = lambda x: plain(x) @ torch.eye(x.shape[-1])
    with pytest.raises(SiteError, match="should multiply twice"):
        watched(model, info_of(model), torch.randint(0, 200, (1, 4)))


@pytest.mark.parametrize("shape", [(4, 33, 48), (5, 32, 48), (4, 32, 40)], ids=["outputs", "experts", "widths"])
def test_experts_of_several_shapes_are_left_out(shape):
    """The model itself is described and read: its experts alone are not."""
    model = oracle.build("Mixtral", "eager", torch.float32)
    assert info_of(model).count == 4
    _, _, experts, _ = oracle.block_of(model, "Mixtral", 1)
    experts.down_proj = torch.nn.Parameter(torch.zeros(shape))
    assert info_of(model) is None
