"""Numbers of parameters and bytes of published models, against arithmetic on their configs and against what was published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

from outliers.model.families import expert_counts
from outliers.model.sites import find_backbone
from outliers.model.weights import Weights, weigh

CONFIGS = Path(__file__).parents[1] / "support" / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))


def empty(config, dtype="bfloat16"):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def layers_path(model):
    backbone = find_backbone(model)
    names = [
        name for name, part in model.get_submodule(backbone).named_modules() if type(part).__name__ == "ModuleList"
    ]
    return f"{backbone}.{names[0]}"


def weigh_config(config, dtype="bfloat16", *, plain=False) -> Weights:
    model = empty(config, dtype)
    quantization = None if plain else getattr(config, "quantization_config", None)
    return weigh(model, layers_path(model), dtype, quantization, expert_counts(config.get_text_config()))


def published(name):
    return AutoConfig.from_pretrained(CONFIGS / f"{name}.json")


# The oracle: what a config says, counted by hand. Each returns (every layer's parameters, of these the routed ones),
# and shares nothing with what is tested, not even a model.


def attention(c):
    """Queries, keys, values, output, with their biases and norms."""
    heads, kv = c["num_attention_heads"], c.get("num_key_value_heads", c["num_attention_heads"])
    hidden, d = c["hidden_size"], c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    count = 2 * hidden * heads * d + 2 * hidden * kv * d
    if c["model_type"] in ("gpt_oss", "glm4_moe"):
        count += heads * d + 2 * kv * d  # biases of q, k, v
    return count + {
        "qwen3_moe": 2 * d,  # norms of a head's query and key
        "olmoe": (heads + kv) * d,  # norms of all queries and keys at once
        "gpt_oss": hidden + heads,  # bias of the output, a sink for each head
    }.get(c["model_type"], 0)


def latent_attention(c):
    """DeepSeek-V3: queries and keys with values through low ranks, each rank with a norm."""
    heads, hidden, nope, rope, v = (
        c[name] for name in ("num_attention_heads", "hidden_size", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    q, kv = c["q_lora_rank"], c["kv_lora_rank"]
    down = hidden * q + q + hidden * (kv + rope) + kv
    return down + q * heads * (nope + rope) + kv * heads * (nope + v) + heads * v * hidden


def gated_attention(c):
    """Qwen3-Next, every fourth layer: queries come with a gate of the same width."""
    hidden, d = c["hidden_size"], c["head_dim"]
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    return hidden * 2 * heads * d + 2 * hidden * kv * d + heads * d * hidden + 2 * d


def linear_attention(c):
    """Qwen3-Next, the other layers: queries, keys, values, gates; a convolution over the first three; decay and its bias."""
    hidden, size = c["hidden_size"], c["linear_key_head_dim"]
    keys, values = c["linear_num_key_heads"] * size, c["linear_num_value_heads"] * c["linear_value_head_dim"]
    heads = c["linear_num_value_heads"]
    inner = hidden * (2 * keys + 2 * values) + hidden * 2 * heads + (2 * keys + values) * c["linear_conv_kernel_dim"]
    return inner + 2 * heads + c["linear_value_head_dim"] + values * hidden


def mixture(c):
    """(parameters of an MoE block, of these the routed ones): router, experts, shared experts."""
    hidden = c["hidden_size"]
    experts = c.get("num_experts") or c.get("num_local_experts") or c.get("n_routed_experts")
    width = c.get("moe_intermediate_size", c["intermediate_size"])
    routed, rest = experts * 3 * hidden * width, experts * hidden
    if c["model_type"] == "gpt_oss":
        routed += experts * (2 * width + hidden)  # biases
        rest += experts
    rest += c.get("n_shared_experts", 0) * 3 * hidden * width
    if c["model_type"] == "qwen3_next":
        rest += 3 * hidden * c["shared_expert_intermediate_size"] + hidden  # and its gate
    return routed + rest, routed


def router_in_float32(c):
    """Parameters of a layer that transformers keeps in float32, by its version: the router's of these families from 5.24 on."""
    wide = c["model_type"] in ("deepseek_v3", "glm4_moe") and Version(transformers.__version__) >= Version("5.24")
    return c["n_routed_experts"] * c["hidden_size"] if wide else 0


def oracle_layers(c):
    for number in range(c["num_hidden_layers"]):
        if c["model_type"] == "qwen3_next":
            full = (number + 1) % c["full_attention_interval"] == 0
            mixer = gated_attention(c) if full else linear_attention(c)
        else:
            mixer = latent_attention(c) if c["model_type"] == "deepseek_v3" else attention(c)
        dense = number < c.get("first_k_dense_replace", 0)
        block, routed = (3 * c["hidden_size"] * c["intermediate_size"], 0) if dense else mixture(c)
        yield mixer + block + 2 * c["hidden_size"], routed


def oracle(name):
    c = json.loads((CONFIGS / f"{name}.json").read_text())
    layers = list(oracle_layers(c))
    table = c["vocab_size"] * c["hidden_size"]
    total = sum(count for count, _ in layers) + 2 * table + c["hidden_size"]
    experts = c.get("num_experts") or c.get("num_local_experts") or c.get("n_routed_experts")
    routed = sum(routed for _, routed in layers)
    return c, layers, table, total, total - routed + routed * c["num_experts_per_tok"] // experts


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_arithmetic(name):
    c, layers, table, total, active = oracle(name)
    found = weigh_config(published(name), plain=True)
    assert (found.total_parameters, found.active_parameters) == (total, active)
    wide = router_in_float32(c)
    assert found.layer_bytes == tuple(2 * count + 2 * wide * (routed > 0) for count, routed in layers)
    assert (found.embedding_bytes, found.memory_bytes) == (
        2 * table,
        2 * total + 2 * wide * sum(r > 0 for _, r in layers),
    )
    assert found.rest_bytes == 2 * table + 2 * published(name).hidden_size


# total as published, in billions, within 1%. Active as published, with as many digits, and what of it the publication
# leaves out: nothing, the embedding (a look-up is not arithmetic), or embedding and head. Ours leaves out nothing, which is
# what Qwen3-30B-A3B, Mixtral and OLMoE give; the last column is the difference that this makes.
PUBLISHED = {
    #                      total   active  leaves out           ours with all in
    "qwen3-30b-a3b": (30.5, "3.3", 0),  #                       3.35, +0.05 (cut off)
    "olmoe-1b-7b": (6.9, "1.3", 0),  #                          1.28, -0.02
    "mixtral-8x7b": (46.7, "12.9", 0),  #                       12.88, -0.02
    "gpt-oss-20b": (20.9, "3.6", 1),  #      embedding          4.19, +0.59
    "gpt-oss-120b": (116.8, "5.1", 1),  #    embedding          5.71, +0.61
    "glm-4.5-air": (106, "12", 2),  #        embedding, head    13.42, +1.42
    "qwen3-next-80b-a3b": (80, "3", 2),  #   embedding, head    3.88, +0.88
    "deepseek-v3": (
        671,
        "36.6",
        1,
    ),  #      embedding          37.55, +0.95 ("36.6B, including 0.9B for the output head"; 37B elsewhere)
}
AS_PRINTED = {"qwen3-30b-a3b": 0.06}
"""3.353 is printed as 3.3: cut off, not rounded. All others round to what was published."""


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_published(name):
    total, active, left_out = PUBLISHED[name]
    found = weigh_config(published(name))
    assert found.total_parameters / 1e9 == pytest.approx(total, rel=0.01)
    config = published(name)
    counted = (found.active_parameters - left_out * config.vocab_size * config.hidden_size) / 1e9
    half = 0.5 * 10 ** -len(active.partition(".")[2])
    assert abs(counted - float(active)) <= AS_PRINTED.get(name, half)


# GB of the safetensors files of each publication (gpt-oss: 12.8 and 60.8 GiB, and OpenAI's cards; DeepSeek-V3: 671 GB of the
# main model in FP8 with its scales and its 16-bit tables, and the layer for the next token)
CHECKPOINTS = {"gpt-oss-20b": 13.76, "gpt-oss-120b": 65.25, "deepseek-v3": 688.6, "glm-4.5-air": 220.9}


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_files_have_the_published_size(name):
    assert weigh_config(published(name)).checkpoint_bytes / 1e9 == pytest.approx(CHECKPOINTS[name], rel=0.001)


def test_a_checkpoint_keeps_its_size_whatever_it_becomes_in_memory():
    stored, plain = (weigh_config(published("gpt-oss-20b"), plain=plain) for plain in (False, True))
    assert stored.checkpoint_bytes == plain.checkpoint_bytes == stored.memory_bytes < plain.memory_bytes / 3
    model = empty(transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=100))
    found = weigh(model, "model.layers", "bfloat16", None, None, checkpoint_dtype="float32")
    assert found.checkpoint_bytes == 2 * found.memory_bytes == 4 * found.total_parameters


def test_mxfp4_takes_four_and_a_quarter_bits_for_the_experts_alone():
    _, layers, _, total, _ = oracle("gpt-oss-20b")
    experts = 24 * 32 * 3 * 2880 * 2880
    assert weigh_config(published("gpt-oss-20b")).memory_bytes == experts * 17 // 32 + 2 * (total - experts)
    config = published("gpt-oss-20b")
    config.quantization_config["modules_to_not_convert"].append("model.layers.3.mlp.experts")
    found = weigh_config(config)
    assert found.layer_bytes[3] == 2 * layers[3][0] > 3 * found.layer_bytes[2]


def test_fp8_is_what_transformers_makes_of_the_model():
    """Its own replacement of modules, on the meta device: the very bytes, layer by layer."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    config = published("deepseek-v3")
    config.num_hidden_layers = 5
    found = weigh_config(config)
    model = empty(config)
    quantization = transformers.FineGrainedFP8Config(weight_block_size=(128, 128))
    replace_with_fp8_linear(model, ["lm_head"], quantization, pre_quantized=True)
    for number, layer in enumerate(model.model.layers):
        assert found.layer_bytes[number] == sum(p.numel() * p.element_size() for p in layer.parameters())
    assert found.memory_bytes == sum(p.numel() * p.element_size() for p in model.parameters())


LINEAR = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
PER_LAYER = 4 * 256 * 256 + 3 * 256 * 512  # weights of linear layers
INPUTS = 6 * 256 + 512  # of q, k, v, o, gate, up; down
NORMS = 2 * 256 * 2  # bytes
OUTPUTS = 4 * 256 + 2 * 512 + 256


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, 2 * PER_LAYER),
        # 4 bits; a group of 128 has a 16-bit scale and a 4-bit zero, an input the number of its group
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            PER_LAYER // 2 + PER_LAYER // 128 * 20 // 8 + 4 * INPUTS,
        ),
        ({"quant_method": "awq", "bits": 8, "group_size": 64}, PER_LAYER + PER_LAYER // 64 * 24 // 8 + 4 * INPUTS),
        # one group a row where there are no groups
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, PER_LAYER + OUTPUTS * 24 // 8 + 4 * INPUTS),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, PER_LAYER // 2 + PER_LAYER // 64 * 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, PER_LAYER + 4 * OUTPUTS),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, PER_LAYER + PER_LAYER // 128**2 * 4),
        ({"quant_method": "fp8"}, PER_LAYER + 7 * 4),
        # unknown: as if it were plain, which is more
        ({"quant_method": "somethingnew", "bits": 2}, 2 * PER_LAYER),
        # left plain by name: the beginning of a path, and the end of one
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0"]}, 2 * PER_LAYER),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["down_proj"]},
            PER_LAYER + 256 * 512 + 4 * (OUTPUTS - 256),
        ),
    ],
)
def test_bytes_of_other_methods(quantization, expected):
    model = empty(transformers.LlamaConfig(**LINEAR))
    assert weigh(model, "model.layers", "bfloat16", quantization, None).layer_bytes == (expected + NORMS,)


def test_experts_stay_plain_where_a_method_knows_linear_layers_alone():
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 10,
    }
    model = empty(transformers.MixtralConfig(**sizes, num_key_value_heads=4, num_local_experts=4))
    found = weigh(model, "model.layers", "bfloat16", {"quant_method": "gptq", "bits": 4}, (4, 2))
    assert found.layer_bytes[0] > 2 * 4 * 3 * 64 * 64 > 0


def test_a_head_that_is_the_embedding_is_counted_once_and_lies_with_it():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 100}
    apart, tied = (weigh_config(transformers.LlamaConfig(**sizes, tie_word_embeddings=tie)) for tie in (False, True))
    assert apart.memory_bytes - tied.memory_bytes == 2 * 100 * 32
    assert apart.embedding_bytes == tied.embedding_bytes == 2 * 100 * 32
    assert tied.rest_bytes == 2 * 32
    assert "lm_head" in tied.embedding_modules
    assert "lm_head" in apart.rest_modules


def test_parts_of_models_that_are_built_otherwise():
    gpt2 = weigh_config(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=16))
    assert gpt2.embedding_bytes == 2 * 32 * (100 + 16), "positions are embedded too"
    assert gpt2.embedding_modules[:2] == ("transformer.wte", "transformer.wpe")
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**text, "vocab_size": 100, "num_key_value_heads": 1}, vision_config={**vision, "image_size": 28}
    )
    model = empty(config)
    gemma = weigh(model, "model.language_model.layers", "bfloat16", None, None)
    assert len(gemma.layer_bytes) == 2, "of the language model, not of the vision tower"
    assert {"model.vision_tower", "model.multi_modal_projector"} <= set(gemma.rest_modules)
    assert gemma.memory_bytes == 2 * sum(p.numel() for p in model.parameters())
