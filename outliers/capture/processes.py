"""Several processes that read one capture, each with GPUs of its own: started, told what to read, and joined.

Each runs the model over disjoint, aligned batches of its own (`worker`) and writes their chunks into the one capture. This
process holds its lock, and alone writes its journal, so whatever is killed, the capture goes on like any other, with any
number of processes. They all end with this one, and it ends with the error of the first that fails.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from outliers.capture.channel import Share, Start, as_error
from outliers.errors import JobFailed, PlanRefused
from outliers.events.stream import Reporter
from outliers.hardware import total_ram_bytes
from outliers.locks import acquire, is_locked
from outliers.store.journal import Journal
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

WORKERS = "workers.lock"
"""In a capture that several processes read or have read: the lock that each of them holds for as long as it lives."""

COMMAND = (sys.executable, "-P", "-m", "outliers.capture.worker")
"""What a worker runs; the number of its pipe and this process's id follow."""

_Message = tuple[int, dict[str, Any] | None]


class _Process:
    """One worker and the thread that reads what it says into a queue; `None` at its end."""

    def __init__(
        self,
        place: tuple[int, int],
        command: Sequence[str],
        env: Mapping[str, str],
        lock: int,
        heard: queue.SimpleQueue[_Message],
    ) -> None:
        """place: its number from 0, and of how many."""
        number, of = place
        self.number, self.title, self.span, self.done = number, f"process {number + 1} of {of}", "", 0
        self.over = False
        self.result: dict[str, Any] | None = None
        reading, writing = os.pipe()
        try:
            self.process = subprocess.Popen(
                [*command, str(writing), str(os.getpid())],
                env={**os.environ, **env},
                stdin=subprocess.PIPE,
                # what libraries print is for the log
                stdout=sys.__stderr__,
                text=True,
                pass_fds=(writing, lock),
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        threading.Thread(target=self._listen, args=(reading, heard), daemon=True).start()

    def _listen(self, reading: int, heard: queue.SimpleQueue[_Message]) -> None:
        with os.fdopen(reading, "rb") as pipe:
            for line in pipe:
                if line.endswith(b"\n"):  # of one that was killed the last may be torn
                    heard.put((self.number, json.loads(line)))
        heard.put((self.number, None))

    def tell(self, line: str) -> None:
        """Give it one line. JobFailed where it is gone."""
        told: IO[str] | None = self.process.stdin
        try:
            if told is not None:
                told.write(line + "\n")
                told.flush()
        except BrokenPipeError as error:
            raise JobFailed(self.ended()) from error

    def dismiss(self) -> None:
        """Let it end: there is nothing for it to read."""
        self.over = True
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()

    def ended(self) -> str:
        """How it ended without having said why."""
        code = self.process.wait()
        what = f"{self.title}{f' (sequences {self.span})' if self.span else ''}"
        if code == -signal.SIGKILL:
            return (
                f"{what} was killed (signal 9), most likely because memory ran out: this machine has "
                f"{total_ram_bytes() / 1e9:.1f} GB of RAM; run the same again, with fewer --processes"
            )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{what} ended with {how}: its log says why"


class Team:
    """The processes of one call of `extract`, in a `with` block at whose end all of them are gone.

    Args:
        prepared: the study as each of them reads it
        workspace: of the capture, which the caller holds
        environments: the variables of each process
        reporter: gets their log, and what they have read together
        command: what each of them runs
    """

    def __init__(
        self,
        prepared: Prepared,
        workspace: Workspace,
        environments: Sequence[Mapping[str, str]],
        reporter: Reporter,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._command = command
        self._reporter = reporter
        self._heard: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._folder = workspace.capture(prepared.capture_id)
        self._start = Start(prepared=prepared, workspace=str(workspace.root)).model_dump_json()
        self._environments = environments
        self._all: list[_Process] = []
        self._ready: list[_Process] = []

    def __enter__(self) -> Team:
        lock = acquire(self._folder / WORKERS)
        try:
            for number, env in enumerate(self._environments):
                place = (number, len(self._environments))
                self._all.append(_Process(place, self._command, env, lock, self._heard))
        except BaseException:
            self._end()
            raise
        finally:
            os.close(lock)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for one in self._all:
            one.process.kill()
        for one in self._all:
            one.process.wait()
            one.dismiss()

    def gather(self, *, all_of_them: bool) -> int:
        """Wait until each has its devices; how many have.

        One whose GPUs are taken is left out, with a warning; with `all_of_them` that is an error, as where none is left.
        """
        for one in self._all:
            one.tell(self._start)
        ready: set[int] = set()
        refused = 0
        while len(ready) + refused < len(self._all):
            one, message = self._next()
            if message["kind"] == "ready":
                ready.add(one.number)
            elif message["kind"] == "failed":
                error = as_error(message)
                refused += 1
                if all_of_them or not isinstance(error, PlanRefused) or refused == len(self._all):
                    raise error
                self._reporter.log("warning", f"{one.title} is left out: {error}")
        self._ready = [one for one in self._all if one.number in ready]
        return len(self._ready)

    def read(self, shares: Sequence[Share | None], journal: Journal, tokens: int, already: int) -> list[dict[str, Any]]:
        """Give each a share (None: nothing) and journal what they finish, to the end; the results of those that read.

        tokens: of the whole call; already: those of them that were read before. Raises the error of the first that fails,
        and OSError of the journal.
        """
        readers = []
        for one, share in zip(self._ready, shares, strict=True):
            if share is None:
                one.dismiss()
                continue
            one.span = f"{share.span[0]}:{share.span[1]}"
            one.tell(share.model_dump_json())
            readers.append(one)
        while any(one.result is None for one in readers):
            one, message = self._next()
            if message["kind"] == "journal":
                journal.append(message["entries"])
            elif message["kind"] == "failed":
                self._reporter.log("error", f"{one.title} (sequences {one.span}) failed: {message['message']}")
                raise as_error(message)
            elif message["kind"] == "done":
                one.result = message["result"]
            elif message["kind"] == "progress":
                one.done = message["done"]
                so_far = already + sum(reader.done for reader in readers)
                self._reporter.progress("extract", min(so_far, tokens), tokens, "tokens")
        self._reporter.progress("extract", tokens, tokens, "tokens")
        return [one.result for one in readers if one.result is not None]

    def _next(self) -> tuple[_Process, dict[str, Any]]:
        """The next message that is not a line of a log. JobFailed where a process ended and had more to do."""
        while True:
            number, message = self._heard.get()
            one = self._all[number]
            if message is None:
                if not one.over:
                    raise JobFailed(one.ended())
            elif message["kind"] == "log":
                self._reporter.log(message["level"], f"{one.title}: {message['message']}")
            else:
                one.over = one.over or message["kind"] in ("done", "failed")
                return one, message


def await_earlier(folder: Path) -> None:
    """Return when no worker of an earlier run is left: one that was killed takes them along, a moment later."""
    if is_locked(folder / WORKERS):
        log.info("waiting for the processes of an earlier run of this capture to end")
        os.close(acquire(folder / WORKERS))
