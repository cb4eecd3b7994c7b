"""Where the sites are in each model family: a table by role, never a guess by a module's name.

Knows module paths, nothing of weights or tokens. A family that is not in the table is refused with the table's
contents. Before it: the model's config. After it: `capture`, which hooks what is named here.
Source: the module trees of transformers 5, each checked in the tests against an independent hook on the
attention's and the MLP's own input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from outliers.errors import UnknownArchitecture


@dataclass(frozen=True)
class Family:
    """Paths of the modules that play each role; all but `layers` are relative to one decoder layer.

    `layers` is relative to the base model, the one without the language-model head.
    """

    layers: str
    attention_norm: str
    mlp_norm: str
    attention: str
    mlp: str
    attention_output: str


@dataclass(frozen=True)
class SiteModule:
    """One tensor to read: the `output` or the `input` of the module at `path`, relative to the base model."""

    site: str
    layer: int
    path: str
    side: Literal["output", "input"]


LLAMA = Family(
    layers="layers",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    attention="self_attn",
    mlp="mlp",
    attention_output="self_attn.o_proj",
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "MixtralForCausalLM": LLAMA,
    "OlmoeForCausalLM": LLAMA,
    "Qwen3MoeForCausalLM": LLAMA,
}


def family(architecture: str) -> Family:
    """The family of a transformers class name; UnknownArchitecture where the table has none."""
    found = FAMILIES.get(architecture)
    if found is None:
        raise UnknownArchitecture(
            f"the sites of {architecture} are not known: this version reads {', '.join(sorted(FAMILIES))}"
        )
    return found


def site_modules(family: Family, sites: tuple[str, ...], layers: tuple[int, ...]) -> Iterator[SiteModule]:
    """Every (site, layer) exactly once, in the order of a forward pass's layers."""
    role: dict[str, tuple[str, Literal["output", "input"]]] = {
        "attn_in": (family.attention_norm, "output"),
        "mlp_in": (family.mlp_norm, "output"),
        "o_in": (family.attention_output, "input"),
        "resid": ("", "output"),
    }
    for layer in layers:
        for site in sites:
            name, side = role[site]
            path = f"{family.layers}.{layer}" + (f".{name}" if name else "")
            yield SiteModule(site=site, layer=layer, path=path, side=side)


def site_width(config: Any, site: str) -> int:
    """Features of a site: the hidden size, but heads x head_dim where the attention's output is projected."""
    if site != "o_in":
        return int(config.hidden_size)
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def expert_counts(config: Any) -> tuple[int, int] | None:
    """(experts, experts a token is routed to) of a mixture-of-experts config, None for a dense one."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        experts = getattr(config, name, None)
        if experts:
            return int(experts), int(config.num_experts_per_tok)
    return None
