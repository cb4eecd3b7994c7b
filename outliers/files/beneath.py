"""Files below a folder that others write to as well: no link is followed, and only regular files of limited size are read.

Another writer can put a link, a pipe, a device, or a huge file where a small file is expected. A reader must neither wait for
it nor leave the folder through it, and a writer must not write through it. The folder itself is the user's choice and may be
a link. Keys are relative paths such as "a/b/c".
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from outliers.files.atomic import sync_handle, temporary_name

LISTED = 20_000
"""Names read of one folder. A folder of a store has a name for each model, or for each study of one model."""
REFUSED = (errno.ELOOP, errno.ENXIO, errno.EFBIG)
"""Error numbers of what must not be used: a link, not a regular file, too large a file."""

_LINK = "it is a symbolic link, which is not followed"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def read_beneath(root: Path, key: str, max_bytes: int) -> bytes:
    """The bytes of the regular file `key` below `root`, at most `max_bytes`.

    Raises FileNotFoundError or NotADirectoryError where nothing has that name, and OSError with an errno of REFUSED for a link on
    the way, for what is not a regular file, and for a larger one.
    """
    with open_beneath(root, key) as handle:
        data, size = bytearray(), os.fstat(handle).st_size
        while size <= max_bytes and (piece := os.read(handle, max_bytes + 1 - len(data))):
            data += piece
            size = max(size, len(data))
    if size > max_bytes:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, at most {max_bytes:,} are read", str(root / key))
    return bytes(data)


@contextlib.contextmanager
def open_beneath(root: Path, key: str) -> Iterator[int]:
    """The regular file `key` below `root`, open for reading while the block runs. Raises OSError as `read_beneath`."""
    *folders, name = _parts(key)
    path = str(root / key)
    with folder_beneath(root, folders) as folder:
        try:
            # non-blocking: a pipe without a writer opens at once
            handle = os.open(name, _READ, dir_fd=folder)
        except OSError as error:
            words = {errno.ELOOP: _LINK, errno.ENXIO: "it is not a regular file"}.get(error.errno or 0, error.strerror)
            raise OSError(error.errno, words, path) from error
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.ENXIO, f"it is {_kind(mode)}, not a regular file", path)
        yield handle
    finally:
        os.close(handle)


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISDIR, "a folder"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")


@contextlib.contextmanager
def folder_beneath(root: Path, parts: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """The folder of these steps below `root`, open while the block runs; `make`: create it if absent.

    Each step is opened from the one before it, so a link that is put there meanwhile is not followed either. Raises
    OSError, with ELOOP for a link.
    """
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in parts:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=handle)
            below = _open_step(name, handle)
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)


def _open_step(name: str, handle: int) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=handle)
    except OSError as error:
        # the error for a link depends on the other flags
        if _is_link(name, handle):
            raise OSError(errno.ELOOP, f"{_LINK} ({name})", name) from error
        raise


def _is_link(name: str, handle: int) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(name, dir_fd=handle).st_mode)
    except OSError:
        return False


def write_beneath(root: Path, key: str, data: bytes, *, replace: bool) -> None:
    """Put `data` at `key` below `root`, whole or not at all; missing folders are created.

    `replace`: what is there is replaced, a link itself and not what it names; else FileExistsError. The mode is that of the
    umask: an atlas in a shared folder is for others. Raises OSError as `folder_beneath`.
    """
    *folders, name = _parts(key)
    with folder_beneath(root, folders, make=True) as folder:
        temporary = temporary_name(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            handle = os.open(temporary, flags, 0o666, dir_fd=folder)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
            if replace:
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            else:
                os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
        sync_handle(folder)


def remove_beneath(root: Path, key: str) -> None:
    """Remove a file, if it is there, and the folders above it, below `root`, that become empty. Raises OSError."""
    *folders, name = _parts(key)
    try:
        with folder_beneath(root, folders) as folder:
            os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return
    with contextlib.suppress(OSError):  # stops at one that is not empty
        while folders:
            *folders, name = folders
            with folder_beneath(root, folders) as folder:
                os.rmdir(name, dir_fd=folder)


def _parts(key: str) -> list[str]:
    """The steps of a key; raises OSError for one that leads out of the folder."""
    parts = key.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise OSError(errno.EINVAL, "it is not a valid key")
    return parts
