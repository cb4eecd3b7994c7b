"""Characters of others' text that could act on a terminal, and what is shown instead."""

import sys
import unicodedata

from outliers.untrusted.visible import visible, visible_line


def test_no_character_that_acts_comes_through_and_every_other_does() -> None:
    acting = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
    acting |= {"\u2028", "\u2029", *map(chr, range(0xD800, 0xE000))}
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        kept = char not in acting
        assert (visible(char) == char) == (kept or char in "\n\t"), hex(code)
        assert (visible_line(char) == char) == kept, hex(code)
        # the standard library's own classes: controls, surrogates, line and paragraph separators
        assert kept == (unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") and char not in acting)


def test_what_is_shown_is_plain_text_that_a_terminal_and_a_file_take() -> None:
    shown = visible("a\x1b[31mb\x9bc\u202ed\ud800e\nf\tg\rh")
    assert shown == "a\\x1b[31mb\\x9bc\\u202ed\\ud800e\nf\tg\\rh"
    assert shown.encode("utf-8")


def test_a_line_is_one_line_of_limited_length() -> None:
    assert visible_line("a\nb\tc") == "a\\nb\\tc"
    assert visible_line("x" * 300) == "x" * 300
    assert visible_line("x" * 301) == "x" * 297 + "..."
    assert len(visible_line("\x1b" * 10_000)) == 300
    assert visible_line("\x1b" * 10_000, 10) == "\\x1b\\x1..."
