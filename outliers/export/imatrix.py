"""Importance matrices of llama.cpp: sums of squares of each projection's input, as GGUF and in the older form.

    <weight>.in_sum2   float32 (E, W), sums of x^2 over the tokens of each of E experts, else over all tokens, E = 1; ne [W, E]
    <weight>.counts    float32 (E, 1), how many tokens; ne [1, E]
    <weight>.in_sum    float32 (E, W), sums of x; only where asked for, and where a study has them

Source of both layouts: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp, build 11434. GGUF version 3:
ggml/docs/gguf.md. Names of tensors are those of the package gguf.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outliers.export.expert_rows import Rows, expert_notes, expert_rows
from outliers.export.gguf_names import gguf_names
from outliers.export.source import SITES, Study

ALIGNMENT = 32
"""Tensors of a GGUF file begin at a multiple of this many bytes, where the file names no other."""
_VERSION, _UINT32, _STRING, _ARRAY, _F32 = 3, 4, 8, 9, 0
"""GGUF's version and its numbers for types of values and of tensors."""


def weights_and_rows(study: Study) -> dict[str, Rows]:
    """Name of each weight in a GGUF file -> the statistics of its input, sorted by name.

    Raises BadInput for what the study did not capture.
    """
    moe = study.prepared.model.anatomy.moe_layers
    found = expert_rows(study)
    # a study has down_in in every layer or in none, and a layer of experts has no dense MLP
    study.check_sites(SITES[:3] if moe else SITES, "an importance matrix")
    names = gguf_names(study, study.readers)
    for reader in study.readers:
        if reader.site is not None and reader.kind != "experts" and study.has(reader.site, reader.layer):
            found |= {weight: Rows.of(study.columns(reader.site, reader.layer)) for weight in names[reader.name]}
    return dict(sorted(found.items()))


def imatrix_gguf(study: Study, sums: bool) -> tuple[bytes, list[str]]:
    """The GGUF file, and what to know of it. `sums`: with sums of x."""
    tensors: dict[str, NDArray[np.float32]] = {}
    found = weights_and_rows(study)
    for name, rows in found.items():
        if sums and rows.total is not None:
            tensors[f"{name}.in_sum"] = rows.total.astype(np.float32)
        tensors[f"{name}.in_sum2"] = rows.squares.astype(np.float32)
        tensors[f"{name}.counts"] = rows.counts.astype(np.float32)[:, None]
    corpus = study.prepared.corpus
    values = {
        "general.type": "imatrix",
        "imatrix.datasets": [corpus.source],
        "imatrix.chunk_count": corpus.num_sequences,
        "imatrix.chunk_size": corpus.sequence_length,
    }
    return gguf_bytes(values, tensors), expert_notes(study, found, sums=sums)


def imatrix_dat(study: Study) -> tuple[bytes, list[str]]:
    """The older form: for each weight its name, the number of chunks, and mean squares times that number; little endian.

    It has no counts: an expert without a token has mean squares of 1, as save_imatrix_legacy writes it.
    """
    corpus, found = study.prepared.corpus, weights_and_rows(study)
    out = bytearray(struct.pack("<i", len(found)))
    for name, rows in found.items():
        # as llama-imatrix: a chunk that is not full counts as one
        calls = -(-int(rows.counts.max()) // corpus.sequence_length)
        counts = rows.counts.astype(np.float32)[:, None]
        squares = np.where(counts > 0, rows.squares.astype(np.float32), np.float32(1))
        mean = (squares / np.maximum(counts, np.float32(1))) * np.float32(calls)
        out += _sized(name, "<i") + struct.pack("<ii", calls, mean.size) + mean.astype("<f4").tobytes()
    content = bytes(out + struct.pack("<i", corpus.num_sequences) + _sized(corpus.source, "<i"))
    return content, expert_notes(study, found, sums=False)


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
