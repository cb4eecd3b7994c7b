"""Locks between processes: an flock, which ends with its holder, however that ends.

`locked` is for a lock whose file goes with it and that is waited for with a callback; `hold` for a lock whose file stays;
`try_lock` for one that is not waited for. Nothing here knows what a lock protects.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock while the block runs. `wait` is called again and again while another thread or process has it, and ends
    that by raising. It is an flock, so it ends with its holder, and its file goes with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(path, wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made if it is missing and stays, while the block runs; other threads and processes
    wait. Raises OSError where the file can't be opened."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(file: int | IO[bytes]) -> bool:
    """Lock an open file until it is closed; False, at once, where another thread or process has its lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(file: int | IO[bytes]) -> None:
    """Give up the lock of an open file before it is closed."""
    fcntl.flock(file, fcntl.LOCK_UN)


def _take(path: Path, wait: Callable[[], None]) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while not try_lock(handle):
                wait()
            # the holder removes the file when it ends: a lock on a removed file protects nothing
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a process holds an flock on a file, which ends with the process; False where the file does not exist.

    Asked with a shared lock: those who ask don't see one another.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
