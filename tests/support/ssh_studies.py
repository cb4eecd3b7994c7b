"""Whole studies over ssh for tests: the real command in processes of its own, beside one of the machines of `remote`.

A `Control` is this side: a workspace, an ssh configuration, a folder for temporary files; all that it started ends with
it. `World` holds what the tests of a file share: a tiny model, a text, a Prefect server.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.server.served import SEED
from outliers.events.stream import JsonReporter
from outliers.spec import StudySpec
from outliers.steps import run_analyze, run_extract, run_report
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.prefect_home import PrefectHome
from tests.support.ssh_machine import SshMachine

OUTLIERS = str(Path(sys.executable).with_name("outliers"))
SESSION = {"OUTLIERS_WATCHDOG_SECONDS": "0.5", "OUTLIERS_HEARTBEAT_SECONDS": "1"}
"""What sessions on a machine have besides: a watchdog that looks often."""
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
LIMIT = 600.0
"""Seconds in which anything that is waited for has happened, on the slowest computer."""


@dataclass(frozen=True)
class World:
    """What studies are of: a model of this side, and a text."""

    prefect: PrefectHome
    model: str
    text: Path

    def study(self, sequences: int, *more: str, model: str | None = None) -> list[str]:
        """The words of a study here; `Control.over` makes it one on a machine."""
        shape = ["--num-sequences", str(sequences), "--sequence-length", "64"]
        return ["study", "--model", model or self.model, "--corpus", str(self.text), *shape, *more]

    def digest(self, workspace: Path, sequences: int, **capture: Any) -> str:
        """The results_digest of the same study, made in this process: nothing between its steps can break."""
        corpus = {"source": str(self.text), "num_sequences": sequences, "sequence_length": 64}
        spec = StudySpec.model_validate({"model": self.model, "corpus": corpus, "capture": capture})
        place = open_workspace(workspace)
        study, reporter = prepare(spec, place), JsonReporter(workspace / "events.jsonl")
        run_extract(study, place, reporter)
        run_analyze(study, place, reporter)
        return str(run_report(study, place, reporter)["results_digest"])


def make_world(folder: Path, prefect: PrefectHome) -> World:
    """A model of 12 layers with a planted feature, and a text that no machine has."""
    model = tiny.make_model(
        folder / "model", "Llama", hidden_size=64, num_hidden_layers=12, max_position_embeddings=1024, dtype="bfloat16"
    )
    text = folder / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog; whoever counts its steps finds them even. " * 600)
    return World(prefect, model, text)


@pytest.fixture(scope="module")
def world(tmp_path_factory, prefect_home):
    """What the tests of a file share."""
    return make_world(tmp_path_factory.mktemp("world"), prefect_home)


@pytest.fixture
def control(tmp_path, host, world):
    """This side, to which the file's own fixture `host` is named."""
    with Control(tmp_path / "control", host, world.prefect) as side:
        side.add()
        yield side


class Command:
    """One run of the command, which ends with whoever started it; what it says goes to files."""

    def __init__(self, words: list[str], environment: dict[str, str], folder: Path) -> None:
        self.words = words
        self.out, self.err = folder / "stdout", folder / "stderr"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [OUTLIERS, *words],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            )

    @property
    def lines(self) -> list[str]:
        """Standard error so far, by lines."""
        return [line.rstrip() for line in self.err.read_text(errors="replace").splitlines()]

    @property
    def said(self) -> str:
        """Standard error so far, without the line breaks of a terminal."""
        return " ".join(self.err.read_text(errors="replace").split())

    def wait(self, seconds: float = LIMIT) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def answer(self) -> dict[str, Any]:
        """The JSON object of a study that ended well; fails with what was said."""
        assert self.wait() == 0, self.err.read_text(errors="replace")
        assert "Traceback" not in self.said, self.said
        found: dict[str, Any] = json.loads(self.out.read_text())
        return found

    def until(self, condition: Callable[[], object], what: str, poll_seconds: float = 0.02) -> None:
        """Wait for a condition while the command runs; fails with what it said where it ends before."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self.process.poll() is None, f"it ended before {what}: {self.err.read_text(errors='replace')}"
            assert time.monotonic() < deadline, f"waited in vain for {what}: {self.said}"
            time.sleep(poll_seconds)

    def signal(self, number: int) -> None:
        """Send a signal to the command alone; fails where it has ended."""
        assert self.process.poll() is None, f"it ended before signal {number}: {self.said}"
        self.process.send_signal(number)


class Control:
    """This side of studies on `host`, which it calls by the host's alias; a context manager."""

    def __init__(self, folder: Path, host: SshMachine | None, prefect: PrefectHome, **environment: str) -> None:
        self.folder = folder
        self.workspace = folder / "workspace"
        self.host = host
        # a socket's path has room for a hundred characters
        self.temporary = Path(tempfile.mkdtemp(prefix="o-", dir="/tmp"))
        kept = {
            name: value
            for name, value in os.environ.items()
            if name == SEED or not name.startswith(("AWS_", "PREFECT_", "OUTLIERS_", "HF_"))
        }
        self.environment = kept | {
            "OUTLIERS_WORKSPACE": str(self.workspace),
            "HF_HUB_OFFLINE": "1",
            "PREFECT_API_URL": prefect.api,
            "PREFECT_HOME": str(folder / "prefect"),
            "TMPDIR": str(self.temporary),
            "COLUMNS": "200",
            **environment,
        }
        if host is not None:
            self.environment["OUTLIERS_SSH_CONFIG"] = str(host.config)
        self._begun: list[Command] = []
        self._numbers = itertools.count()
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        for command in self._begun:
            if command.process.poll() is None:
                command.process.kill()
                command.process.wait()
        for socket in self.temporary.glob("outliers-ssh-*/*[!k]"):  # not the .lock beside it
            subprocess.run(["ssh", "-S", str(socket), "-O", "exit", "any"], capture_output=True, check=False)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def start(self, *words: str, **environment: str) -> Command:
        """Begin a command."""
        # two threads may begin one each: neither the folder's name nor the list's last is theirs alone
        place = self.folder / f"command-{next(self._numbers)}"
        place.mkdir()
        begun = Command(list(words), self.environment | environment, place)
        self._begun.append(begun)
        return begun

    def run(self, *words: str, **environment: str) -> Command:
        """A command, at its end."""
        command = self.start(*words, **environment)
        command.wait()
        return command

    def over(self, *more: str, machine: str = "m1") -> list[str]:
        """The options of a study on the host."""
        assert self.host is not None
        place = ["--provider", "ssh", "--host", self.host.alias, "--machine", machine]
        return [*place, "--upload-model", "--lease-seconds", "10", "--grace", "0", "--json", *more]

    def add(self) -> None:
        """Name the host, with the Python of these tests as one that has all that is needed."""
        assert self.host is not None
        done = self.run("machines", "add", self.host.alias, self.host.alias, "--python", sys.executable)
        assert done.wait() == 0, done.said

    def record(self, machine: str = "m1") -> Path:
        """Where this side has written down that it holds the machine."""
        return self.workspace / "machines" / f"{machine}.json"

    def records(self) -> list[str]:
        """The machines that this side holds, by its records."""
        return sorted(path.stem for path in (self.workspace / "machines").glob("*.json"))

    def manifest(self, study: str) -> dict[str, Any]:
        """The manifest of a study's results here."""
        found: dict[str, Any] = json.loads((self.workspace / "results" / study / "manifest.json").read_text())
        return found


def remote(host: SshMachine, machine: str = "m1") -> Path:
    """The workspace of a machine on the host, as this side sees it."""
    return host.home / ".outliers" / "machines" / machine


def attempts(host: SshMachine, step: str, machine: str = "m1") -> list[Path]:
    """The folders of every attempt at a step's job."""
    return sorted(remote(host, machine).glob(f"jobs/{step}-*/[0-9]*"))


def sequences_done(host: SshMachine, machine: str = "m1") -> int:
    """How many sequences the machine's journal has."""
    found = list(remote(host, machine).glob("captures/*/journal.jsonl"))
    return len(found[0].read_bytes().splitlines()) if found else 0


def ours(host: SshMachine, machine: str = "") -> list[str]:
    """Command lines of what runs on the host but sshd and its sessions; of one machine's workspace where it is named."""
    found = [line for _, line in host.processes() if not re.match(r"(\S*/)?sshd\b", line)]
    return [line for line in found if re.search(rf"/machines/{machine}\b(?!-)", line)] if machine else found


def gone(host: SshMachine, machine: str = "", seconds: float = 30.0) -> bool:
    """Whether nothing of ours runs there any more, at the latest after `seconds`."""
    return settled(lambda: not ours(host, machine), seconds)


def freeze(command: Command, host: SshMachine, machine: str = "m1", *, at: int = 1) -> list[int]:
    """Stop the process that extracts once `at` sequences are journaled: the middle lasts until `thaw`."""
    command.until(lambda: sequences_done(host, machine) >= at, f"{at} sequences", 0.005)
    mark = re.compile(rf"-m outliers extract \S*/machines/{machine}/")
    pids = [host.host_pid(pid) for pid, line in host.processes() if mark.search(line)]
    assert pids, host.processes()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    # a thread that waits for the disk stops when that has answered, and may have journaled a sequence
    processes = [psutil.Process(pid) for pid in pids]
    command.until(lambda: all(one.status() == psutil.STATUS_STOPPED for one in processes), "the stop", 0.01)
    return pids


def thaw(pids: list[int]) -> None:
    """Let it go on."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def settled(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
