"""Every link of the README and the docs to a file of this repository leads to that file, and to a heading that it has."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for name in subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    if (path := ROOT / name).is_file()
)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"")
_FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """A page without its blocks of code and its code in lines."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


@cache
def headings(page: Path) -> frozenset[str]:
    """The anchors of a page, as a code host makes them of headings."""
    found: dict[str, int] = {}
    anchors: set[str] = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", page.read_text()))
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", _FENCE.sub("", page.read_text()), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        anchors.add(slug if count == 0 else f"{slug}-{count}")
    return frozenset(anchors)


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere in this repository."""
    wrong = []
    for match in _LINK.finditer(prose(page.read_text())):
        link = match[1] or match[2]
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and (target.suffix != ".md" or anchor not in headings(target)):
            wrong.append(f"{link}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "a.md").write_text("# One `thing`: twice\n\n## Same\n\n## Same\n")
    page = tmp_path / "b.md"
    page.write_text(
        "[1](a.md#one-thing-twice) [2](a.md#same-1) [3](a.md#same-2) [4](c.md) [5](../x) [6](#here) `[7](d.md)`\n"
        "# Here\n```\n[8](e.md)\n# There\n```\n[9](#there) [10](https://example.org/f.md)\n"
    )
    assert broken(page) == [
        "a.md#same-2: no such heading",
        "c.md: no such file",
        "../x: no such file",
        "#there: no such heading",
    ]
