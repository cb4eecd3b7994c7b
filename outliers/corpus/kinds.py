"""Kinds of tokens: what a token's text says of the token, whatever tokenizer made it.

Each token is of one kind at most; special tokens are known by their id, not by their text (`ids.Corpus`). A token that is
of none of these is "other": a part of a character, a symbol. Knows characters, nothing of ids or models.
"""

from __future__ import annotations

import unicodedata

KINDS = ("delimiter", "special", "digit", "word_start", "word_piece")
"""In the order of `Corpus.marks`."""
DELIMITER, SPECIAL, DIGIT, WORD_START, WORD_PIECE = range(len(KINDS))
OTHER = -1


def is_delimiter(text: str) -> bool:
    """Whether a text is blank or punctuation alone, and not empty."""
    return bool(text) and all(unicodedata.category(character).startswith("P") for character in text.strip())


def in_word(character: str) -> bool:
    """Whether a character continues a word: a letter, a digit or a combining mark. False for an empty one."""
    return unicodedata.category(character)[0] in "LNM" if character else False


def kind_of(text: str, *, joined: bool) -> int:
    """The kind of a token with this text, an index into KINDS, or OTHER; never SPECIAL.

    joined: whether the character before it continues a word (`in_word`). A token with a letter is a word piece where it follows
    such a character without a blank, else the start of a word; one with a digit and no letter is a digit.
    """
    if is_delimiter(text):
        return DELIMITER
    if any(character.isalpha() for character in text):
        return WORD_PIECE if joined and not text[0].isspace() else WORD_START
    return DIGIT if any(character.isnumeric() for character in text) else OTHER
