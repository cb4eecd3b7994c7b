"""The password of a Prefect server that this project starts: made at random for each start, known to this user alone.

It is passed on in the environment of Prefect's processes, never on a command line or in a log. The password of `make ui` is
also in a file which only the user can read, so that commands in other terminals find it. Knows no Prefect.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from outliers.files.atomic import temporary_for

AUTH, SERVER_AUTH = "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"
URL = "PREFECT_API_URL"
USER = "outliers"
"""Before the colon: Prefect's clients send `user:password`."""
TOKEN_BYTES = 32
HOST = "127.0.0.1"
_FORM = re.compile(USER + r":[A-Za-z0-9_-]{32,100}")
_MOST_BYTES = 200


def make() -> str:
    """A new password, of the form that Prefect calls an auth string."""
    return f"{USER}:{secrets.token_urlsafe(TOKEN_BYTES)}"


def given() -> str | None:
    """The user's own, from the environment; it wins over one that is made."""
    return os.environ.get(SERVER_AUTH) or os.environ.get(AUTH) or None


def settle(password: str) -> None:
    """This process, and those that it starts, ask for it and know it."""
    os.environ[AUTH] = os.environ[SERVER_AUTH] = password


def file_of(home: Path, port: int) -> Path:
    """Where the password of `make ui` on that port is kept."""
    return home / f"ui-{port}.password"


@contextlib.contextmanager
def kept(home: Path, port: int, password: str) -> Iterator[None]:
    """The password in its file, mode 0600 from its first moment, while the block runs. Raises OSError."""
    path = file_of(home, port)
    part = temporary_for(path)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(f"{password}\n")
    part.rename(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read(home: Path, port: int) -> str | None:
    """The password of `make ui` on that port; None where the file is absent, or is not this user's alone."""
    try:
        handle = os.open(file_of(home, port), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return None
        text = os.read(handle, _MOST_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return None
    finally:
        os.close(handle)
    return text if _FORM.fullmatch(text) else None


def adopt(homes: Iterable[Path]) -> None:
    """Where PREFECT_API_URL names a server of `make ui` whose password is in one of the homes, this process knows it.

    Such a server listens on 127.0.0.1 alone. `localhost` is replaced by that: where it also means ::1, another user's
    program could wait there for the password.
    """
    if os.environ.get(AUTH):
        return
    try:
        parts = urlsplit(os.environ.get(URL, ""))
        port = parts.port or 80
    except ValueError:
        return  # the first request to the server reports what is wrong with it
    if parts.scheme != "http" or parts.username is not None or parts.hostname not in (HOST, "localhost"):
        return
    for home in homes:
        if (password := read(home, port)) is not None:
            os.environ[AUTH] = password
            os.environ[URL] = parts._replace(netloc=f"{HOST}:{port}").geturl()
            return
