"""Files as this project writes them: complete under their name, or not there.

It knows nothing of what is in a file. Before it: whoever has bytes. After it: the workspace, the results, a folder
that serves as artifact store.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from pathlib import Path

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.part")
_READ_BYTES = 1 << 20


def temporary_for(path: Path) -> Path:
    """A name beside `path` that no other writer has; it can't be mistaken for a finished file."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def unfinished_name(name: str) -> str | None:
    """The name that a leftover of a killed `write_atomic` would have got; None for any other file name."""
    found = _TEMPORARY.fullmatch(name)
    return found["name"] if found else None


def write_new(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, which must not exist, and waits until the disk has it; FileExistsError, OSError."""
    # Not tempfile: it makes files that only their owner reads, and an atlas in a shared folder is for others.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder` are on the disk; a file system that can't do that is left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Puts `data` at `path`, replacing what was there: a reader sees the old bytes or the new ones, also after a crash.

    The folder must exist. Raises OSError; the old file is then untouched and nothing is left beside it.
    """
    temporary = temporary_for(path)
    try:
        write_new(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sha256_file(path: Path) -> str:
    """sha256 (hex) of the bytes at `path`, read in pieces; OSError where it can't be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
