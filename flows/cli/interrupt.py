"""Ctrl-C ends a command within seconds, whatever the command is doing.

A command handles Ctrl-C in the exception that it raises: the job ends, a machine is given back. Then Prefect reports to its
server, and waits for minutes where that does not answer; a library may be in a long call. So a thread counts from the signal
on, and ends the process when the time is over: the journal loses nothing by that, the job has been ended, and the command's
server ends with it. Knows no Prefect.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

END_SECONDS = 4.5
"""From Ctrl-C to the end of the process, where everything is on this computer."""
REMOTE_SECONDS = 45.0
"""The same where a machine elsewhere is given back first: it may cost money, so the request gets time to be answered."""
LAST_SECONDS = 1.5
"""Before the end, for what `before_end` was given."""
INTERRUPTED = 130
SAID = "interrupted: the same command goes on where this one stopped"


class _Ending:
    """How the end of this process goes: there is one process, and so one end of it."""

    def __init__(self) -> None:
        self.seconds = END_SECONDS
        self.reason = ""
        self.acts: list[Callable[[], None]] = []
        self.begun = threading.Event()
        self.lock = threading.Lock()


_ENDING = _Ending()


def reason() -> str:
    """Why the command was ended, where it was not Ctrl-C; else empty."""
    return _ENDING.reason


def allow(seconds: float) -> None:
    """Let the end take `seconds` from now on."""
    _ENDING.seconds = seconds


def before_end(act: Callable[[], None]) -> None:
    """Call `act` once, in a thread, shortly before the process is ended: it ends what must not outlive the process."""
    _ENDING.acts.append(act)


def fail(text: str) -> None:
    """End the command as Ctrl-C does, with this error instead. Called in any thread."""
    _ENDING.reason = _ENDING.reason or text
    _begin()
    os.kill(os.getpid(), signal.SIGINT)


@contextlib.contextmanager
def bounded(seconds: float = END_SECONDS) -> Iterator[None]:
    """In the block, and in what follows an interrupted one, Ctrl-C ends the process in time. For the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    allow(seconds)
    listening, telling = os.pipe()
    os.set_blocking(telling, False)
    # the C handler writes to it, also while the main thread is in a long call of a library
    before = signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(listening,), name="interrupt", daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        # the end is certain: another Ctrl-C would only break off what happens until then
        if _ENDING.begun.wait(1.0):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
    finally:
        signal.set_wakeup_fd(before)
        os.close(telling)


def _listen(pipe: int) -> None:
    with open(pipe, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] == signal.SIGINT:
                _begin()


def _begin() -> None:
    """Start the count, once."""
    with _ENDING.lock:
        if _ENDING.begun.is_set():
            return
        _ENDING.begun.set()
    threading.Thread(target=_count, args=(time.monotonic(),), name="ending", daemon=True).start()


def _count(began: float) -> None:
    while (left := began + _ENDING.seconds - LAST_SECONDS - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
    last = threading.Thread(target=_end_all, name="last", daemon=True)
    last.start()
    last.join(LAST_SECONDS)
    said = f"failed: {_ENDING.reason}" if _ENDING.reason else SAID
    with contextlib.suppress(OSError):
        # a terminal whose cursor a progress bar has hidden gets it back
        os.write(2, (("\x1b[?25h\r" if os.isatty(2) else "") + said + "\n").encode())
    os._exit(1 if _ENDING.reason else INTERRUPTED)


def _end_all() -> None:
    for act in _ENDING.acts.copy():
        # the process ends whatever this raises
        with contextlib.suppress(Exception):
            act()
