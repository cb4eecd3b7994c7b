"""Where the sites are in each model family: a table by role; no name of a module is guessed.

It holds paths only: which child of a decoder layer plays which role. `sites` turns a row into the modules of one model and
checks that each is there. A family that is not in the table is refused with what was found in it, and can be read by naming
its modules (`--site-module`).
Source: the module trees of transformers 5, each checked in the tests against independent hooks on what attention
and MLP receive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

INPUT = ":input"
"""Suffix of a module's path: its input is read, not its output. The same notation serves `--site-module`."""


@dataclass(frozen=True)
class Family:
    """Children that play each role, relative to one decoder layer; `layers` is relative to the backbone.

    Alternatives are tried in order and the first that is a child of the layer is taken, layer by layer. The two norms
    may be the same module (`alias_of`), or a path with `:input` where no norm comes before: what is read is always the
    tensor that attention, or the MLP or router, receives. `mlp_output` is the second projection of a dense MLP, which a
    layer of experts does not have.

    Projections that multiply what a site gives: `attention_readers` read `attn_in`, those of them that are in the layer's
    kind of attention; `mlp_readers` read `mlp_in` in a dense layer, `router`, `experts` and `shared_readers` in a layer of
    experts. `inner` are projections that read no site.
    """

    layers: str = "layers"
    attention_norm: tuple[str, ...] = ("input_layernorm",)
    mlp_norm: tuple[str, ...] = ("post_attention_layernorm",)
    attention_output: tuple[str, ...] = ("self_attn.o_proj",)
    mlp_output: tuple[str, ...] = ("mlp.down_proj",)
    router: str | None = None
    experts: str | None = None
    attention_readers: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp_readers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    shared_readers: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()


LLAMA = Family()
GEMMA = Family(mlp_norm=("pre_feedforward_layernorm",))  # its post_attention_layernorm is on attention's own output
GPT2 = Family(
    layers="h",
    attention_norm=("ln_1",),
    mlp_norm=("ln_2",),
    attention_output=("attn.c_proj", "attn.out_proj"),
    mlp_output=("mlp.c_proj",),
    attention_readers=("attn.c_attn",),
    mlp_readers=("mlp.c_fc",),
)
NEOX = Family(
    attention_output=("attention.dense",),
    mlp_output=("mlp.dense_4h_to_h",),
    attention_readers=("attention.query_key_value",),
    mlp_readers=("mlp.dense_h_to_4h",),
)
OPT = Family(
    layers="decoder.layers",
    attention_norm=("self_attn_layer_norm",),
    mlp_norm=("final_layer_norm",),
    attention_output=("self_attn.out_proj",),
    mlp_output=("fc2",),
    mlp_readers=("fc1",),
)
# one norm for both, or one each, as the config has it
FALCON = Family(
    layers="h",
    attention_norm=("ln_attn", "input_layernorm"),
    mlp_norm=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
    attention_output=("self_attention.dense",),
    mlp_output=("mlp.dense_4h_to_h",),
    attention_readers=("self_attention.query_key_value",),
    mlp_readers=("mlp.dense_h_to_4h",),
)
# post-norm: the norms are on the outputs of attention and MLP, which read the residual stream itself
POST_NORM = Family(attention_norm=("self_attn:input",), mlp_norm=("mlp:input",))
MOE = Family(router="mlp.gate", experts="mlp.experts")
MOE_ROUTER = Family(router="mlp.router", experts="mlp.experts")
MOE_GATED = replace(  # one shared expert behind a gate of its own
    MOE,
    shared_readers=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"),
    inner=("mlp.shared_expert.down_proj",),
)
MOE_SHARED = replace(
    MOE,
    shared_readers=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    inner=("mlp.shared_experts.down_proj",),
)
LATENT = replace(  # attention through narrow projections, whose second halves read no site
    MOE_SHARED,
    attention_readers=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    inner=("self_attn.q_b_proj", "self_attn.kv_b_proj", *MOE_SHARED.inner),
)
DIRECT = replace(  # the same without the narrow one of the queries (q_lora_rank is null)
    LATENT,
    attention_readers=("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"),
    inner=("self_attn.kv_b_proj", *MOE_SHARED.inner),
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "Phi3ForCausalLM": replace(LLAMA, attention_readers=("self_attn.qkv_proj",), mlp_readers=("mlp.gate_up_proj",)),
    "OlmoForCausalLM": LLAMA,
    "SmolLM3ForCausalLM": LLAMA,
    "GraniteForCausalLM": LLAMA,
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA,
    "Gemma3ForConditionalGeneration": GEMMA,
    "GPT2LMHeadModel": GPT2,
    "GPTNeoXForCausalLM": NEOX,
    # one norm for both attention and MLP, which run side by side
    "GPTJForCausalLM": replace(
        GPT2,
        mlp_norm=("ln_1",),
        mlp_output=("mlp.fc_out",),
        attention_readers=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        mlp_readers=("mlp.fc_in",),
    ),
    "PhiForCausalLM": Family(
        mlp_norm=("input_layernorm",),
        attention_output=("self_attn.dense",),
        mlp_output=("mlp.fc2",),
        mlp_readers=("mlp.fc1",),
    ),
    "OPTForCausalLM": OPT,
    "FalconForCausalLM": FALCON,
    "BloomForCausalLM": replace(FALCON, attention_norm=LLAMA.attention_norm, mlp_norm=LLAMA.mlp_norm),
    "Olmo2ForCausalLM": POST_NORM,
    "Olmo3ForCausalLM": POST_NORM,
    "MixtralForCausalLM": MOE,
    "OlmoeForCausalLM": MOE,
    "Qwen2MoeForCausalLM": MOE_GATED,
    "Qwen3MoeForCausalLM": MOE,
    "Qwen3NextForCausalLM": replace(
        MOE_GATED,
        attention_output=("self_attn.o_proj", "linear_attn.out_proj"),
        attention_readers=(*MOE.attention_readers, "linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
    ),
    "Glm4MoeForCausalLM": MOE_SHARED,
    "DeepseekV3ForCausalLM": LATENT,
    "GptOssForCausalLM": MOE_ROUTER,
    "PhimoeForCausalLM": MOE_ROUTER,
    "Llama4ForCausalLM": replace(
        LLAMA,
        mlp_output=("feed_forward.down_proj",),
        router="feed_forward.router",
        experts="feed_forward.experts",
        mlp_readers=("feed_forward.gate_proj", "feed_forward.up_proj"),
        shared_readers=("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj"),
        inner=("feed_forward.shared_expert.down_proj",),
    ),
    "GraniteMoeForCausalLM": replace(LLAMA, router="block_sparse_moe.router", experts="block_sparse_moe.experts"),
}


def family(architecture: str, config: Any) -> Family | None:
    """The row of a transformers class under its config; None if the table has no such class."""
    found = FAMILIES.get(architecture)
    if found is OPT and not getattr(config, "do_layer_norm_before", True):
        # OPT-350m: attention reads the residual stream, and the MLP what the norm after attention gives
        return replace(OPT, attention_norm=("self_attn:input",), mlp_norm=("self_attn_layer_norm",))
    if found is LATENT and getattr(config, "q_lora_rank", 0) is None:
        return DIRECT
    return found


def site_roles(row: Family) -> Mapping[str, tuple[str, ...]]:
    """Site -> the alternatives of its module, relative to a layer; empty text is the layer itself."""
    return {
        "attn_in": row.attention_norm,
        "mlp_in": row.mlp_norm,
        "o_in": tuple(name + INPUT for name in row.attention_output),
        "down_in": tuple(name + INPUT for name in row.mlp_output),
        "resid": ("",),
    }


def expert_counts(config: Any) -> tuple[int, int] | None:
    """(experts, experts a token is routed to) of a mixture-of-experts config, None for a dense one."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        experts = getattr(config, name, None)
        if experts:
            return int(experts), int(config.num_experts_per_tok)
    return None
