"""Text that came from outside, with every character that could act on a terminal or reorder a line made visible.

It imports nothing heavy and knows neither rich nor HTML: who prints sees to markup. Before it: a store, a host, a model's name.
After it: a message, a log line, a table.
"""

from __future__ import annotations

import re
from typing import Any

ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 but for newline and tab, DEL, C1, line and paragraph separators, bidirectional overrides and isolates, lone surrogates."""

LINE_ACTS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""The same, and newline and tab: what may not stand in one line."""


def visible(text: str) -> str:
    r"""`text` with each control character as an escape: ESC is shown as \x1b, U+202E as \u202e. Newlines and tabs stay."""
    return ACTS.sub(_escape, text)


def visible_line(text: str, max_chars: int = 300) -> str:
    r"""`text` as one line of at most `max_chars` characters: newlines are shown as \n too, and the end is cut with `...`."""
    shown = LINE_ACTS.sub(_escape, text[: max_chars + 1])
    return shown if len(text) <= max_chars and len(shown) <= max_chars else f"{shown[: max(0, max_chars - 3)]}..."


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
