"""How each family cuts a text into words before its byte-level merges, by the name in `tokenizer.ggml.pre` of a GGUF file.

The table is that of llama.cpp (src/llama-vocab.cpp, build 11434): names, patterns, `ignore_merges`, `add_bos`. Two things
differ, because the tokens that count are those that the model was trained with:

- Where that source quotes a family's own pattern and adapts it to an engine without Unicode classes (`\\p{Lu}`, `(?i:`,
  possessive quantifiers), the family's own is taken. Ids differ from llama.cpp's for tekken, gpt-4o and tiny_aya on
  combining marks and on letters beyond ASCII that change case; for others on nothing that occurs in texts.
- Where transformers' own class of the family normalizes to NFC, this table does too; llama.cpp does not. Ids differ for text
  that is not in NFC.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from outliers.errors import UnknownModel


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut before its merges."""

    patterns: tuple[str, ...]
    """Regular expressions in Oniguruma's syntax. Each cuts what the one before it left; matches and the text between stay."""
    ignore_merges: bool = False
    """Whether a word that is a token is taken whole, even if no merges lead to it."""
    add_bos: bool = False
    """Whether BOS begins each text where the file does not say."""
    nfc: bool = False
    """Whether the text is normalized to NFC first."""


_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CASE}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_BLANKS}"
_QWEN2 = rf"{_CASE}|{_WORD}|\p{{N}}|{_SIGNS}|{_BLANKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CAMEL[0]}|{_CAMEL[1]}|\p{{N}}|{_PATHS}|{_BLANKS}"
_O200K = rf"{_CAMEL[0]}{_CASE}?|{_CAMEL[1]}{_CASE}?|\p{{N}}{{1,3}}|{_PATHS}|{_BLANKS}"
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
"""Cased letters as DeepSeek lists them: Latin, Greek, Cyrillic, Armenian, Georgian, Cherokee and others."""
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"
)
_SPARK = _DEEPSEEK3.replace(r"[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+", r"[\p{P}\p{S}]+|[\r\n]")
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+|"
    f"[\u3105-\u312f]+|{_KANA}"
)
_HALVES = "|".join(rf"\s{{{2**power}}}(?!\S)" for power in range(9, 1, -1))
_JAIS2 = rf"{_CASE}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|{_HALVES}|\s{{1,2}}(?!\S)|\s{{1}}"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = rf"{_CASE}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}"
_QWEN35 = rf"{_CASE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_EXAONE_MOE = (
    rf"{_CASE}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_MINICPM5 = rf"{_CASE}|{_WORD}|\p{{N}}+|{_SIGNS}|{_BLANKS}"

_BYTES = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((_DIGIT, _GPT2))
_DEEPSEEK = PreTokenizer((r"\p{N}{1,3}", _KANA, _DEEPSEEK3))
_LLAMA = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN = PreTokenizer((_QWEN2,))

_FAMILIES: Final = (
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", _LLAMA),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("glm4 glm5", PreTokenizer((_LLAMA3,), ignore_merges=True)),
    ("jais-2", PreTokenizer((_JAIS2,))),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _MINICPM5), ignore_merges=True)),
    ("smollm starcoder refact codeshell exaone minerva-7b mellum2", _DIGITS),
    ("command-r", replace(_DIGITS, nfc=True)),
    ("gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 jais trillion granite-docling", _BYTES),
    ("olmo mpt", replace(_BYTES, nfc=True)),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    ("qwen2", replace(_QWEN, nfc=True)),
    ("stablelm2 deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open grok-2", _QWEN),
    ("qwen35", PreTokenizer((_QWEN35,), nfc=True)),
    ("ufakzeka", PreTokenizer((_QWEN2.removeprefix(f"{_CASE}|"),))),
    ("laguna", PreTokenizer((r"[^\n]+|[\n]+", _QWEN2))),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_BAILING,))),
    ("seed-coder", PreTokenizer((_SEED,))),
    ("exaone-moe", PreTokenizer((_EXAONE_MOE,))),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_LETTERS}]+",
                "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                r"\s+$",
                _HAN,
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, _DIGIT))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK),
    ("spark2_5", PreTokenizer((r"\p{N}{1,3}", _KANA, _SPARK, _DIGIT))),
    ("youtu", PreTokenizer((_YOUTU, _O200K.replace(r"\p{N}{1,3}", _DIGIT)), ignore_merges=True)),
    ("bloom poro-chat gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, _DIGIT))),
    ("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_O200K,))),
    ("tiny_aya cohere2moe", PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _O200K))),
)

PRE_TOKENIZERS: Final = {name: made for names, made in _FAMILIES for name in names.split()}
"""What `tokenizer.ggml.pre` may say -> how a text is cut."""


def pre_tokenizer(name: str | None, file: str) -> PreTokenizer:
    """What `file` names as `tokenizer.ggml.pre`; UnknownModel where that is missing or not in the table."""
    found = PRE_TOKENIZERS.get(name or "")
    if found is not None:
        return found
    known = ", ".join(sorted(PRE_TOKENIZERS))
    if name is None or name == "default":
        said = "names no pre-tokenizer (tokenizer.ggml.pre)" if name is None else "has the pre-tokenizer 'default'"
        raise UnknownModel(
            f"{file} {said}: how its model cuts a text into words is not known, and other token ids than its own would be "
            f"studied. Convert the model again with a current llama.cpp, or study its checkpoint; known: {known}"
        )
    raise UnknownModel(
        f"{file} has the pre-tokenizer '{name}', which is not known here: other token ids than its own would be studied. "
        f"Study the model's checkpoint instead; known: {known}"
    )
