"""Tiny random models with a tokenizer, made by code: real transformers classes, real files, a second each."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.processors import TemplateProcessing

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_experts_per_tok": 2, "num_local_experts": 4}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": 260}
GEMMA = COMMON | {"head_dim": 16}
BLOOM = {
    "hidden_size": 32,
    "n_layer": 3,
    "n_head": 4,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 260,
}
ROUTED = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}

CONFIGS = {
    # name: (config class, its values); every family of the table, and the variants that have their sites elsewhere
    "Llama": ("Llama", COMMON),
    "Mistral": ("Mistral", COMMON),
    "Qwen2": ("Qwen2", COMMON),
    "Qwen3": ("Qwen3", COMMON | {"head_dim": 16}),
    "Phi3": ("Phi3", COMMON),
    "Olmo": ("Olmo", COMMON),
    "SmolLM3": ("SmolLM3", COMMON),
    "Granite": ("Granite", COMMON | {"logits_scaling": 3.0}),
    "Gemma2": ("Gemma2", GEMMA | {"final_logit_softcapping": 0.5}),
    "Gemma3": ("Gemma3Text", GEMMA),
    "Gemma3, multimodal": (
        "Gemma3",
        {
            "text_config": GEMMA,
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    "GPT2": ("GPT2", GPT | IDS),
    "GPTNeoX": ("GPTNeoX", COMMON),
    "GPTNeoX, one after the other": ("GPTNeoX", COMMON | {"use_parallel_residual": False}),
    "GPTJ": ("GPTJ", GPT | IDS | {"rotary_dim": 4}),
    "Phi": ("Phi", COMMON),
    "OPT": ("OPT", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "OPT, post-norm": ("OPT", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "Falcon": ("Falcon", COMMON),
    "Falcon, two norms": ("Falcon", COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, one after the other": ("Falcon", COMMON | {"parallel_attn": False, "alibi": True}),
    "Bloom": ("Bloom", BLOOM | IDS),
    "Olmo2": ("Olmo2", COMMON),
    "Olmo3": ("Olmo3", COMMON),
    "Mixtral": ("Mixtral", COMMON | LOCAL),
    "Olmoe": ("Olmoe", COMMON | {"num_experts_per_tok": 2, "num_experts": 4}),
    "Qwen2Moe": ("Qwen2Moe", COMMON | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 24}),
    "Qwen3Moe": ("Qwen3Moe", COMMON | MOE | {"num_experts": 4, "head_dim": 16, "decoder_sparse_step": 1}),
    "Qwen3Moe, one dense": ("Qwen3Moe", COMMON | MOE | {"num_experts": 4, "mlp_only_layers": [1]}),
    "Qwen3Next": (
        "Qwen3Next",
        COMMON
        | MOE
        | {
            "num_experts": 4,
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "Glm4Moe": ("Glm4Moe", COMMON | MOE | ROUTED | {"head_dim": 8}),
    "DeepseekV3": (
        "DeepseekV3",
        COMMON
        | MOE
        | ROUTED
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 12,
        },
    ),
    "GptOss": (
        "GptOss",
        COMMON | LOCAL | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "Phimoe": ("Phimoe", COMMON | LOCAL),
    "Llama4": (
        "Llama4Text",
        COMMON
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "interleave_moe_layer_step": 2,
        },
    ),
    "GraniteMoe": ("GraniteMoe", COMMON | LOCAL | {"logits_scaling": 3.0}),
}
PLANTED = 7
"""The feature that `make_model` makes large at attn_in in every layer."""


def save_tokenizer(folder, add_bos=False):
    """A byte-level tokenizer: every byte is a token, 256 begins a text (where asked), 257 ends one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    if add_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def make_model(folder, family="Llama", dtype="float32", seed=0, add_bos=False, plant=True, **changes):
    """Save a tiny model of `family` with a tokenizer to `folder`; returns its path as a string."""
    torch.manual_seed(seed)
    kind, values = CONFIGS[family]
    if "text_config" in values:
        changes = {"text_config": values["text_config"] | changes}
    config = getattr(transformers, f"{kind}Config")(**(values | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        if plant:
            for layer in getattr(model.base_model, "layers", ()):
                if hasattr(getattr(layer, "input_layernorm", None), "weight"):
                    layer.input_layernorm.weight[PLANTED] = 40.0
        for name, weight in model.named_parameters():
            # norms of a new model are all ones: other values show that a norm's own output was read
            if "norm" in name or ".ln_" in name:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    save_tokenizer(folder, add_bos)
    return str(folder)


def spec_for(folder, text, sequences=4, length=24, **parts):
    """A StudySpec as JSON has it, for a tiny model and a text file."""
    capture = {"sites": ("attn_in", "mlp_in"), **parts.pop("capture", {})}
    return {
        "model": {"id": str(folder), **parts.pop("model", {})},
        "corpus": {
            "source": str(text),
            "num_sequences": sequences,
            "sequence_length": length,
            **parts.pop("corpus", {}),
        },
        "capture": capture,
        **parts,
    }
