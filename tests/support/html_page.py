"""A page as a browser would see it, without one: its tags, its text, the cells of its tables."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []  # of all tables, cell by cell
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data.strip("\n")

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


FORBIDDEN = {"script", "iframe", "object", "embed", "base", "frame", "applet", "form", "portal", "link"}


LINK = re.compile(r"#\S*|(?:https?|file)://[^\s\"<>]+|[A-Za-z0-9%._~-]+(?:/[A-Za-z0-9%._~-]+)*")
"""An address of the page's own, one of the web or of this disk, or one relative to the page, which has no scheme."""


def check_harmless(html: str) -> None:
    """The page runs, frames and loads nothing, and says so to the browser."""
    page = Page(html)
    policies = [own["content"] or "" for tag, own in page.tags if own.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.strip().partition(" ")[::2] for rule in policies[0].split(";"))
    assert rules.pop("style-src") == "'unsafe-inline'"
    assert rules.pop("img-src", "data:") == "data:"
    assert rules == dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")
    for tag, own in page.tags:
        assert tag not in FORBIDDEN, tag
        for name, value in own.items():
            assert not name.startswith("on"), (tag, name)
            if (tag, name) == ("a", "href"):  # followed by a person alone: no scheme that runs anything
                assert LINK.fullmatch(value or ""), (tag, name, value)
            elif name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"):
                assert (value or "").startswith(("#", "data:image/webp;base64,")), (tag, name, value)
