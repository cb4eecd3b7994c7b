"""Names of weights in GGUF files, as the package gguf has them for each architecture of llama.cpp.

Experts and routers are named by their role: transformers keeps all experts of a layer in one module, where GGUF has a weight
for each of their projections. It knows names alone.
"""

from __future__ import annotations

from outliers.errors import BadInput
from outliers.export.source import Study
from outliers.model.readers import Reader

GGUF_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "OlmoForCausalLM": "olmo",
    "SmolLM3ForCausalLM": "smollm3",
    "GraniteForCausalLM": "granite",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gptneox",
    "PhiForCausalLM": "phi2",
    "FalconForCausalLM": "falcon",
    "BloomForCausalLM": "bloom",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "MixtralForCausalLM": "llama",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Glm4MoeForCausalLM": "glm4moe",
    "DeepseekV3ForCausalLM": "deepseek2",
    "GptOssForCausalLM": "gpt-oss",
    "PhimoeForCausalLM": "phimoe",
    "Llama4ForCausalLM": "llama4",
    "GraniteMoeForCausalLM": "granitemoe",
}
"""Class in transformers -> architecture in GGUF (convert_hf_to_gguf.py). llama.cpp has no OPT and no GPT-J, and it splits the
projections of Qwen3-Next."""

ROLES: dict[str, tuple[str, ...]] = {
    "router": ("blk.{bid}.ffn_gate_inp",),
    "experts": ("blk.{bid}.ffn_gate_exps", "blk.{bid}.ffn_up_exps", "blk.{bid}.ffn_down_exps"),
}
"""Kind of a module -> its weights in a block, where the architecture has them. Of experts: gate, up, down."""


def gguf_names(study: Study, readers: tuple[Reader, ...]) -> dict[str, tuple[str, ...]]:
    """Name of a module -> the names of its weights in a GGUF file; the experts of a layer are three there.

    Raises BadInput for a family or a module that GGUF has no name for, and without the package gguf.
    """
    try:
        import gguf
    except ImportError as error:
        raise BadInput("names of GGUF's tensors need the package gguf: pip install 'outlier-features[demo]'") from error
    model = study.prepared.model
    named = GGUF_ARCHITECTURES.get(model.architecture)
    number = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == named), None)
    if number is None:
        raise BadInput(
            f"GGUF has no names for the weights of {model.architecture}: llama.cpp does not read this family"
        )
    table = gguf.get_tensor_name_map(number, model.num_layers)
    roles = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[number]}
    found = {}
    for reader in readers:
        if reader.kind in ROLES:
            read = [role.format(bid=reader.layer) if role in roles else None for role in ROLES[reader.kind]]
        else:
            # the table has the names of text models; that of a multimodal one is a part of it
            read = [table.get_name(reader.name.replace(".language_model.", "."))]
        if None in read:
            raise BadInput(f"GGUF has no name for the weights of {reader.name} of {model.architecture}")
        found[reader.name] = tuple(f"{own}.weight" for own in read)
    return found
