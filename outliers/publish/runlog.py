"""run.log: the log lines of a study's steps, as others may read them: without paths, host and user of this computer,
and without the names of somebody's own model and text.

Knows lines, and no jobs. It is published only on request.
"""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from outliers.events.event import Event

NAME = "run.log"
ORDINARY = frozenset({"model", "models", "text", "texts", "corpus", "data", "checkpoint", "weights", "tokens"})
"""Names of files and folders that are words of the steps' own lines."""
_HEAD_BYTES = 200
"""Room for the line that says what is left out."""
_CONTINUED = re.compile(rb"\A[\x80-\xbf]{1,3}")
_NOT_TEXT = re.compile(r"[^\t\n\r\x1b\x20-\x7e\x80-\U0010ffff]|[\x80-\x84\x86-\x9f\ud800-\udfff]")
_ENCODED = re.compile(r"[A-Za-z0-9+/=_-]{1024,}")
"""Longer than any word, and than any path; `contents` allows 4,095."""


def line(event: Event, step: str) -> str:
    """One log event as a line: time in UTC, level, step, message."""
    stamp = datetime.fromtimestamp(event.t, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"{stamp} {event.level:<7} {step}: {event.message}"


def append(folder: Path, lines: Iterable[str], workspace: Path, words: Mapping[str, str] | None = None) -> None:
    """Append lines, scrubbed, to the run.log of a results folder. words: as in `rename`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.writelines(_plain(scrub(rename(text, words or {}), workspace)) + "\n" for text in lines)


def rename(text: str, words: Mapping[str, str]) -> str:
    """The text with names that are not published replaced by what is; whole words alone.

    words: name -> what stands for it. A name of one letter stays, and so does one of ORDINARY: they tell nothing, and without
    them no line could be read.
    """
    shown = {_plain(name): public for name, public in words.items()} | dict(words)
    for name in sorted(shown, key=len, reverse=True):
        if len(name) > 1 and name.lower() not in ORDINARY:
            # mypy infers no type for a lambda with a default
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", lambda _, public=shown[name]: public, text)  # type: ignore[misc]
    return text


def scrub(text: str, workspace: Path) -> str:
    """The text with the workspace, the home folder, other full paths, the host's and the user's name taken out."""
    for known, shown in ((str(workspace), "<workspace>"), (str(Path.home()), "<home>"), (str(Path.cwd()), "<folder>")):
        if known != "/":
            text = text.replace(known, shown)
    text = re.sub(r"(?<![\w.:/>])/(?:[^\s/'\"]+/)+", "<path>/", text)
    for known, shown in ((socket.gethostname(), "<host>"), (_user(), "<user>")):
        if len(known) > 1:  # a name of one letter would blot out ordinary words
            text = re.sub(rf"\b{re.escape(known)}\b", shown, text)
    return text


def publishable(data: bytes, of_bytes: int, most_bytes: int) -> bytes:
    """The publishable end of a log: at most `most_bytes`, in whole lines, below a line that says what is left out.

    `data`: the log, or its end; `of_bytes`: the size of the whole log. Bytes that are not text stay: `contents` judges them
    afterwards.
    """
    if len(data) == of_bytes <= most_bytes:
        return data
    end = data[-(most_bytes - _HEAD_BYTES) :]
    # cut at the end of a line; within a line longer than `end`, between two characters
    kept = end.partition(b"\n")[2] or _CONTINUED.sub(b"", end)
    head = f"... the end of this log: the last {len(kept):,} of {of_bytes:,} bytes; the beginning is not published\n"
    return head.encode() + kept


def _plain(text: str) -> str:
    """A line without what is not text, and without runs of characters that could be encoded data.

    So no line that a step prints keeps its finished study from being published.
    """
    text = _NOT_TEXT.sub("\ufffd", text)
    return _ENCODED.sub(lambda run: f"{run[0][:32]}...({len(run[0]):,} characters)", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""  # a container's user without an entry has no name to hide
