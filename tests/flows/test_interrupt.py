"""Ctrl-C ends a process in time, whatever its main thread does; a step's progress waits for no server."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.cli import interrupt
from tasks.progress import CLOSE_SECONDS, TaskReporter
from tests.support.s3 import free_ports

ROOT = Path(__file__).resolve().parents[2]
START = "import hashlib, signal, sys, time\nfrom flows.cli import interrupt\n"

RETRIES = """
with interrupt.bounded():
    interrupt.before_end(lambda: print('last', flush=True))
    interrupt.before_end(lambda: time.sleep(60))
    print('ready', flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print('heard', flush=True)
"""
DEAF = RETRIES.replace("    print('ready'", "    signal.signal(signal.SIGINT, lambda *_: None)\n    print('ready'")
BUSY = """
with interrupt.bounded():
    print('ready', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'x', b'y', 1_000_000_000)  # minutes in C, in which no handler of Python runs
"""
AFTER = """
try:
    with interrupt.bounded():
        print('ready', flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    time.sleep(60)  # what is done at the end of the process
"""
FAILS = """
import threading
try:
    with interrupt.bounded():
        print('ready', flush=True)
        threading.Timer(0.2, interrupt.fail, ['the server is gone']).start()
        time.sleep(60)
except KeyboardInterrupt:
    print('reason', interrupt.reason(), flush=True)
    time.sleep(60)
"""
WELL = """
with interrupt.bounded():
    print('ready', flush=True)
    time.sleep(0.5)
time.sleep(1)
print('done', flush=True)
"""


def start(code):
    process = subprocess.Popen(
        [sys.executable, "-c", START + code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("code", [RETRIES, DEAF, BUSY, AFTER], ids=["retries", "deaf", "busy", "after"])
@pytest.mark.parametrize("signals", [1, pytest.param(3, marks=pytest.mark.studies)])
def test_ctrl_c_ends_a_process_in_time(code, signals):
    with start(code) as process:
        time.sleep(0.5)  # it is in the call that it has announced
        began = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        out, err = process.communicate(timeout=60)
        took = time.monotonic() - began
    assert (process.returncode, err) == (130, interrupt.SAID + "\n")
    assert took < interrupt.END_SECONDS + 15
    assert ("last" in out) == ("before_end" in code)


def test_an_error_ends_it_as_ctrl_c_does_with_its_own_words():
    with start(FAILS) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (1, "reason the server is gone\n", "failed: the server is gone\n")


def test_a_process_that_ends_well_is_left_alone():
    with start(WELL) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "done\n", "")


# Progress


@pytest.mark.parametrize("dead", ["silent", "refusing"])
def test_a_step_is_not_held_up_by_the_server_of_its_progress(dead):
    """One server takes connections and never answers, the other is not there."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1] if dead == "silent" else free_ports(1)[0]
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}), disable_run_logger():
            reporter = TaskReporter("model 1x1", "0123456789abcdef", artifact_seconds=0.01)
            began = time.monotonic()
            for done in range(2000):
                reporter.progress("extract", done, 2000, "sequences")
            assert time.monotonic() - began < 2
            if dead == "refusing":
                time.sleep(1)
            began = time.monotonic()
            reporter.close()
            assert time.monotonic() - began < CLOSE_SECONDS + 2
