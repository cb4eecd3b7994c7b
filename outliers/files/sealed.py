"""Small JSON files that carry their own checksum, and folders whose files are listed with theirs.

Numbers and ids depend on what the workspace keeps, so a flipped bit there must not be believed. A sealed file that differs
from what was written counts as absent: its reader makes it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from outliers.files.atomic import sha256_file, temporary_for, write_atomic

log = logging.getLogger(__name__)

SEAL = "seal"
"""Key of the checksum: sha256 (hex) of the other keys as JSON with sorted keys."""
LISTING = "checksums.json"
"""The sealed list of a folder's files."""
LARGE_BYTES = 1 << 26
"""From this size on a file is listed by CRC-32 and length: CRC-32 reads 2 GB a second, sha256 0.3 on a processor without
instructions for it, and weights are read before every extraction."""
_READ_BYTES = 1 << 22


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any], mode: int = 0o666) -> None:
    """Write `content`, which JSON can hold and which has no key `seal`, with its checksum. Raises OSError.

    `mode`: of the file, less the umask.
    """
    plain = json.loads(json.dumps(dict(content)))
    write_atomic(path, json.dumps(plain | {SEAL: _checksum(plain)}, indent=1).encode(), mode)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The content of a sealed file, without its checksum; None if there is none.

    A file that is damaged, edited, or was never sealed counts as absent; the log then says so.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s can't be read (%s): it is made again", path, error)
        return None
    if not isinstance(found, dict) or found.pop(SEAL, None) != _checksum(found):
        log.warning("%s is not what was written there: it is made again", path)
        return None
    return found


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 (hex) of each named file of a folder, for `changed_files`. Raises OSError."""
    return {name: sha256_file(folder / name) for name in names}


def changed_files(folder: Path, expected: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the files that are missing, unreadable, or not what `expected` (name -> sha256) says."""

    def differs(name: str) -> bool:
        try:
            return sha256_file(folder / name) != expected[name]
        except OSError:
            return True

    return tuple(name for name in expected if differs(name))


def seal_folder(folder: Path, names: Iterable[str] | None = None, listing: str = LISTING) -> None:
    """Write the sealed list of a folder's files, or of those named, with their checksums: for `check_folder`.

    Files of the list's own kind and hidden ones are not on it. Raises OSError.
    """
    chosen = sorted(names if names is not None else _files(folder))
    write_sealed(folder / listing, {"files": {name: _mark(folder / name) for name in chosen}})


def check_folder(folder: Path, listing: str = LISTING) -> bool:
    """Whether every file that `seal_folder` listed is what it was; False if there is no list. The log names what changed."""
    found = read_sealed(folder / listing)
    if found is None or not found.get("files"):
        return False
    for name, mark in found["files"].items():
        try:
            same = _mark(folder / name, large=mark.startswith("crc32:")) == mark
        except OSError:
            same = False
        if not same:
            log.warning("%s is not what was written there: it is made again", folder / name)
            return False
    return True


def drop_folder(folder: Path) -> None:
    """Remove a damaged folder, if it is there; renamed first, because another process may look for its name."""
    aside = temporary_for(folder)
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside)


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder) for path in found)
    return [str(n) for n in names if not n.name.endswith(LISTING) and not any(part.startswith(".") for part in n.parts)]


def _mark(path: Path, *, large: bool | None = None) -> str:
    """How a file is listed; `large`: by its CRC-32 (default: from LARGE_BYTES on)."""
    size = path.stat().st_size
    if not (size >= LARGE_BYTES if large is None else large):
        return f"sha256:{sha256_file(path)}"
    found = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            found = crc32(piece, found)
    return f"crc32:{found:08x}:{size}"
