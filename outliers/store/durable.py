"""Writes files of a capture whole, many at a time, and waits until the disk has them before the journal names them.

A file is written under a temporary name and renamed, so that a killed process leaves the old file or the new one; waiting
protects against a power cut. Knows bytes and paths, nothing of their content.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from outliers.errors import CaptureError
from outliers.files.atomic import (
    CAN_SYNC_ALL,
    NO_ROOM,
    start_writing,
    sync_all,
    sync_folder,
    unfinished_name,
    write_all,
)

MOST_UNSYNCED = 64
"""Files of one batch that are open at once, where each file is waited for. A process may have 1,024 files open by default."""

_LEFTOVER = re.compile(r"\.(c(\.\d+){4}|zarr\.json|\d+)\.tmp")
"""Names of files that `write_durably` was writing when the process was killed."""


class Unsynced:
    """Files of one batch below `folder` that may not be on the disk yet; `sync` waits until they and their names are.

    The disk writes them while the next ones are prepared. If the kernel can wait for a whole file system and report its
    errors (Linux from 5.8), a batch takes one wait; otherwise each file is kept open and waited for. Waiting for each file as
    it is written was 2.5 times slower, and each wait slowed the model too (docs/performance.md). Several threads use it; it
    must be made before the first file is written, so that it sees every error.
    """

    def __init__(self, folder: Path, *, whole: bool = CAN_SYNC_ALL, most: int = MOST_UNSYNCED) -> None:
        self._folder = folder
        self._most = most
        self._disk = os.open(folder, os.O_RDONLY | os.O_DIRECTORY) if whole else None
        self._files: list[tuple[str, int]] = []
        self._folders: set[str] = set()
        self._lock = threading.Lock()

    def add(self, path: str, handle: int) -> None:
        """Take over an open file that was written; where many are open, wait for the older ones."""
        if self._disk is not None:
            os.close(handle)
            return
        with self._lock:
            self._folders.add(os.path.dirname(path))
            self._files.append((path, handle))
            if len(self._files) <= self._most:
                return
            old, self._files = self._files[: self._most // 2], self._files[self._most // 2 :]
        _wait_for(old)

    def sync(self) -> None:
        """Return when the disk has all of them; once, at the end. Raises as `write_durably` does."""
        with self._lock:
            old, self._files = self._files, []
            disk, self._disk = self._disk, None
        if disk is not None:
            try:
                with _named_errors(str(self._folder)):
                    sync_all(disk)
            finally:
                os.close(disk)
        _wait_for(old)
        for folder in sorted(self._folders):
            with _named_errors(folder):
                sync_folder(Path(folder))

    def __del__(self) -> None:
        # of a batch that was given up
        handles = [handle for _, handle in getattr(self, "_files", ())]
        for handle in (getattr(self, "_disk", None), *handles):
            if handle is not None:
                os.close(handle)


def _wait_for(files: list[tuple[str, int]]) -> None:
    try:
        while files:
            path, handle = files[0]
            with _named_errors(path):
                os.fsync(handle)
            files.pop(0)
            os.close(handle)
    finally:
        for _, handle in files:
            os.close(handle)


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole: temporary name, fsync, rename. Its folder is for the caller to sync.

    Raises OSError where the disk is full or read-only, CaptureError where it can't be written for another reason.
    """
    name = str(path)
    with _named_errors(name):
        handle = _write(name, content)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(_temporary(name), name)


def write_soon(path: str, content: bytes | memoryview, unsynced: Unsynced) -> None:
    """Write a file whole under its name, to be waited for with `unsynced`. Raises as `write_durably` does.

    After a power cut it may be there without its bytes: nothing must name it before `unsynced` was waited for. Paths are
    plain text here: this is done for every chunk, by threads that the model's own thread has to wait for while they
    are in Python.
    """
    with _named_errors(path):
        handle = _write(path, content)
        try:
            start_writing(handle)
            os.replace(_temporary(path), path)
        except BaseException:
            os.close(handle)
            raise
    unsynced.add(path, handle)


def _temporary(path: str) -> str:
    folder, name = os.path.split(path)
    return f"{folder}/.{name}.tmp"


def _write(path: str, content: bytes | memoryview) -> int:
    """Write the bytes under the temporary name of `path`; returns the open handle."""
    handle = os.open(_temporary(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(handle, content)
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Raise errors of writing a file as CaptureError with its name; errors of a full disk stay OSError."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(_temporary(path))
        if error.errno in NO_ROOM:
            raise
        raise CaptureError(
            f"{path} can't be written ({error.strerror}): check this path and the disk; journaled sequences stay valid"
        ) from error


def drop_leftovers(folder: Path, arrays: str) -> None:
    """Remove files that were unfinished when a process was killed; only files of this program.

    arrays: name of the folder whose subfolders are searched.
    """
    for path in folder.iterdir():
        if unfinished_name(path.name) is not None:
            path.unlink()
    for place, _, names in os.walk(folder / arrays):
        for name in names:
            if is_leftover(name):
                (Path(place) / name).unlink()


def is_leftover(name: str) -> bool:
    """Whether this is the name of a file that `write_durably` did not finish."""
    return _LEFTOVER.fullmatch(name) is not None
