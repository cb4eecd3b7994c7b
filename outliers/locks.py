"""Locks between processes: an flock, which ends with its holder, however that ends.

It knows nothing of what is held. Before it: whoever must be alone at something.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path


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


def _take(path: Path, wait: Callable[[], None]) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while not _has_taken(handle):
                wait()
            # who had it has removed the file: what was waited for is nobody's lock any more
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _has_taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds an flock on a file, which ends with it; False where there is no file.

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
