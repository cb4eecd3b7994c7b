"""Importance matrices of llama.cpp: sums of squares of each projection's input, as GGUF and in the older form.

    <weight>.in_sum2   float32 (W), sums of x^2 over all tokens; ne [W, 1]
    <weight>.counts    float32 (1), how many tokens
    <weight>.in_sum    float32 (W), sums of x; only where asked for

Source of both layouts: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp, build 11434. GGUF version 3:
ggml/docs/gguf.md. Names of tensors are those of the package gguf.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.errors import BadInput
from outliers.export.source import SITES, Columns, Study
from outliers.model.readers import Reader
from outliers.units import format_ranges

ALIGNMENT = 32
"""Tensors of a GGUF file begin at a multiple of this many bytes, where the file names no other."""
_VERSION, _UINT32, _STRING, _ARRAY, _F32 = 3, 4, 8, 9, 0
"""GGUF's version and its numbers for types of values and of tensors."""
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


def gguf_names(study: Study, readers: tuple[Reader, ...]) -> dict[str, tuple[str, ...]]:
    """Name of a module -> the names of its weights in a GGUF file; experts that are one module are two or three there.

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
    found = {}
    for reader in readers:
        # the table has the names of text models; that of a multimodal one is a part of it
        name = reader.name.replace(".language_model.", ".")
        parts = ("gate_proj", "up_proj", "down_proj") if reader.kind == "experts" else ()
        read = [table.get_name(f"{name}.{part}") for part in parts] or [table.get_name(name)]
        if None in read:
            raise BadInput(f"GGUF has no name for the weights of {reader.name} of {model.architecture}")
        found[reader.name] = tuple(f"{own}.weight" for own in read)
    return found


def weights_and_columns(study: Study) -> dict[str, Columns]:
    """Name of each weight in a GGUF file -> the statistics of its input, sorted by name.

    Raises BadInput for a model with experts and for what the study did not capture.
    """
    model = study.prepared.model
    if model.anatomy.moe_layers:
        raise BadInput(
            f"an importance matrix of {study.name} needs sums for each expert, over the tokens that are routed to it, and a "
            f"study has them over all tokens: the layers with experts are {format_ranges(model.anatomy.moe_layers)}. Make it "
            "with llama-imatrix"
        )
    study.check_sites(SITES, "an importance matrix")
    names = gguf_names(study, study.readers)
    return dict(
        sorted(
            (weight, study.columns(reader.site, reader.layer))
            for reader in study.readers
            if reader.site is not None
            for weight in names[reader.name]
        )
    )


def imatrix_gguf(study: Study, sums: bool) -> bytes:
    """The GGUF file. `sums`: with sums of x."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, columns in weights_and_columns(study).items():
        if sums:
            tensors[f"{name}.in_sum"] = columns.total.astype(np.float32)[None]
        tensors[f"{name}.in_sum2"] = columns.squares.astype(np.float32)[None]
        tensors[f"{name}.counts"] = np.array([[columns.count]], np.float32)
    corpus = study.prepared.corpus
    return gguf_bytes(
        {
            "general.type": "imatrix",
            "imatrix.datasets": [corpus.source],
            "imatrix.chunk_count": corpus.num_sequences,
            "imatrix.chunk_size": corpus.sequence_length,
        },
        tensors,
    )


def imatrix_dat(study: Study) -> bytes:
    """The older form: for each weight its name, the number of chunks, and mean squares times that number; little endian."""
    corpus, found = study.prepared.corpus, weights_and_columns(study)
    out = bytearray(struct.pack("<i", len(found)))
    for name, columns in found.items():
        # as llama-imatrix: a chunk that is not full counts as one
        calls = -(-columns.count // corpus.sequence_length)
        mean = (columns.squares.astype(np.float32) / np.float32(columns.count)) * np.float32(calls)
        out += _sized(name, "<i") + struct.pack("<ii", calls, mean.size) + mean.astype("<f4").tobytes()
    return bytes(out + struct.pack("<i", corpus.num_sequences) + _sized(corpus.source, "<i"))


def gguf_bytes(values: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """A GGUF file of version 3. values: text, a whole number (uint32) or a list of texts. tensors: float32, of two axes.

    The package's own writer puts the key general.architecture into every file; an importance matrix has none.
    """
    head = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(values)))
    for key, value in values.items():
        head += _sized(key, "<Q")
        if isinstance(value, str):
            head += struct.pack("<I", _STRING) + _sized(value, "<Q")
        elif isinstance(value, int):
            head += struct.pack("<II", _UINT32, value)
        else:
            head += struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_sized(item, "<Q") for item in value)
    data = bytearray()
    for name, tensor in tensors.items():
        # axes in GGUF's order: the one whose neighbours lie side by side is first
        head += _sized(name, "<Q") + struct.pack("<I", tensor.ndim)
        head += struct.pack(f"<{tensor.ndim}QIQ", *reversed(tensor.shape), _F32, len(data))
        data += tensor.astype("<f4").tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    return bytes(head + bytes(-len(head) % ALIGNMENT) + data)


def _sized(text: str, kind: str) -> bytes:
    """A text behind its length in bytes."""
    data = text.encode()
    return struct.pack(kind, len(data)) + data
