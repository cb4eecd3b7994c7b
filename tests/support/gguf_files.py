"""GGUF files without weights, written by the package gguf, and a vocabulary in which every cut of a text shows.

The vocabulary is trained here, in a few lines, on a text that is not cut at all: its tokens run across blanks, digits
and lines, so that whatever a pre-tokenizer keeps apart gives other ids than what it leaves together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PLAIN = (
    "Hello world, it's 2024-11-05: don't, I'll, WE'VE, they'RE 'll 3.14159 1234567 12 345 (x+1)*y == 'a1b2'\n\n"
    "def f(x):\n    return x[0]  # note\n\tif x<=10:\r\n\t\tpass   \n \n  \n\n\nend   of    line     !?... ---> https://a.b/c_d?e=1&f=2\n"
    "汉字漢字123と日本語のテキスト、한국어 텍스트。 привет мир 456, γειά σου, été là-bas; "
    "😀😀🚀 ok🙂7 $9.99 100% №5 ½ ٣٤٥ ²³ ①②\n"
    "aaaa bbbb1111 camelCase snake_case HTTPServer XMLHttp2 's 't 're tab\there nbsp\u00a0x\u3000y end"
)
"""In NFC, without combining marks, and without letters beyond ASCII that change case inside a word."""

MARKS = (
    "e\u0301te\u0301 na\u00efve हिन्दी में ภาษาไทย ❤️x ÉTÉéÉ a\u0308b \u200bzero\u200dwidth \x00\x01\x7f ctrl \u0085next"
)
"""Combining marks, changes of case beyond ASCII, invisible and control characters."""


@cache
def alphabet() -> tuple[str, ...]:
    """Byte -> character, as GPT-2's encoder.py has it."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return tuple(chr(byte) if byte in kept else chr(256 + others.index(byte)) for byte in range(256))


@cache
def trained(merges: int = 500) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens and merges ("LEFT RIGHT") of byte-level BPE on PLAIN and MARKS, without any cut."""
    parts = [[alphabet()[byte] for byte in text.encode()] for text in (PLAIN, MARKS, PLAIN[40:], PLAIN[:-40])]
    tokens, found = list(alphabet()), []
    while len(found) < merges:
        pairs = Counter(pair for part in parts for pair in pairwise(part))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        found.append(f"{left} {right}")
        if left + right not in tokens:
            tokens.append(left + right)
        parts = [_joined(part, left, right) for part in parts]
    return tuple(tokens), tuple(found)


def _joined(part: Sequence[str], left: str, right: str) -> list[str]:
    made: list[str] = []
    at = 0
    while at < len(part):
        both = at + 1 < len(part) and (part[at], part[at + 1]) == (left, right)
        made.append(left + right if both else part[at])
        at += 2 if both else 1
    return made


SPECIAL = {"<|start|>": 3, "<|stop|>": 3, "[user]": 4, "<|im_end|>": 1}
"""Added tokens and their types: control, user-defined, and one that llama.cpp takes for control by its text."""


def write_byte_level(path: Path, pre: str | None, **keys: Any) -> Path:
    """A llama model without weights, with byte-level BPE; `keys` of tokenizer.ggml override."""
    tokens, merges = trained()
    found: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, *SPECIAL],
        "token_type": [*[1] * len(tokens), *SPECIAL.values()],
        "merges": list(merges),
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
    }
    return write(path, found | keys)


PIECES = (
    "▁",
    "▁the",
    "the",
    "th",
    "he",
    "▁t",
    "er",
    "▁▁",
    "▁▁▁▁",
    "▁other",
    "other",
    "ot",
    "oth",
    "12",
    "é",
    "▁é",
    "▁1",
)
"""Pieces of `write_sentencepiece` beyond single characters, the best score first."""


def sentencepiece() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a small vocabulary with bytes."""
    characters = sorted({*"abcdefghijklmnopqrstuvwxyz .,1234567890"} - {" "})
    merged = [piece for piece in PIECES if len(piece) > 1]
    singles = [piece for piece in PIECES if len(piece) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *singles, *characters]
    scores = [0.0] * 259 + [-float(number) for number in range(len(tokens) - 259)]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    return [*tokens, "[user]"], [*scores, 0.0], [*types, 4]


def write_sentencepiece(path: Path, **keys: Any) -> Path:
    tokens, scores, types = sentencepiece()
    return write(path, {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types} | keys)


def write(path: Path, tokenizer: Mapping[str, Any], name: str = "made") -> Path:
    """A GGUF file of a llama model of two layers with one tensor each.

    `tokenizer`: keys of tokenizer.ggml; None leaves one out.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    for key, number in (
        ("block_count", 2),
        ("context_length", 512),
        ("embedding_length", 32),
        ("feed_forward_length", 64),
    ):
        writer.add_uint32(f"llama.{key}", number)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_uint32("llama.attention.head_count_kv", 2)
    writer.add_uint32("llama.vocab_size", len(tokenizer.get("tokens") or ()))
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in tokenizer.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
