"""Locks between processes. Each is an flock, which the kernel releases when its holder ends, however that ends.

It knows nothing of what a lock protects. `locked` removes its file; `held` and `held_if_free` keep theirs, for a file that
processes of other versions lock too. docs/design.md says why this is not the package filelock.
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
    """Hold a lock while the block runs, then remove its file.

    While another thread or process holds the lock, `wait` is called repeatedly; it sleeps, or raises to give up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquire_current(path, wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock while the block runs; waits for it without a limit. The file stays."""
    handle = acquire(path)
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def held_if_free(path: Path) -> Iterator[bool]:
    """Hold a lock while the block runs if it is free; yields whether it is held. The file stays."""
    handle = _open(path)
    try:
        yield try_lock(handle)
    finally:
        os.close(handle)


def acquire(path: Path) -> int:
    """The descriptor of a lock, which is held until the last process that inherits the descriptor has closed it."""
    handle = _open(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except BaseException:
        os.close(handle)
        raise
    return handle


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file; False if there is no such file.

    The question takes a shared lock for a moment, so that two who ask don't take each other for a holder.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def try_lock(file: int | IO[bytes]) -> bool:
    """Lock an open file until it is closed; False, at once, if another process or thread has its lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(file: int | IO[bytes]) -> None:
    """Release the lock of an open file before it is closed."""
    fcntl.flock(file, fcntl.LOCK_UN)


def _acquire_current(path: Path, wait: Callable[[], None]) -> int:
    """The descriptor of the lock on the file that has this name now."""
    while True:
        handle = _open(path)
        try:
            while not try_lock(handle):
                wait()
            # The previous holder has removed its file: this lock counts only if the name still leads to it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
