"""Checks the values of a config.json before a library builds anything from them: a text for a number, 0 or 10^9 layers.

transformers takes most values as they come; it starts to build a list of a billion layers without a warning. Refused is
only what no model can have. Names that a family defines itself are left to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outliers.errors import UnknownModel

MOST = {
    # layers: five times the deepest published decoder; building more takes minutes
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 1_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_kv_heads"), 100_000),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "head_dim"), 10_000_000),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size"), 100_000_000),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), 1_000_000_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), 100_000),
}
"""Whole number in a config -> the most it can be, far beyond any model; None is accepted."""

_MAY_BE_ZERO = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "n_inner")
_BY_LAYER = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "num_experts")
"""May be a list with a number for each layer, as Gemma 3n has its MLP widths."""
_DTYPES = ("dtype", "torch_dtype")
_IMPLEMENTATIONS = tuple(f"{start}{what}_implementation" for what in ("attn", "experts") for start in ("", "_"))
SECTIONS = ("text_config", "llm_config", "language_config")


def check_config(content: Mapping[str, Any], name: str) -> None:
    """Refuse the parsed config.json of the model `name` for values that no model has. Raises UnknownModel."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise UnknownModel(
            f"the config.json of {name} has no model_type ({kind!r}): it is not a config that transformers reads; fetch the "
            "model's own"
        )
    _check_section(content, name)
    for section in SECTIONS:
        inner = content.get(section)
        if isinstance(inner, Mapping):
            _check_section(inner, f"{name}, {section}")
        elif inner is not None:
            raise UnknownModel(f"the config.json of {name} has {section} = {_shown(inner)}, not an object")


def _check_section(section: Mapping[str, Any], name: str) -> None:
    for key, most in MOST.items():
        value = section.get(key)
        if value is None:
            continue
        least = 0 if key in _MAY_BE_ZERO else 1
        values = value if isinstance(value, list) and value and key in _BY_LAYER else [value]
        if not all(type(number) is int and least <= number <= most for number in values):
            raise UnknownModel(
                f"the config.json of {name} has {key} = {_shown(value)}, which is not a whole number from {least} to {most:,}: "
                "fetch the model's own config.json"
            )
    for key in _DTYPES:
        value = section.get(key)
        if value is not None and (not isinstance(value, str) or value.startswith("torch.")):
            plain = value.removeprefix("torch.") if isinstance(value, str) else "bfloat16"
            raise UnknownModel(
                f"the config.json of {name} has {key} = {_shown(value)}, which transformers can't read: a name such as "
                f'"{plain[:20]}" stands there'
            )
    for key in _IMPLEMENTATIONS:
        _check_implementation(key, section.get(key), name)
    _check_quantization(section.get("quantization_config"), name)
    _check_heads(section, name)


def _check_implementation(key: str, value: object, name: str) -> None:
    """Refuse a name with a slash: it is code of the hub, which transformers would run where the package kernels is installed."""
    values = value.values() if isinstance(value, Mapping) else (value,)
    for one in values:
        if one is not None and (not isinstance(one, str) or not one.replace("_", "").isalnum()):
            raise UnknownModel(
                f"the config.json of {name} has {key} = {_shown(value)}, which is not an implementation of transformers' own: "
                "code from elsewhere is never run; remove that line"
            )


def _check_quantization(quantization: object, name: str) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, Mapping):
        raise UnknownModel(f"the config.json of {name} has quantization_config = {_shown(quantization)}, not an object")
    block = quantization.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise UnknownModel(
            f"the quantization_config of {name} has weight_block_size = {_shown(block)}: two whole numbers, rows and columns"
        )
    for key in ("bits", "group_size"):
        value = quantization.get(key)
        if value is not None and (type(value) is not int or value == 0):
            raise UnknownModel(
                f"the quantization_config of {name} has {key} = {_shown(value)}, which is not a whole number"
            )


def _check_heads(section: Mapping[str, Any], name: str) -> None:
    heads, groups = section.get("num_attention_heads"), section.get("num_key_value_heads")
    hidden = section.get("hidden_size")
    if isinstance(heads, list) or isinstance(groups, list):
        return
    if heads and groups and heads % groups:
        raise UnknownModel(
            f"the config.json of {name} has {heads} num_attention_heads, which {groups} num_key_value_heads can't share evenly: "
            "fetch the model's own config.json"
        )
    sized = any(
        section.get(key) is not None for key in ("head_dim", "v_head_dim", "kv_channels", "attention_head_size")
    )
    if heads and hidden and hidden % heads and not sized:
        raise UnknownModel(
            f"the config.json of {name} has hidden_size {hidden}, which is not a multiple of its {heads} num_attention_heads, "
            "and no head_dim: fetch the model's own config.json"
        )


def _shown(value: object) -> str:
    return repr(value)[:60]
