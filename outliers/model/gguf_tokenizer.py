"""The metadata of a GGUF file -> the tokenizer that its model was trained with, as a fast tokenizer of transformers.

`tokenizer.ggml.model` says the kind: `gpt2` is byte-level BPE, whose words `tokenizer.ggml.pre` cuts (`pretokenizers`);
`llama` is the BPE of SentencePiece, whose merges follow from the scores, with bytes for what has no token. Other kinds
are refused by name. transformers' own reader looks at the kind only, and gives ids that the model was not trained with.
Reference: src/llama-vocab.cpp of llama.cpp, build 11434; `make test-tokenizers` compares ids with that program.
It reads no file: `gguf_header` does, and `gguf` saves the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from outliers.errors import UnknownModel
from outliers.model.pretokenizers import PreTokenizer, pre_tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""Values of tokenizer.ggml.token_type, after SentencePiece's model."""

_ALWAYS_CONTROL: Final = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
"""Texts that llama.cpp takes for control tokens whatever their type says (llama-vocab.cpp, special_eog_ids)."""

_SPACE: Final = "▁"
"""What SentencePiece writes for a blank."""


class _Vocabulary:
    """What a GGUF file says of its tokens, checked; UnknownModel where it contradicts itself."""

    def __init__(self, header: Mapping[str, Any], file: str) -> None:
        self.header, self.file = header, file
        tokens = self.strings("tokens")
        self.tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for number, token in enumerate(self.tokens) if self.ids[token] != number)
            raise UnknownModel(f"{file} has the token {twice!r} twice: which id its text gets is not known")
        self.types = self.numbers("token_type", 1)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of `tokenizer.ggml.KEY`, which must be of `kind` where it is there."""
        value = self.header.get(f"tokenizer.ggml.{key}", default)
        if value is not None and not isinstance(value, kind):
            raise UnknownModel(f"{self.file} has tokenizer.ggml.{key} = {str(value)[:40]!r}, which is not of its type")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.get(key, list)
        if not value or not all(isinstance(item, str) for item in value):
            raise UnknownModel(f"{self.file} has no tokenizer.ggml.{key}: its tokenizer can't be made")
        return list(value)

    def numbers(self, key: str, default: float) -> list[float]:
        """One number a token; `default` for each where the file says nothing."""
        value = self.get(key, list)
        if value is None:
            return [default] * len(self.tokens)
        if len(value) < len(self.tokens) or not all(isinstance(item, int | float) for item in value):
            raise UnknownModel(
                f"{self.file} has {len(value):,} values of tokenizer.ggml.{key} for {len(self.tokens):,} tokens"
            )
        return list(value)

    def special(self, role: str, default: int | None = None) -> str | None:
        """The token that plays a role ("bos", "eos", ...), or None."""
        number = self.get(f"{role}_token_id", int, default)
        if number is not None and not 0 <= number < len(self.tokens):
            if f"tokenizer.ggml.{role}_token_id" in self.header:
                raise UnknownModel(f"{self.file} has the {role} token {number}, and {len(self.tokens):,} tokens")
            return None
        return None if number is None else self.tokens[number]


def make_tokenizer(header: Mapping[str, Any], file: str) -> Any:
    """The tokenizer (transformers' PreTrainedTokenizerFast) that the metadata of `file` describe.

    Raises UnknownModel where it is of a kind or has a pre-tokenizer that is not known here, or contradicts itself.
    """
    from transformers import PreTrainedTokenizerFast

    kind = header.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        said = (
            "has no tokenizer in it" if kind in (None, "none", "no_vocab") else f"has a tokenizer of the kind '{kind}'"
        )
        raise UnknownModel(
            f"{file} {said}: of GGUF files, tokenizers of the kinds gpt2 (byte-level BPE) and llama (SentencePiece) are read; "
            "study the model's checkpoint instead"
        )
    vocabulary = _Vocabulary(header, file)
    if kind == "gpt2":
        pre = pre_tokenizer(vocabulary.get("pre", str), file)
        backend, roles, adds_bos = _byte_level(vocabulary, pre), {}, pre.add_bos
    else:
        # the defaults of SentencePiece, as in llama.cpp
        backend, roles, adds_bos = _sentencepiece(vocabulary), {"unknown": 0, "bos": 1, "eos": 2}, True
    found = {role: vocabulary.special(role, roles.get(role)) for role in ("bos", "eos", "unknown", "padding")}
    _add_tokens(backend, vocabulary)
    _add_ends(backend, vocabulary, found, adds_bos)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{names[role]: token for role, token in found.items() if token is not None},
    )


def _byte_level(vocabulary: _Vocabulary, pre: PreTokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # the first of two equal merges counts; `tokenizers` would take the last
    merges = list(dict.fromkeys(_halves(merge) for merge in vocabulary.strings("merges")))
    for left, right in merges:
        missing = next((text for text in (left, right, left + right) if text not in vocabulary.ids), None)
        if missing is not None:
            raise UnknownModel(f"{vocabulary.file} merges {left!r} and {right!r}, and has no token {missing!r}")
    backend = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_of_words])
    backend.decoder = decoders.ByteLevel()
    return backend


def _halves(merge: str) -> tuple[str, str]:
    """The two texts of "LEFT RIGHT"; the first character is never the blank between them."""
    cut = merge.find(" ", 1)
    return (merge[:cut], merge[cut + 1 :]) if cut > 0 else (merge, "")


def _sentencepiece(vocabulary: _Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary.ids]
    if missing:
        raise UnknownModel(
            f"{vocabulary.file} has no token for {len(missing)} of 256 bytes (first {missing[0]}): what its tokenizer does with "
            "an unknown character is not known"
        )
    scores = vocabulary.numbers("scores", 0.0)
    if "tokenizer.ggml.scores" not in vocabulary.header:
        raise UnknownModel(f"{vocabulary.file} has no tokenizer.ggml.scores: the order of its merges is not known")
    backend = Tokenizer(
        models.BPE(
            vocabulary.ids,
            list(_merges(vocabulary.ids, scores)),
            unk_token=vocabulary.special("unknown", 0),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = vocabulary.get("add_space_prefix", bool, True)
    blanks = normalizers.Replace(" ", _SPACE)
    # each stretch between special tokens is normalized by itself, so each gets the blank
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), blanks]) if prefix else blanks
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(ids: Mapping[str, int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """Every way to join two tokens to a third, the best score first; equal scores in the order of ids."""
    for token, _ in sorted(ids.items(), key=lambda item: (-scores[item[1]], item[1])):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        yield from sorted(known, key=lambda pair: (scores[ids[pair[0]]], scores[ids[pair[1]]]), reverse=True)


def _add_tokens(backend: Any, vocabulary: _Vocabulary) -> None:
    """Control and user-defined tokens are found in a text before anything else is done with it."""
    from tokenizers import AddedToken

    name = str(vocabulary.header.get("general.name", "")).lower()
    # Phi-3's tokens swallow the blanks after them, which a GGUF file does not say (llama-vocab.cpp, LLAMA_TOKEN_ATTR_RSTRIP)
    greedy = "phi-3" in name or "phi3" in name
    found: dict[bool, list[Any]] = {True: [], False: []}
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=False):
        special = kind in (_CONTROL, _UNKNOWN) or token in _ALWAYS_CONTROL
        if special or kind == _USER_DEFINED:
            rstrip = greedy and token not in ("<unk>", "<s>", "<|endoftext|>")
            found[special].append(AddedToken(token, special=special, normalized=False, rstrip=rstrip))
    backend.add_special_tokens(found[True])
    backend.add_tokens(found[False])


def _add_ends(backend: Any, vocabulary: _Vocabulary, found: Mapping[str, str | None], adds_bos: bool) -> None:
    """BOS before and EOS after a text, where the file says so."""
    from tokenizers import processors

    wanted = {
        "bos": vocabulary.get("add_bos_token", bool, adds_bos),
        "eos": vocabulary.get("add_eos_token", bool, False),
    }
    roles = [role for role in ("bos", "eos") if wanted[role]]
    for role in roles:
        if found[role] is None:
            raise UnknownModel(
                f"{vocabulary.file} puts a {role.upper()} token at each text, and does not say which it is"
            )
    if not roles:
        return
    tokens = {role: str(found[role]) for role in roles}
    sides = [*([tokens["bos"]] if "bos" in tokens else []), "$A", *([tokens["eos"]] if "eos" in tokens else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=sides, special_tokens=[(token, vocabulary.ids[token]) for token in set(tokens.values())]
    )
