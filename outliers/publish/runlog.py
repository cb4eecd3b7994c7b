"""run.log: what the steps of a study said, as it may be shown to others: no paths of this machine, no host, no user.

Knows lines, nothing of jobs. Before it: the tasks, which follow the steps. After it: `publish`, where it is asked for.
"""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from outliers.events.event import Event

NAME = "run.log"
_HEAD_BYTES = 200
"""Room for the line that says what was left out."""
_CONTINUED = re.compile(rb"\A[\x80-\xbf]{1,3}")
_NOT_TEXT = re.compile(r"[^\t\n\r\x1b\x20-\x7e\x80-\U0010ffff]|[\x80-\x84\x86-\x9f\ud800-\udfff]")
_ENCODED = re.compile(r"[A-Za-z0-9+/=_-]{1024,}")
"""Longer than any word, and than any path; `contents` allows 4,095."""


def line(event: Event, step: str) -> str:
    """One log event as a line: time in UTC, level, step, message."""
    stamp = datetime.fromtimestamp(event.t, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"{stamp} {event.level:<7} {step}: {event.message}"


def append(folder: Path, lines: Iterable[str], workspace: Path) -> None:
    """Append lines, scrubbed, to the run.log of a results folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.writelines(_plain(scrub(text, workspace)) + "\n" for text in lines)


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
    """What is published of a log: at most `most_bytes` from its end, in whole lines, below a line that says so.

    `data`: the log, or its end; `of_bytes`: the size of all of it. What is no text stays what it is: that is judged after
    this, by `contents`.
    """
    if len(data) == of_bytes <= most_bytes:
        return data
    end = data[-(most_bytes - _HEAD_BYTES) :]
    # cut where a line ends; where one is longer than all of that, between two characters
    kept = end.partition(b"\n")[2] or _CONTINUED.sub(b"", end)
    head = f"... the end of this log: the last {len(kept):,} of {of_bytes:,} bytes; the beginning is not published\n"
    return head.encode() + kept


def _plain(text: str) -> str:
    """A line as it may be published: what is no text, and runs of characters that could be encoded data, are taken out.

    So nothing that a step happens to print keeps its finished study from its target.
    """
    text = _NOT_TEXT.sub("\ufffd", text)
    return _ENCODED.sub(lambda run: f"{run[0][:32]}...({len(run[0]):,} characters)", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""  # a container's user without an entry has no name to hide
