"""Detached jobs in tests: a workspace that none outlives, a command of Python, and what a job's folder says.

`test_jobs` and `test_jobs_killed` import the fixture by name.
"""

import json
import sys
import time

import psutil
import pytest

from outliers.jobs import jobs


@pytest.fixture
def workspace(tmp_path):
    """A workspace of which no job outlives the test."""
    yield tmp_path
    for folder in tmp_path.glob("jobs/*/[0-9]*"):
        jobs.cancel(folder, grace_seconds=0)


def python(code, name="step", **env):
    return jobs.JobSpec(name, (sys.executable, "-c", code), env)


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value


def content(path):
    """The file's text once it is there and not empty."""
    return until(lambda: path.exists() and path.read_text())


def alive(pid):
    """A zombie is dead: the first process of a container may never reap it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def lines(folder):
    return [event.message for event in jobs.follow(folder, poll_seconds=0.01) if event.kind == "log"]


def started(folder):
    return json.loads((folder / "started.json").read_text())
