"""What tests of a host that was taken over have in common: text that acts on a terminal, JSON that breaks parsers, archives."""

from __future__ import annotations

import io
import json
import re
import tarfile

ESCAPES = "\x1b[31m\x1b]0;title\x07\x9b2J\u202egnp.exe\x7f\r"
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000


def member(name="folder/a.txt", kind=tarfile.REGTYPE, data=b"data", link="", pax=None):
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.pax_headers = kind, link, pax or {}
    found.size = len(data) if kind == tarfile.REGTYPE else 0
    return found, data


def archive(*members, form=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for found, data in members:
            file.addfile(found, io.BytesIO(data))
    return buffer.getvalue()


GOOD = {"t": 1.5, "kind": "log", "level": "info", "message": "fine"}


def line(**changes):
    return json.dumps(GOOD | changes).encode() + b"\n"
