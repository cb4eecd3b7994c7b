"""Text of others as it may be shown: a terminal obeys none of it, and no page takes it for markup.

Each text goes through `visible`, or `visible_line`, once, where it enters: events and errors of a machine, what ssh and a
host print, names that they give. Both leave their own result as it is. Knows no terminal and no page. Before it: whoever
reads what another machine or program said. After it: logs, the terminal, Prefect's pages.
"""

from __future__ import annotations

import html
import re

# C0 (but tab and line feed), DEL, C1; marks that turn the direction of text; two more ends of a line; halves of a pair,
# which no encoding takes.
_HIDDEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_CONTROL = re.compile(f"[{_HIDDEN}]")
_LINE_CONTROL = re.compile(f"[\t\n{_HIDDEN}]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~^$:/@])")
_SPACE = re.compile(r"\s+")


def visible(text: str) -> str:
    """`text` with each control character written out: ESC as the four characters backslash, x, 1, b.

    Tabs and line feeds stay; a return before a line feed goes.
    """
    return _CONTROL.sub(_escape, text.replace("\r\n", "\n"))


def visible_line(text: str, most: int = 256) -> str:
    """As `visible`, for a name: tabs and line feeds are written out too, and of more than `most` characters the rest is cut."""
    return cut(_LINE_CONTROL.sub(_escape, text[: most + 1]), most)


def cut(text: str, most: int) -> str:
    """At most `most` characters of `text`, and a note of how many there were."""
    return text if len(text) <= most else f"{text[:most]}... (cut)"


def last_drawn(line: bytes) -> str:
    """A line that a program printed, as text; of a bar that it drew over with returns, the last state."""
    return line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]


def markdown(text: str) -> str:
    """`text` as one line of Markdown that shows just these characters, in a table too: no link, no HTML, no emphasis."""
    plain = html.escape(_SPACE.sub(" ", visible(text)), quote=False)
    # the entities that `html.escape` wrote hold none of these characters but & and ;
    return _MARKDOWN.sub(r"\\\1", plain)


def code(text: str) -> str:
    """`text` as a code span of Markdown, whatever backticks are in it."""
    plain = _SPACE.sub(" ", visible(text))
    longest = max((len(run) for run in re.findall("`+", plain)), default=0)
    fence = "`" * (longest + 1)
    room = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{room}{plain}{room}{fence}"


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
