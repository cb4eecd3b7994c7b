"""The pipes of a process that talks to a host, read with a limit of bytes and of time.

`Popen.communicate` would keep everything that comes. Knows no ssh.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from outliers.untrusted.bounds import ANSWER_BYTES, LINE_BYTES, STDERR_BYTES

_CHUNK = 1 << 16


class TooMuch(Exception):
    """More came than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"more than {limit:,} bytes")
        self.limit = limit


class Silence(Exception):
    """No whole line came in time."""


@dataclass(frozen=True, slots=True)
class Line:
    """`data`: a line with its line feed; of one that is longer than LINE_BYTES the beginning, without. `size`: bytes of the
    stream since the line before, passed over ones included."""

    data: bytes
    size: int


def exchange(
    process: subprocess.Popen[bytes],
    stdin: bytes,
    seconds: float,
    limit: int = ANSWER_BYTES,
    sink: IO[bytes] | None = None,
) -> tuple[bytes, bytes]:
    """What a process says to its end, on standard output and standard error, given `stdin`.

    With `sink` standard output goes there. Raises TooMuch for more than `limit` bytes on standard output or ANSWER_BYTES on
    the other, subprocess.TimeoutExpired after `seconds`. The process is not ended by this.
    """
    deadline = time.monotonic() + seconds
    said: dict[str, list[bytes]] = {"out": [], "err": []}
    room = {"out": limit, "err": ANSWER_BYTES}
    with selectors.DefaultSelector() as selector:
        for name, pipe in (("out", process.stdout), ("err", process.stderr)):
            if pipe is not None:
                selector.register(pipe, selectors.EVENT_READ, name)
        rest = memoryview(stdin)
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE, "in")
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(process.args, seconds)
            for key, _ in selector.select(left):
                if key.data == "in":
                    rest = _feed(key.fd, rest)
                    if not rest:
                        selector.unregister(key.fileobj)
                        _close(process.stdin)
                    continue
                data = os.read(key.fd, _CHUNK)
                if not data:
                    selector.unregister(key.fileobj)
                    continue
                room[key.data] -= len(data)
                if room[key.data] < 0:
                    raise TooMuch(limit if key.data == "out" else ANSWER_BYTES)
                if key.data == "out" and sink is not None:
                    sink.write(data)
                else:
                    said[key.data].append(data)
    process.wait(max(0.0, deadline - time.monotonic()))
    return b"".join(said["out"]), b"".join(said["err"])


def read_lines(process: subprocess.Popen[bytes], silence_seconds: float, errors: list[bytes]) -> Iterator[Line]:
    """Each line of a process's standard output as it comes; into `errors` goes the end of its standard error.

    Of a line longer than LINE_BYTES the beginning comes as one, and the stream goes on behind its end. Raises Silence where
    no whole line has come for `silence_seconds`, whatever else has.
    """
    if process.stdout is None or process.stderr is None:
        return
    rest, passed, skipping = b"", 0, False
    deadline = time.monotonic() + silence_seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, "out")
        selector.register(process.stderr, selectors.EVENT_READ, "err")
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise Silence
            for key, _ in selector.select(left):
                data = os.read(key.fd, _CHUNK)
                if not data:
                    selector.unregister(key.fileobj)
                    continue
                if key.data == "err":
                    errors[:] = [(b"".join(errors) + data)[-STDERR_BYTES:]]
                    continue
                if skipping:
                    end = data.find(b"\n") + 1
                    passed += end or len(data)
                    skipping = not end
                    data = data[end:] if end else b""
                *whole, rest = (rest + data).split(b"\n")
                for line in whole:
                    yield Line(line + b"\n", passed + len(line) + 1)
                    passed = 0
                if len(rest) > LINE_BYTES:
                    yield Line(rest[:LINE_BYTES], passed + len(rest))
                    rest, passed, skipping = b"", 0, True
                elif not whole:
                    continue
                # the reader of the lines may have been busy meanwhile
                deadline = time.monotonic() + silence_seconds


def _feed(descriptor: int, data: memoryview) -> memoryview:
    """Write as much as the pipe takes; returns the rest of `data`. A process that reads no more takes nothing."""
    try:
        return data[os.write(descriptor, data[:_CHUNK]) :] if data else data
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(OSError):
            pipe.close()
