"""Kinds of tokens: each text is of one kind, by what it holds and by what stands before it."""

from __future__ import annotations

import numpy as np
import pytest

from outliers.corpus.ids import Corpus, CorpusInfo, TokenNames
from outliers.corpus.kinds import KINDS, OTHER, kind_of
from outliers.counting.summary import TEXT_KINDS

CASES = [
    # text, whether a letter or digit stands before it, kind
    ("the", False, "word_start"),
    ("the", True, "word_piece"),
    (" the", True, "word_start"),  # a blank of its own begins a word
    ("'s", True, "word_piece"),  # it's
    ("(x", False, "word_start"),
    ("1st", False, "word_start"),  # a letter makes a word
    ("é", True, "word_piece"),
    ("12", True, "digit"),
    (" 3.5", False, "digit"),
    ("²", False, "digit"),
    (".", True, "delimiter"),
    (" \n", True, "delimiter"),
    (" (", False, "delimiter"),
    ("+", False, None),  # a symbol
    ("", False, None),
]


@pytest.mark.parametrize(("text", "joined", "kind"), CASES)
def test_a_text_is_of_one_kind(text, joined, kind):
    assert kind_of(text, joined=joined) == (OTHER if kind is None else KINDS.index(kind))


def test_the_counted_kinds_are_the_last_ones():
    """`counting.summary` may not import the corpus: its names are written a second time."""
    assert KINDS[2:] == TEXT_KINDS


def test_marks_of_a_text_in_pieces():
    """`<s>` `Unbe` `liev` `able` ` ` `42` `, yes` and padding; the byte of a part of a character is of no kind."""
    text = "Unbelievable 42, yes\U0001f600"
    starts = [0, 0, 4, 8, 12, 13, 15, 16, 20, 0]
    info = CorpusInfo(
        source="s",
        public=True,
        key="k",
        num_sequences=1,
        sequence_length=10,
        num_tokens=9,
        num_documents=1,
        token_sha256="0",
    )
    corpus = Corpus(
        info=info,
        ids=np.array([[1, 5, 6, 7, 8, 9, 10, 11, 12, 1]], np.int32),
        lengths=np.array([9], np.int32),
        starts=np.array([starts], np.int32),
        texts=(text,),
        names=TokenNames(special={1: "<s>"}, fragments={12: "<0xF0>"}),
    )
    marks = corpus.marks()
    assert marks.shape == (1, len(KINDS), 10)
    names = [[KINDS[kind] for kind in np.flatnonzero(marks[0, :, position])] for position in range(10)]
    assert names == [
        ["special"],
        ["word_start"],
        ["word_piece"],
        ["word_piece"],
        ["delimiter"],
        ["digit"],
        ["delimiter"],
        ["word_start"],
        [],
        [],  # padding has the id of a special token
    ]
