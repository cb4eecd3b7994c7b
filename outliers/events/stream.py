"""What a step reports while it runs: log lines, progress and heartbeats, as a stream of events.

A step talks to a `Reporter` and does not know who listens: a terminal (ConsoleReporter), or the file of a detached job
(JsonReporter), with one JSON object a line, which `read` follows from a byte offset.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol, TextIO

from outliers.events.event import LEVELS, Event, Level
from outliers.units import format_progress
from outliers.untrusted.bounds import LINE_BYTES, MESSAGE_CHARS
from outliers.untrusted.visible import cut

EVENTS_VARIABLE = "OUTLIERS_EVENTS"
"""Environment variable with the file that a detached step appends its events to."""

_JSON_PROGRESS_SECONDS = 0.2
_CONSOLE_PROGRESS_SECONDS = 1.0
_CHUNK_BYTES = 1 << 20
_TAIL_BYTES = 1 << 16
_BAR_CELLS = 24


class Reporter(Protocol):
    """Receives what a step reports. Both calls are cheap, may come from any thread, and never fail the step."""

    def log(self, level: Level, message: str) -> None:
        """One message for a person."""

    def progress(self, step: str, done: int, total: int | None, unit: str) -> None:
        """`done` of `total` (None: unknown) `unit` of `step`; calls may be thinned out, the one at the end is kept."""


class Lines:
    """A Reporter that passes messages to a logger and drops progress, for work of a few seconds."""

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._logger = logger

    def log(self, level: Level, message: str) -> None:
        self._logger.log(LEVELS[level], "%s", message)

    def progress(self, step: str, done: int, total: int | None, unit: str) -> None:
        """Nothing."""


class _Pace:
    """Lets at most one progress a step through in `seconds`, and each that completes its step."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock = seconds, clock
        self._last: dict[str, float] = {}

    def due(self, step: str, done: int, total: int | None) -> bool:
        now = self._clock()
        if done != total and now - self._last.get(step, float("-inf")) < self._seconds:
            return False
        self._last[step] = now
        return True


class JsonReporter:
    """Appends each event to `path` as one line, in one write with O_APPEND: writers in several processes don't mix.

    Raises OSError if the file can't be opened. A write that fails later (a full disk) drops that event, not the step;
    the next one that can be written says how many were dropped.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._pace = _Pace(_JSON_PROGRESS_SECONDS, time.monotonic)
        self._lock = threading.Lock()
        self._torn = False
        self._dropped = 0

    def log(self, level: Level, message: str) -> None:
        self.write("log", level=level, message=cut(message, MESSAGE_CHARS))

    def progress(self, step: str, done: int, total: int | None, unit: str) -> None:
        with self._lock:
            due = self._pace.due(step, done, total)
        if due:
            self.write("progress", step=step, done=done, total=total, unit=unit)

    def heartbeat(self) -> None:
        """Report that the writer is alive."""
        self.write("heartbeat")

    def write(self, kind: str, **fields: Any) -> None:
        """Appends one event of any kind, with the time of now."""
        with self._lock:
            if self._dropped:
                message = f"{self._dropped} events before this one could not be written (is the disk full?)"
                note = {"t": time.time(), "kind": "log", "level": "warning", "message": message}
                if not self._append(note):
                    self._dropped += 1
                    return
                self._dropped = 0
            if not self._append({"t": time.time(), "kind": kind, **fields}):
                self._dropped += 1

    def close(self) -> None:
        """Closes the file; events after this are dropped."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, event: dict[str, Any]) -> bool:
        line = json.dumps(event, default=str).encode() + b"\n"
        # A full disk cuts a write short and leaves half a line: the next event begins a new line.
        data = b"\n" + line if self._torn else line
        try:
            written = os.write(self._descriptor, data)
        except OSError:
            return False
        self._torn = written < len(data)
        return not self._torn


class ConsoleReporter:
    """Lines for a person on `stream` (standard error); on a terminal progress is one bar that is redrawn.

    Progress is shown at most once a second a step, with the rate and the time left since its first call in this
    process: what an earlier run had done does not count as speed.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._pace = _Pace(_CONSOLE_PROGRESS_SECONDS, clock)
        self._begun: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()
        self._bar_open = False

    def log(self, level: Level, message: str) -> None:
        if level == "debug":
            return
        with self._lock:
            self._print(message if level == "info" else f"{level}: {message}")

    def progress(self, step: str, done: int, total: int | None, unit: str) -> None:
        with self._lock:
            if not self._pace.due(step, done, total):
                return
            started, done_before = self._begun.setdefault(step, (self._clock(), done))
            text = progress_line(step, done, total, unit, done - done_before, self._clock() - started)
            if self._stream.isatty():
                self._print(text, bar=done != total)
            else:
                self._print(text)

    def _print(self, text: str, bar: bool = False) -> None:
        lead = "\r\x1b[K" if self._bar_open else ""
        self._stream.write(f"{lead}{text}" if bar else f"{lead}{text}\n")
        self._stream.flush()
        self._bar_open = bar


def progress_line(step: str, done: int, total: int | None, unit: str, gained: int, seconds: float) -> str:
    """One line: step, bar, done of total, and the rate and time left, if `gained` in `seconds` gives them."""
    if not total:
        parts = [step, format_progress(done, unit)]
    else:
        filled = min(_BAR_CELLS, _BAR_CELLS * done // total)
        bar = "#" * filled + "." * (_BAR_CELLS - filled)
        parts = [
            step,
            f"[{bar}]",
            f"{100 * done // total:3d}%",
            f"{format_progress(done, unit)} of {format_progress(total, unit)}",
        ]
    if gained > 0 and seconds > 0:
        rate = gained / seconds
        parts.append(f"{format_progress(rate, unit)}/s")
        if total and done < total:
            minutes, rest = divmod(round((total - done) / rate), 60)
            hours, minutes = divmod(minutes, 60)
            parts.append(f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left")
    return "  ".join(parts)


def reporter_from_environment() -> Reporter:
    """The file that $OUTLIERS_EVENTS names, else standard error; raises OSError if that file can't be opened."""
    path = os.environ.get(EVENTS_VARIABLE)
    return JsonReporter(path) if path else ConsoleReporter()


class ReporterHandler(logging.Handler):
    """Sends log records to a Reporter, tracebacks included."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        level: Level = "debug"
        if record.levelno >= logging.ERROR:
            level = "error"
        elif record.levelno >= logging.WARNING:
            level = "warning"
        elif record.levelno >= logging.INFO:
            level = "info"
        self._reporter.log(level, self.format(record))


def send_logs_to(reporter: Reporter, logger_name: str = "outliers") -> ReporterHandler:
    """The logger's records from INFO up go to `reporter`, and no longer to the root logger; replaces an earlier one."""
    logger = logging.getLogger(logger_name)
    for earlier in [known for known in logger.handlers if isinstance(known, ReporterHandler)]:
        logger.removeHandler(earlier)
    handler = ReporterHandler(reporter)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return handler


def parse_line(line: bytes, end: int) -> list[Event]:
    """The event of one whole line, which ends at byte `end`; any other line becomes a warning that shows it: none is lost.

    The line may come from a machine that was taken over. Raises nothing.
    """
    from outliers.events import lines as event_lines  # imports pydantic, too slow for a process that only writes

    return event_lines.parse_line(line, end)


def read(path: Path, offset: int = 0, chunk_bytes: int = _CHUNK_BYTES) -> tuple[list[Event], int]:
    """The events of whole lines from byte `offset` on, and the offset to go on from; an absent file has none.

    About `chunk_bytes` at a time: call again until it gives nothing. A last line that is still being written, or was
    torn by a kill, is left for the next call. Of one longer than LINE_BYTES the beginning becomes a warning, and the rest of
    it is passed over.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(chunk_bytes)
            while data and b"\n" not in data and len(data) <= LINE_BYTES and (more := file.read(chunk_bytes)):
                data += more
            if b"\n" not in data and len(data) > LINE_BYTES:
                end = offset + len(data) + _pass_line(file)
                return parse_line(data, end), end
    except FileNotFoundError:
        return [], offset
    events: list[Event] = []
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        offset += len(line)
        if line.strip():
            events += parse_line(line, offset)
    return events, offset


def _pass_line(file: IO[bytes]) -> int:
    """Bytes up to the end of the line that a file stands in, or of the file; they are passed over."""
    passed = 0
    while data := file.read(_CHUNK_BYTES):
        if end := data.find(b"\n") + 1:
            return passed + end
        passed += len(data)
    return passed


def read_tail(path: Path) -> list[Event]:
    """The whole events among the last 64 KiB of the stream."""
    size = path.stat().st_size if path.exists() else 0
    found, _ = read(path, max(0, size - _TAIL_BYTES), _TAIL_BYTES)
    # The first of a tail is the rest of a line, unless the tail is the whole file.
    return found[1:] if size > _TAIL_BYTES else found
