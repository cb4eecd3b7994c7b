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

from outliers.events import Event

NAME = "run.log"


def line(event: Event, step: str) -> str:
    """One log event as a line: time in UTC, level, step, message."""
    stamp = datetime.fromtimestamp(event.t, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"{stamp} {event.level:<7} {step}: {event.message}"


def append(folder: Path, lines: Iterable[str], workspace: Path) -> None:
    """Append lines, scrubbed, to the run.log of a results folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.writelines(scrub(text, workspace) + "\n" for text in lines)


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


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""  # a container's user without an entry has no name to hide
