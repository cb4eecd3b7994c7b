"""Small JSON files that carry their own checksum, and folders whose files are listed with theirs.

A number or an id depends on what the workspace remembers, so a flipped bit there must not be believed. A sealed file that
is not what was written counts as absent: whoever reads it makes it again. Knows no content. Uses `files`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from outliers.files import sha256_file, write_atomic

log = logging.getLogger(__name__)

SEAL = "seal"
"""Key of the checksum: sha256 (hex) of the other keys as JSON with sorted keys."""


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, which JSON can hold and which has no key `seal`, with its checksum. Raises OSError."""
    plain = json.loads(json.dumps(dict(content)))
    write_atomic(path, json.dumps(plain | {SEAL: _checksum(plain)}, indent=1).encode())


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The content of a sealed file, without its checksum; None where there is none.

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
