"""What experts should be seen to do: loops over tokens and experts in float64, from a module's parameters alone.

It shares no code with the watcher. What a block of experts is given comes from a pre-hook of a pass of its own.
"""

from __future__ import annotations

import math

import torch
import transformers

from tests.support.tiny import CONFIGS

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
FAMILIES = tuple(
    name
    for name, (_, values) in CONFIGS.items()
    if {"num_experts_per_tok", "num_local_experts", "n_routed_experts"} & set(values)
)
PATHS = {"Llama4": ("feed_forward", "router"), "GraniteMoe": ("block_sparse_moe", "router")}
ROUTER = {"GptOss": "router", "Phimoe": "router"}
SHARED = {
    "Qwen2Moe": "shared_expert",
    "Qwen3Next": "shared_expert",
    "Llama4": "shared_expert",
    "Glm4Moe": "shared_experts",
    "DeepseekV3": "shared_experts",
}


def build(family, implementation, dtype, seed=0, **changes):
    """A tiny model with weights large enough that tokens are routed apart, and biases that are not zero."""
    torch.manual_seed(seed)
    kind, values = CONFIGS[family]
    config = getattr(transformers, f"{kind}Config")(**(values | changes))
    named = {} if family == "Llama4" else {"experts_implementation": implementation}
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **named).eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if any(part in name for part in ("mlp", "feed_forward", "block_sparse_moe")):
                value.copy_(0.3 * torch.randn(value.shape))
    return model


def block_of(model, family, layer):
    """(block, router, experts, shared expert or None) of one layer, None for a dense one."""
    name = family.partition(",")[0]
    block, router = PATHS.get(name, ("mlp", ROUTER.get(name, "gate")))
    found = getattr(model.get_submodule("model.layers")[layer], block)
    if not hasattr(found, "experts"):
        return None
    return found, getattr(found, router), found.experts, getattr(found, SHARED.get(name, ""), None)


def silu(x):
    """x times its sigmoid, element by element."""
    return torch.tensor([v / (1 + math.exp(-v)) if v > -700 else 0.0 for v in x.tolist()], dtype=torch.float64)


def sigmoid(value):
    """Of one number."""
    return 1 / (1 + math.exp(-value))


def expert(family, experts, number, x):
    """(input of the second projection, output) of one expert for one token, float64."""
    first, second = experts.gate_up_proj[number].double(), experts.down_proj[number].double()
    if family == "GptOss":
        both = x @ first + experts.gate_up_proj_bias[number].double()
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        inner = (up + 1) * torch.tensor([g * sigmoid(1.702 * g) for g in gate.tolist()], dtype=torch.float64)
        return inner, inner @ second + experts.down_proj_bias[number].double()
    both = x @ first if family == "Llama4" else first @ x
    gate, up = both[: len(both) // 2], both[len(both) // 2 :]
    inner = silu(gate) * up
    return inner, inner @ second if family == "Llama4" else second @ inner


def second_of(family, experts, number, inner):
    """What the second projection gives for an input that was seen."""
    second = experts.down_proj[number].double()
    if family == "GptOss":
        return inner.double() @ second + experts.down_proj_bias[number].double()
    return inner.double() @ second if family == "Llama4" else second @ inner.double()


def shared_expert(module, x):
    """(input of the second projection, output) of a shared expert for one token."""
    inner = silu(module.gate_proj.weight.double() @ x) * (module.up_proj.weight.double() @ x)
    return inner, module.down_proj.weight.double() @ inner


def scores(family, router, x):
    """(what the router chooses by, what the weights are made of), one number an expert, for one token."""
    logits = router.weight.double() @ x
    if family == "GptOss":
        logits = logits + router.bias.double()
    logits = logits.tolist()
    if family in ("Glm4Moe", "DeepseekV3"):
        plain = [sigmoid(value) for value in logits]
        chosen_by = [a + b for a, b in zip(plain, router.e_score_correction_bias.double().tolist(), strict=True)]
        size = len(plain) // router.num_group
        groups = [sorted(chosen_by[g * size : (g + 1) * size])[-2:] for g in range(router.num_group)]
        best = sorted(range(len(groups)), key=lambda g: -sum(groups[g]))[: router.topk_group]
        return [value if e // size in best else -math.inf for e, value in enumerate(chosen_by)], plain
    if family in ("GptOss", "Llama4", "Phimoe", "GraniteMoe"):
        return logits, logits
    largest = max(logits)
    shares = [math.exp(value - largest) for value in logits]
    shares = [share / sum(shares) for share in shares]
    return shares, shares


def weights(family, router, config, logits, chosen):
    """What the outputs of the chosen experts are multiplied by, in their order."""
    values = [logits[e] for e in chosen]
    if family == "Llama4":
        return [sigmoid(value) for value in values]
    if family == "Phimoe":  # each of the two is a softmax over those within 2 x jitter of the largest that is left
        return [_sparse(logits, chosen[:n], chosen[n], router.router_jitter_noise) for n in range(2)]
    if family in ("GptOss", "GraniteMoe"):
        largest = max(values)
        shares = [math.exp(value - largest) for value in values]
        return [share / sum(shares) for share in shares]
    if family == "Mixtral" or config.norm_topk_prob:
        values = [value / sum(values) for value in values]
    return [value * getattr(router, "routed_scaling_factor", 1.0) for value in values]


def _sparse(logits, before, chosen, jitter):
    left = [e for e in range(len(logits)) if e not in before]
    largest = max(logits[e] for e in left)
    kept = [e for e in left if (largest - logits[e]) / max(abs(logits[e]), largest) <= 2 * jitter]
    return math.exp(logits[chosen] - largest) / sum(math.exp(logits[e] - largest) for e in kept)


def margin(score, chosen):
    """Least score of a chosen expert less the largest of the others that could have been chosen."""
    others = [value for e, value in enumerate(score) if e not in chosen and value > -math.inf]
    return min(score[e] for e in chosen) - max(others) if others else math.nan
