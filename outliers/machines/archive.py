"""What a machine sends home, unpacked: plain files alone, under names that were expected, no more bytes than were allowed.

The sender may be hostile, so the archive is read by this module and not by `tarfile`, which follows sparse maps, links and
headers of many kinds. Of the tar format it knows what `agent.get` writes: plain files, and before a file a header of pax
with its long name. All of it is written into a folder of its own first.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from outliers.errors import DiskFull, JobFailed, WorkspaceError
from outliers.files.atomic import NO_ROOM, temporary_for
from outliers.untrusted.bounds import RECEIVED_BYTES, RECEIVED_FILES
from outliers.untrusted.visible import visible, visible_line

BLOCK = 512
END_BYTES = 1 << 16
"""What an archive has behind its last file: tar fills up a record of 10,240 bytes."""
_PAX_BYTES = 8 * BLOCK
HEADER_BYTES = 3 * BLOCK + _PAX_BYTES
"""At most this much of an archive belongs to a file in addition to its bytes: two headers, a pax header's records, padding."""
_NAME_BYTES = 1024
_DEPTH = 8
_PART = re.compile(r"[^/\0]{1,255}")
_PAX_KEYS = frozenset({"path", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment"})
_OCTAL = re.compile(rb" *([0-7]{1,11})[ \0]*")
_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=\n]{1,64})=")


@dataclass(frozen=True, slots=True)
class Limits:
    """`names`: the only files that may come, relative to the folder, with `/`; None for any."""

    max_bytes: int = RECEIVED_BYTES
    max_files: int = RECEIVED_FILES
    names: Collection[str] | None = None

    @property
    def archive_bytes(self) -> int:
        """What an archive within these limits can have at most."""
        return self.max_bytes + self.max_files * HEADER_BYTES + END_BYTES


class _Refused(Exception):
    """What is wrong with an archive, in words that follow a name."""


def unpack(archive: IO[bytes], local: Path, limits: Limits, what: str) -> None:
    """Write the file, or the folder's files, of an archive to `local`; a file that is there already is replaced.

    `what` is named in errors. Raises JobFailed for an archive that is not plain or goes over a limit: then nothing of it
    stays, and what was at `local` is as it was. DiskFull or WorkspaceError where it can't be written.
    """
    aside = temporary_for(local)
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir(mode=0o700)
        try:
            names = _write_all(archive, aside, limits)
            _place(aside, local, names)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except _Refused as error:
        raise JobFailed(f"{what} can't be brought home: {error}. Nothing of it was kept") from error
    except OSError as error:
        kind = DiskFull if error.errno in NO_ROOM else WorkspaceError
        raise kind(f"{what} can't be written to {local}: {error}") from error


def _write_all(archive: IO[bytes], aside: Path, limits: Limits) -> list[str]:
    """The files of an archive below `aside`, by the names in it: "file", or "folder/..."."""
    names: list[str] = []
    taken: set[str] = set()
    left = limits.max_bytes
    for name, size in _members(archive):
        _check_name(name, limits)
        if name in taken:
            raise _Refused(f"{name!r} comes twice")
        if len(names) == limits.max_files:
            raise _Refused(f"it has more than {limits.max_files:,} files, too many to be results")
        if size > left:
            raise _Refused(f"it has more than {limits.max_bytes:,} bytes, too much to be results")
        place = aside / name
        if any(str(parent) in taken for parent in Path(name).parents):
            raise _Refused(f"{name!r} is below a file")
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            raise _Refused(f"{name!r} is a file and a folder")
        left -= _copy(archive, place, size)
        names.append(name)
        taken.add(name)
    if "file" in taken and len(names) > 1:
        raise _Refused("it is a file and a folder")
    return names


def _check_name(name: str, limits: Limits) -> None:
    top, _, rest = name.partition("/")
    parts = rest.split("/") if rest else []
    plain = name == visible(name) and len(os.fsencode(name)) <= _NAME_BYTES
    known = name == "file" or (top == "folder" and 0 < len(parts) <= _DEPTH)
    if not (plain and known and all(_PART.fullmatch(part) and part not in (".", "..") for part in parts)):
        raise _Refused(f"a file with the name '{visible_line(name)}' came, which was not asked for")
    if limits.names is not None and top == "folder" and rest not in limits.names:
        raise _Refused(f"a file with the name '{visible_line(rest)}' came, which was not asked for")


def _members(archive: IO[bytes]) -> Iterator[tuple[str, int]]:
    """(name, bytes) of each file; the caller reads its bytes and their padding before the next."""
    name: str | None = None
    while True:
        header = archive.read(BLOCK)
        if len(header) < BLOCK:
            raise _Refused("its archive ends too early")
        if not header.strip(b"\0"):
            return
        found = _OCTAL.fullmatch(header[124:136])
        if not _has_checksum(header) or header[257:265] != b"ustar\x0000" or found is None:
            raise _Refused("it is not an archive as the agent writes it")
        size, kind = int(found[1], 8), header[156:157]
        if kind == b"x" and name is None:
            if size > _PAX_BYTES:
                raise _Refused(f"a header of {size:,} bytes came")
            name = _pax_name(_read(archive, size))
            continue
        if kind not in (b"0", b"\0"):
            raise _Refused(f"something came that is not a plain file (kind {kind!r})")
        yield name or _own_name(header), size
        name = None


def _own_name(header: bytes) -> str:
    """The name in a header, in its two fields."""
    tail, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    return _text(prefix + b"/" + tail if prefix else tail)


def _pax_name(records: bytes) -> str:
    """The name in the records of a pax header; "" where they hold none."""
    name, begin = "", 0
    while begin < len(records):
        found = _RECORD.match(records, begin)
        end = begin + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(records) or records[end - 1 : end] != b"\n":
            raise _Refused("a header came that can't be read")
        key = _text(found[2])
        if key not in _PAX_KEYS:  # of sparse files, links and sizes there are others
            raise _Refused(f"a header came with '{visible_line(key)}', which no plain file needs")
        if key == "path":
            name = _text(records[found.end() : end - 1])
        begin = end
    return name


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refused(
            f"a file with the name '{visible_line(data.decode(errors='replace'))}' came: not UTF-8"
        ) from None


def _has_checksum(header: bytes) -> bool:
    found = re.match(rb" *([0-7]{1,7})[\0 ]", header[148:156])
    return found is not None and int(found[1], 8) == sum(header[:148]) + 8 * 32 + sum(header[156:])


def _read(archive: IO[bytes], size: int) -> bytes:
    """`size` bytes; their padding is passed over."""
    padded = -(-size // BLOCK) * BLOCK
    data = archive.read(padded)
    if len(data) < padded:
        raise _Refused("its archive ends too early")
    return data[:size]


def _copy(archive: IO[bytes], place: Path, size: int) -> int:
    """Write the next `size` bytes to a new file; how many were written."""
    written = 0
    with place.open("xb") as file:
        while written < size:
            block = _read(archive, min(size - written, 1 << 20))
            file.write(block)
            written += len(block)
    return written


def _place(aside: Path, local: Path, names: list[str]) -> None:
    """Give each file its place, whole; an empty folder is one too."""
    if names == ["file"]:
        (aside / "file").replace(local)
        return
    local.mkdir(parents=True, exist_ok=True)
    for name in names:
        place = local / name.removeprefix("folder/")
        place.parent.mkdir(parents=True, exist_ok=True)
        (aside / name).replace(place)
