"""The process that watches one detached job: the leader of a session of its own, with the command as its child.

`jobs.start` runs it as `python -m outliers.jobs.supervisor FOLDER LOCK_FD`. It writes what the command prints and a heartbeat
to events.jsonl, and how the command ended to exit.json. It imports nothing heavy, so that a job starts in a fraction of a
second.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from outliers.events.stream import EVENTS_VARIABLE, JsonReporter
from outliers.files.records import read_json, write_json
from outliers.jobs.jobs import HEARTBEAT_VARIABLE, JOB_VARIABLE, write_exit

_LINE_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1


def supervise(folder: Path, lock: int) -> None:
    """Run the job's command and write how it ended.

    `lock`: the inherited descriptor of the held lock. The extra environment comes over standard input.
    """
    if os.getpgrp() != os.getpid():
        os.setsid()
    # A cancel signals the whole group; this process survives it to write the end.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    reporter = JsonReporter(folder / "events.jsonl")
    try:
        child = _spawn_child(folder, lock, json.loads(sys.stdin.buffer.read()))
    except (OSError, ValueError) as error:
        kind, message = "JobFailed", f"the command can't be run: {error}"
        if isinstance(error, json.JSONDecodeError):
            kind, message = (
                "MachineLost",
                "the process that started the job ended before it had sent the environment; start the job again",
            )
        reporter.log("error", message)
        write_exit(folder, 127, None, {"kind": kind, "message": message})
        return
    write_json(folder / "started.json", {"pgid": os.getpgrp(), "child": child.pid, "started": time.time()})
    pump = threading.Thread(target=_pump, args=(child, reporter), daemon=True)
    pump.start()
    threading.Thread(target=_beat, args=(reporter,), daemon=True).start()
    code = child.wait()
    # A grandchild that lives on keeps the pipe open: don't wait for its lines.
    pump.join(timeout=5.0)
    reporter.close()
    write_exit(folder, code if code >= 0 else None, -code if code < 0 else None, read_json(folder / "error.json"))


def _spawn_child(folder: Path, lock: int, extra: dict[str, str]) -> subprocess.Popen[bytes]:
    record = read_json(folder / "job.json") or {}
    own = {EVENTS_VARIABLE: str(folder / "events.jsonl"), JOB_VARIABLE: str(folder)}
    # Otherwise Python holds back what a step prints until a block is full, and loses it in a crash.
    environment = {"PYTHONUNBUFFERED": "1", **os.environ, **extra, **own}
    return subprocess.Popen(
        record["argv"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # One pipe for both, so that a traceback appears where it happened.
        stderr=subprocess.STDOUT,
        pass_fds=(lock,),
        preexec_fn=end_with_parent(),
    )


def end_with_parent() -> Callable[[], None] | None:
    """What a child runs before its command (preexec_fn) to get SIGTERM when its parent dies; None on systems without prctl.

    Without it a command would outlive a killed supervisor, and no exit.json would be written.
    """
    return _signal_at_end_of(os.getpid())


def end_with(parent: int) -> None:
    """Let this process get SIGTERM when `parent`, which started it, dies; on systems with prctl."""
    ask = _signal_at_end_of(parent)
    if ask is not None:
        ask()


def _signal_at_end_of(parent: int) -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask_for_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return ask_for_signal


def _pump(child: subprocess.Popen[bytes], reporter: JsonReporter) -> None:
    """Write each line that the command prints as a log event; of a progress bar its last state."""
    pipe = child.stdout
    while pipe and (raw := pipe.readline(_LINE_BYTES)):
        reporter.log("info", raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2])


def _beat(reporter: JsonReporter) -> None:
    seconds = float(os.environ.get(HEARTBEAT_VARIABLE) or 5.0)
    while True:
        reporter.heartbeat()
        time.sleep(seconds)


def main() -> None:
    """Entry of `python -m outliers.jobs.supervisor FOLDER LOCK_FD`; its process group ends with it."""
    supervise(Path(sys.argv[1]), int(sys.argv[2]))
    # Workers that outlive their command would keep the lock and the GPU.
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
