"""One host over ssh for tests of provider `ssh`: fixtures that they import by name, a look at it, and a wait.

`box` is the host, with watchdogs and heartbeats that are fast; `source` the provider that knows it as `lab1`, with the
Python of these tests as one that has all that is needed. `shared` is such a host for a whole file, and `machine` the one
that is held on it.
"""

from __future__ import annotations

import sys
import time

import pytest

from outliers.machines import remote
from outliers.machines.base import MachineRequest
from outliers.machines.connection import CONFIG_VARIABLE
from outliers.machines.ssh import Host, Hosts, SshProvider
from tests.support.remote import Sshd

FAST = {"OUTLIERS_WATCHDOG_SECONDS": "0.2", "OUTLIERS_HEARTBEAT_SECONDS": "0.3"}


@pytest.fixture
def box(tmp_path, monkeypatch):
    with Sshd(tmp_path / "a box", environment=FAST) as machine:
        monkeypatch.setenv(CONFIG_VARIABLE, str(machine.config))
        monkeypatch.setenv(remote.PATIENCE_VARIABLE, "20")
        yield machine


@pytest.fixture
def workspace(tmp_path):
    return tmp_path / "work space"


@pytest.fixture
def source(box, workspace):
    Hosts(workspace).add(Host("lab1", "box", python=sys.executable, price_per_hour=2.5))
    return SshProvider(workspace)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A host and a machine on it, for all tests that leave both as they were."""
    folder = tmp_path_factory.mktemp("shared")
    with Sshd(folder / "a box", environment=FAST) as box, pytest.MonkeyPatch.context() as patch:
        patch.setenv(CONFIG_VARIABLE, str(box.config))
        Hosts(folder / "work space").add(Host("lab1", "box", python=sys.executable))
        source = SshProvider(folder / "work space")
        box.machine = source.ensure("m1", MachineRequest(lease_seconds=900), "run-1", "a study")
        yield box


@pytest.fixture
def machine(shared, monkeypatch):
    monkeypatch.setenv(remote.PATIENCE_VARIABLE, "20")
    return shared.machine


def running(box, text):
    return [command for _, command in box.processes() if text in command and "sshd" not in command]


def until(condition, seconds=30):
    """What a condition says once it says something."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value
