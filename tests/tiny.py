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
FAMILIES = {
    "Llama": COMMON,
    "Mistral": COMMON,
    "Qwen2": COMMON,
    "Qwen3": COMMON | {"head_dim": 16},
    "Mixtral": COMMON | {"num_experts_per_tok": 2, "num_local_experts": 4},
    "Olmoe": COMMON | {"num_experts_per_tok": 2, "num_experts": 4},
    "Qwen3Moe": COMMON | MOE | {"num_experts": 4, "head_dim": 16, "decoder_sparse_step": 1},
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
    config = getattr(transformers, f"{family}Config")(**(FAMILIES[family] | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if plant:
        with torch.no_grad():
            for layer in model.base_model.layers:
                layer.input_layernorm.weight[PLANTED] = 40.0
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
