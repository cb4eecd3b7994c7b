"""What a page holds, and what a folder holds, seen without the program."""

from __future__ import annotations

from html.parser import HTMLParser


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes."""

    def __init__(self, text):
        super().__init__()
        self.names = []
        self.loads = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append((tag, tuple(name for name, _ in attrs)))
        self.loads += [
            value for name, value in attrs if name in ("src", "href", "action", "srcset", "data", "xlink:href")
        ]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
