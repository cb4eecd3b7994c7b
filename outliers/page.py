"""A judge of HTML: whether a page is self-contained, and whether all data in it are known pictures.

`check_page` walks the tags of a page as a browser would meet them. It knows nothing of files or what the page says.
Before it: `contents`. After it: what is left of the page without its pictures is judged there as text.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from html.parser import HTMLParser

MAX_REST_BYTES = 1_000_000
PICTURE = "data:image/png;base64,"

# Attributes whose value a browser may fetch.
_FETCHED = {
    "src",
    "srcset",
    "href",
    "xlink:href",
    "poster",
    "data",
    "background",
    "action",
    "formaction",
    "imagesrcset",
    "ping",
    "manifest",
    "srcdoc",
    "archive",
    "classid",
    "codebase",
    "longdesc",
    "profile",
    "lowsrc",
    "dynsrc",
}
_FORBIDDEN_TAGS = {"script", "iframe", "object", "embed", "base", "frame", "applet", "form", "portal"}
_STYLE_LOADS = re.compile(r"(url\s*\(|@import|image-set\s*\(|expression\s*\(|data\s*:|https?\s*:)", re.IGNORECASE)
_LINK = re.compile(r"(https?://|#|[A-Za-z0-9._-]+(/|$))")


def check_page(text: str, plots: Sequence[bytes]) -> str:
    """The page `text` without its pictures; ValueError where it loads, runs or holds something else.

    `plots` are the bytes of the PNG files beside the page: each `data:` URI must be one of them.
    """
    if not re.match(r"<!doctype html>", text, re.IGNORECASE):
        raise ValueError("it does not begin with <!doctype html>")
    walker = _Walker({bytes(plot) for plot in plots})
    walker.feed(text)
    walker.close()
    rest = text
    for uri in walker.pictures:
        rest = rest.replace(uri, "")
    size = len(rest.encode())
    if size >= MAX_REST_BYTES:
        raise ValueError(f"{size:,} bytes beside its pictures, less than {MAX_REST_BYTES:,} are published")
    return rest


class _Walker(HTMLParser):
    """Meets every tag and attribute; `pictures` are the URIs found to be plots."""

    def __init__(self, plots: set[bytes]) -> None:
        super().__init__(convert_charrefs=True)
        self._plots = plots
        self._in_style = False
        self.pictures: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _FORBIDDEN_TAGS:
            raise ValueError(f"a tag <{tag}> in line {self.getpos()[0]}; the page runs and frames nothing")
        self._in_style = tag == "style"
        for name, value in attrs:
            self._check_attribute(tag, name, value or "")

    def handle_endtag(self, tag: str) -> None:
        self._in_style = self._in_style and tag != "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self._check_style(data)

    def _check_attribute(self, tag: str, name: str, value: str) -> None:
        where = f"{name} of <{tag}> in line {self.getpos()[0]}"
        if name == "style":
            self._check_style(value)
        elif name.startswith("on"):
            raise ValueError(f"a script in {where}; the page runs nothing")
        elif name == "http-equiv" and value.strip().lower() == "refresh":
            raise ValueError(f"a refresh in {where}; the page goes nowhere by itself")
        elif name in _FETCHED:
            if value.lower().startswith(PICTURE):
                self._check_picture(where, value)
            elif not value.startswith("#") and not (tag == "a" and name == "href" and _LINK.match(value)):
                raise ValueError(f"{where} loads '{value[:60]}'; only a plot of this study as {PICTURE}... is allowed")
        elif _STYLE_LOADS.match(value.strip()) and name not in ("alt", "title", "aria-label", "content"):
            # presentation attributes of SVG (fill, filter, mask...) may hold url() too
            raise ValueError(f"{where} holds '{value[:60]}', which a browser may load")

    def _check_picture(self, where: str, uri: str) -> None:
        try:
            data = base64.b64decode(uri[len(PICTURE) :], validate=True)
        except binascii.Error as error:
            raise ValueError(f"{where} is not base64: {error}") from error
        if data not in self._plots:
            raise ValueError(
                f"{where} holds {len(data):,} bytes that are none of the {len(self._plots)} files in plots/"
            )
        self.pictures.add(uri)

    def _check_style(self, style: str) -> None:
        found = _STYLE_LOADS.search(style)
        if found:
            raise ValueError(f"a style near line {self.getpos()[0]} has '{found[0]}'; the page loads nothing")
