"""Templates to pages: the one Jinja environment of the report and the atlas.

Every value is escaped, an undefined name is an error, and the filters are the page's formatters. It knows nothing of what
is on a page.
"""

from __future__ import annotations

import base64
import functools
import io
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliers.report.figures import number, percent
from outliers.units import clip, format_aligned, plural

if TYPE_CHECKING:
    from jinja2 import Template

KEPT_TEMPLATES = 8
"""Compiled templates that a process keeps: the pages of a study, a probe and the atlas."""


def render_template(
    name: str, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None
) -> str:
    """A page as text, from a template of this folder. filters: those that this page has in addition."""
    return _template(name, tuple((filters or {}).items())).render(**values)


@functools.lru_cache(maxsize=KEPT_TEMPLATES)
def _template(name: str, filters: tuple[tuple[str, Callable[..., Any]], ...]) -> Template:
    """A compiled template: compiling it takes five times as long as a page of a study."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent / "templates")
    house = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    house.filters |= {
        "percent": percent,
        "number": number,
        "value": format_aligned,
        "printable": printable,
        "clip": clip,
        "tall": is_tall,
    }
    house.filters |= {"count": "{:,}".format, "s": plural} | dict(filters)
    return house.get_template(name)


def is_tall(picture: str) -> bool:
    """Whether a picture of `page_image` is higher than three quarters of its width: on paper it then needs most of a page."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        width, height = image.size
    return bool(4 * height > 3 * width)


def printable(text: object) -> str:
    """`text` on one line: newlines as ⏎, tabs as ⇥, and other control or direction-changing characters as U+FFFD."""
    shown = str(text).replace("\r\n", "⏎").replace("\n", "⏎").replace("\r", "⏎").replace("\t", "⇥")
    return "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char for char in shown)
