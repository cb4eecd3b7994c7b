"""What a tokenizer does with a text: what it puts before it, its first ids, and the names of its tokens.

A long text is encoded as far as its tokens are needed, with the same ids as if it were encoded whole.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from outliers.corpus.ids import TokenNames
from outliers.corpus.text_files import LongText
from outliers.errors import CorpusError, OutliersError, UnknownModel
from outliers.model.pretrained import load_tokenizer
from outliers.model.source import ModelSource
from outliers.workspace import Workspace

WHOLE_CHARACTERS = 1 << 16
"""Characters. A shorter text is encoded whole; a longer one is first encoded up to here."""
CHARACTERS_PER_TOKEN = 8
"""Characters a token; more than any language needs. If they give too few tokens, more is read."""
LEAST_AHEAD = 4_096
"""Characters behind a cut that only a second encoding sees: it must give the same tokens before the cut."""
_RUNS_AHEAD = 3
"""Changes between letters, digits, blanks and marks that lie behind a cut: no pattern of a pre-tokenizer looks beyond them."""
_MARGIN = 256
_PROBES = ("a", "the end", "1. Go!")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Encoded:
    """Tokens of one text. pieces: its characters, divided among the tokens without gap or overlap. ids: int."""

    ids: list[int]
    pieces: list[str]


@contextmanager
def _library(name: str) -> Iterator[None]:
    """Turn what a tokenizer's library raises for a damaged file into UnknownModel; a panic of Rust code is not an Exception."""
    from outliers.hub.http import httpx

    try:
        yield
    except (OutliersError, httpx.HTTPError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        from outliers.hub.client import plain

        kind = type(error).__name__
        raise UnknownModel(
            f"the tokenizer of {name} can't be used: {kind}: {plain(error)}; fetch its tokenizer.json and "
            "tokenizer_config.json again"
        ) from error


class Encoder:
    """The tokenizer of a model. Raises UnknownModel if it can't be read, or doesn't give the places of its tokens in a text."""

    def __init__(
        self,
        source: ModelSource,
        workspace: Workspace,
        *,
        first_characters: int = WHOLE_CHARACTERS,
        ahead_characters: int = LEAST_AHEAD,
    ) -> None:
        self._first_characters, self._least_ahead = first_characters, ahead_characters
        with _library(source.name):
            tokenizer = load_tokenizer(source, workspace)
            if not getattr(tokenizer, "is_fast", False):
                raise UnknownModel(
                    f"the tokenizer of {source.name} ({type(tokenizer).__name__}) has no fast version, and only such a one "
                    "says where its tokens are in the text: put a tokenizer.json that does the same into the model's folder, or "
                    "study another model"
                )
            self.name = source.name
            self.tokenizer = tokenizer
            self._backend = tokenizer.backend_tokenizer
            added = tokenizer.added_tokens_decoder
            self.size = len(tokenizer)
            self.eos: int | None = None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
            self.eos_text = str(tokenizer.eos_token)
            self._special = {int(i) for i in tokenizer.all_special_ids} | {i for i, t in added.items() if t.special}
            self._added = {int(number): str(token.content) for number, token in added.items()}
            states = [_state(getattr(self._backend, part)) for part in ("normalizer", "pre_tokenizer", "decoder")]
            self._splits = bool(states[1])
            self._byte_level = any("ByteLevel" in state for state in states)
            model = self._backend.model
            self._kind = type(model).__name__
            if getattr(model, "dropout", None):
                raise UnknownModel(
                    f"the tokenizer of {source.name} leaves out merges at random (dropout {model.dropout}), and the same text "
                    'gives other tokens each time: set "dropout" to null in its tokenizer.json'
                )
            self._byte_fallback = bool(getattr(model, "byte_fallback", False)) or "ByteFallback" in states[2]
            affixes = ("continuing_subword_prefix", "end_of_word_suffix")
            self._joins_anywhere = self._kind in ("BPE", "Unigram") and not any(
                getattr(model, a, None) for a in affixes
            )
            self._vocabulary: str | None = None
            if not any(self._ids(probe) for probe in _PROBES):
                raise UnknownModel(
                    f"the tokenizer of {source.name} gives no tokens: is its tokenizer.json in the model's folder?"
                )

    def prefix(self, policy: str) -> tuple[int, ...]:
        """The ids that begin each sequence: what the tokenizer itself puts before a text; `always` at least its BOS."""
        if policy == "never":
            return ()
        with _library(self.name):
            found = self._before()
        if found or policy == "auto":
            return found
        if self.tokenizer.bos_token_id is None:
            raise CorpusError("bos 'always' was asked, and this model's tokenizer has no BOS token")
        return (int(self.tokenizer.bos_token_id),)

    def _before(self) -> tuple[int, ...]:
        """The ids that come before every probe; if a text could begin at several places, the first that all allow."""
        allowed: list[list[tuple[int, ...]]] = []
        for probe in _PROBES:
            body, whole = self._ids(probe), [int(n) for n in self.tokenizer(probe).input_ids]
            if body:
                starts = range(len(whole) - len(body) + 1)
                allowed.append([tuple(whole[:at]) for at in starts if whole[at : at + len(body)] == body])
        for found in allowed[0]:
            if all(found in others for others in allowed[1:]):
                return found
        raise CorpusError(
            f"the tokenizer of {self.name} changes a text where it adds special tokens: what begins a sequence is not known; "
            "say --bos always or --bos never"
        )

    def _ids(self, text: str) -> list[int]:
        return [int(number) for number in self.tokenizer(text, add_special_tokens=False).input_ids]

    def encode(self, text: str | LongText, needed: int) -> Encoded:
        """At least the first `needed` tokens of a text, or all of it; no special token is added.

        A text is encoded whole where no place can be shown behind which nothing changes the tokens before it.
        """
        characters = max(self._first_characters, needed * CHARACTERS_PER_TOKEN)
        while True:
            ahead = max(self._least_ahead, characters // 4)
            known = text[: characters + ahead] if isinstance(text, str) else text.first(characters + ahead)
            with _library(self.name):
                if len(known) < characters + ahead:
                    return _cut(self._encoding(known), known, None)
                found = self._first(known, characters)
            if found is not None and len(found.ids) >= needed:
                return found
            characters *= 4

    def _encoding(self, text: str) -> Any:
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        return self.tokenizer(text, return_attention_mask=False, **options).encodings[0]

    def _first(self, known: str, characters: int) -> Encoded | None:
        """The tokens of `known` before a safe cut among its first characters; None if there is none."""
        part = known[:characters]
        encoding = self._encoding(part)
        longer = None
        for cut in self._cuts(encoding, part):
            longer = longer or self._encoding(known)
            starts, others = encoding.offsets[: cut + 1], longer.offsets[: cut + 1]
            same = encoding.ids[:cut] == longer.ids[:cut] and [a for a, _ in starts] == [a for a, _ in others]
            return _cut(encoding, part, cut) if same else None
        return None

    def _cuts(self, encoding: Any, part: str) -> Iterator[int]:
        """Counts of tokens before each place that no token can span, the last first."""
        limit = min(_quiet(part), len(part) - max(_MARGIN, *(len(text) for text in self._added.values()), 0))
        tokens, offsets, words = encoding.tokens, encoding.offsets, encoding.word_ids
        for number in range(len(tokens) - 1, 0, -1):
            start, before = offsets[number][0], offsets[number - 1]
            if not before[0] < start <= limit or before[1] > start:
                continue
            if any(encoding.ids[n] in self._added for n in (number - 1, number)):
                continue
            between_words = self._splits and words[number] != words[number - 1]
            if between_words or (self._joins_anywhere and self._apart(tokens[number - 1], tokens[number])):
                yield number

    def _apart(self, left: str, right: str) -> bool:
        """Whether no token of the vocabulary holds the last character of one and the first of the next, side by side."""
        if _BYTE.fullmatch(left) or _BYTE.fullmatch(right) or not left or not right:
            return False
        if self._vocabulary is None:
            self._vocabulary = "\0".join(self.tokenizer.get_vocab())
        return left[-1] + right[0] not in self._vocabulary

    def names(self, ids: Sequence[int], pieces: Sequence[str], prefix: Sequence[int] = ()) -> TokenNames:
        """The names of the tokens that these pieces of text don't show; those of the prefix are special ones."""
        special: dict[int, str] = {}
        fragments: dict[int, str] = {}
        unseen: dict[int, str] = {}
        with _library(self.name):
            for number, blank in dict.fromkeys(zip(ids, (not piece for piece in pieces), strict=True)):
                token = str(self.tokenizer.convert_ids_to_tokens(number))
                is_byte = self._byte_fallback and _BYTE.fullmatch(token)
                if (number in self._special or number in prefix) and not is_byte:
                    special[number] = token
                    continue
                held = self._held(number)
                if isinstance(held, bytes):
                    fragments[number] = f"<{' '.join(f'0x{byte:02X}' for byte in held)}>"
                elif blank:
                    unseen[number] = held
        return TokenNames(special, fragments, unseen)

    def _held(self, number: int) -> str | bytes:
        """The text of a token by itself; its bytes if they are not whole characters."""
        token = str(self.tokenizer.convert_ids_to_tokens(number))
        raw: bytes | None = None
        if number in self._added and not _BYTE.fullmatch(token):
            return self._added[number]
        if self._byte_level and all(character in _ALPHABET for character in token):
            raw = bytes(_ALPHABET[character] for character in token)
        elif self._byte_fallback and (match := _BYTE.fullmatch(token)):
            raw = bytes([int(match[1], 16)])
        if raw is not None:
            try:
                return raw.decode()
            except UnicodeDecodeError:
                return raw
        return (token.removeprefix("##") if self._kind == "WordPiece" else token).replace("▁", " ")


def _alphabet() -> dict[str, int]:
    """Character -> byte of byte-level tokenizers: GPT-2's encoder.py, bytes_to_unicode."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}


_ALPHABET = _alphabet()


def _state(part: Any) -> str:
    """A part of a tokenizer as its saved JSON; empty if there is no such part."""
    return "" if part is None else bytes(part.__getstate__()).decode()


def _cut(encoding: Any, text: str, number: int | None) -> Encoded:
    """The first tokens of an encoding. Pieces tile the text: no character is lost between tokens or shown twice."""
    starts = [start for start, _ in encoding.offsets]
    ids = list(encoding.ids)
    edges = [0, *starts[1:], len(text)]
    if number is not None:
        ids, edges = ids[:number], edges[: number + 1]
    return Encoded(ids, [text[a:b] for a, b in itertools.pairwise(edges)])


def _quiet(text: str) -> int:
    """The last position behind which the text changes its class often enough; 0 if it doesn't."""
    changes, last = 0, ""
    for place in range(len(text) - 1, -1, -1):
        kind = unicodedata.category(text[place])[0]
        kind = "L" if kind == "M" else "Z" if text[place].isspace() else kind
        if last and kind != last:
            changes += 1
            if changes == _RUNS_AHEAD:
                return place + 1
        last = kind
    return 0
