"""Writes files so that each is complete under its name, or absent."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import sys
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that takes nothing more."""
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.part")
_READ_BYTES = 1 << 20
_CAN_NOT = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""Error numbers of fsync for a folder, on a file system that does not support it."""


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_SYNC_FILE_RANGE = getattr(_LIBC, "sync_file_range", None)
if _SYNC_FILE_RANGE is not None:
    _SYNC_FILE_RANGE.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_SYNCFS = getattr(_LIBC, "syncfs", None)
_KERNEL = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
CAN_SYNC_ALL = _SYNCFS is not None and _KERNEL >= (5, 8)
"""Whether `sync_all` reports the errors of the disk: before Linux 5.8 syncfs(2) did not."""


def temporary_name(name: str) -> str:
    """A file name that no other writer of a file `name` has; it can't be mistaken for a finished file's."""
    return f".{name}.{secrets.token_hex(8)}.part"


def temporary_for(path: Path) -> Path:
    """A path in the folder of `path` that no other writer has, as `temporary_name`."""
    return path.with_name(temporary_name(path.name))


def unfinished_name(name: str) -> str | None:
    """The final name of a leftover of a killed `write_atomic`; None for any other file name."""
    found = _TEMPORARY.fullmatch(name)
    return found["name"] if found else None


def write_new(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes `data` to `path`, which must not exist, and waits until the disk has it; FileExistsError, OSError.

    `mode`: of the file, less the umask.
    """
    # Not tempfile: its files are readable by their owner only, and an atlas in a shared folder is for others.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of `content`: a single write may take only a part, on a disk that is nearly full."""
    view = memoryview(content).cast("B")
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, on file systems that support it. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_handle(handle)
    finally:
        os.close(handle)


def sync_handle(handle: int) -> None:
    """`sync_folder` of an open folder."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CAN_NOT:
            raise


def sync_all(handle: int) -> None:
    """Waits until the disk has all that was written to the file system of an open file or folder, names included.

    Raises OSError for any error of that disk since `handle` was opened. Only where CAN_SYNC_ALL.
    """
    if _SYNCFS is None:
        raise OSError(errno.ENOSYS, "syncfs is not to be had here")
    if _SYNCFS(handle):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def start_writing(handle: int) -> None:
    """Start writing an open file's data to the disk, without waiting; only a hint, for speed.

    Only Linux has it (sync_file_range(2) with SYNC_FILE_RANGE_WRITE); elsewhere the fsync that follows does everything.
    """
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(handle, 0, 0, 2)


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Puts `data` at `path`, replacing what was there: a reader sees the old bytes or the new ones, also after a crash.

    The folder must exist; `mode` is the file's, less the umask. Raises OSError; the old file is then untouched and nothing is
    left in the same folder.
    """
    temporary = temporary_for(path)
    try:
        write_new(temporary, data, mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sha256_file(path: Path) -> str:
    """sha256 (hex) of the bytes at `path`, read in pieces; OSError if it can't be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file that another thread or process may remove at any moment; 0 if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def held_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, while a job may be writing in it."""
    return sum(size_of(Path(place) / name) for place, _, names in os.walk(folder) for name in names)
