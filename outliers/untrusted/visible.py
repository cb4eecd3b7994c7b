"""Makes visible every character of outside text that could act on a terminal or reorder a line.

`visible` and `visible_line` leave plain text unchanged. Such text is not markup either: printing with rich needs `Text`, and
for Markdown there are `markdown` and `code`. It imports nothing heavy.
"""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Any

ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 but for newline and tab, DEL, C1, line and paragraph separators, bidirectional overrides and isolates, lone surrogates."""

LINE_ACTS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""The same, with newline and tab: characters that a single line must not have."""

_SPACE = re.compile(r"\s+")
_MARKS = re.compile(r"([\\`*_{}\[\]()#!|~$])")
_LIST = re.compile(r"^(\d{0,9})([-+=.])")
"""Begins a list or a heading at the beginning of a line."""
_LINK = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]{0,20}|\bwww|\w)(:(?=//)|(?<=www)\.|@)")
"""Some renderers of Markdown make a link of it."""


def visible(text: str) -> str:
    r"""`text` with each control character as an escape: ESC is shown as \x1b, U+202E as \u202e. Newlines and tabs stay."""
    return ACTS.sub(_escape, text.replace("\r\n", "\n"))


def visible_line(text: str, max_chars: int = 300) -> str:
    r"""`text` as one line of at most `max_chars` characters: newlines are shown as \n too, and the end is cut with `...`."""
    shown = LINE_ACTS.sub(_escape, text[: max_chars + 1])
    return shown if len(text) <= max_chars and len(shown) <= max_chars else f"{shown[: max(0, max_chars - 3)]}..."


def visible_name(text: str, max_chars: int = 120) -> str:
    r"""The name of a file or folder as one line: as `visible_line`, and marks of direction and zero width are escapes too.

    The mark U+200F is shown as \u200f, so that no two names look alike and none turns the words around it.
    """
    shown = "".join(
        f"\\u{ord(char):04x}" if unicodedata.category(char) == "Cf" else char for char in text[: max_chars + 1]
    )
    return visible_line(shown, max_chars)


def _escape(found: re.Match[str]) -> str:
    named = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(found[0])
    code = ord(found[0])
    return named or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def visible_values(value: Any) -> Any:
    """A value of plain JSON (of limited depth) in which every string, keys included, is as `visible_line` shows it, uncut."""
    if isinstance(value, str):
        return LINE_ACTS.sub(_escape, value)
    if isinstance(value, list | tuple):
        return type(value)(visible_values(item) for item in value)
    if isinstance(value, dict):
        return {visible_values(key): visible_values(item) for key, item in value.items()}
    return value


def cut(text: str, max_chars: int) -> str:
    """At most `max_chars` characters of `text`, and a note if more were there."""
    return text if len(text) <= max_chars else f"{text[:max_chars]}... (cut)"


def last_drawn(line: bytes) -> str:
    """A line that a program printed, as text; of a progress bar its last state."""
    return line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]


def markdown(text: str) -> str:
    """`text` as one line of Markdown that shows these characters, also in a table: no link, no HTML, no emphasis, no list."""
    plain = html.escape(_SPACE.sub(" ", visible(text)), quote=False)
    return _LINK.sub(r"\1\\\2", _LIST.sub(r"\1\\\2", _MARKS.sub(r"\\\1", plain)))


def code(text: str) -> str:
    """`text` as a code span of Markdown, whatever backticks are in it."""
    plain = _SPACE.sub(" ", visible(text))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    room = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{room}{plain}{room}{fence}"
