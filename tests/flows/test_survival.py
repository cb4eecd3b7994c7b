"""The command's own Prefect server dies in the middle of a step: the study goes on, or ends in words; Ctrl-C always ends it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from outliers.files.records import read_json
from outliers.jobs import jobs
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.flows.test_reach import Recorder
from tests.support import tiny
from tests.support.held_job import until

pytestmark = pytest.mark.servers

ROOT = Path(__file__).resolve().parents[2]
ENDS_SECONDS = 20.0
"""The command's own bound is 5 s; a machine that many share is late."""


class Command:
    """`outliers study` of a tiny model, whose extraction can be held in its middle."""

    def __init__(self, folder: Path) -> None:
        model = tiny.make_model(
            folder / "model", "Llama", hidden_size=64, num_hidden_layers=8, max_position_embeddings=2048
        )
        self.workspace = open_workspace(folder / "workspace")
        corpus = {"source": "builtin:python-docs", "num_sequences": 60, "sequence_length": 256}
        self.spec = folder / "spec.json"
        self.spec.write_text(json.dumps({"model": model, "corpus": corpus}))
        self.prepared = prepare(StudySpec.model_validate_json(self.spec.read_text()), self.workspace)
        self.journal = self.workspace.capture(self.prepared.capture_id) / "journal.jsonl"
        self.said = folder / "said"

    @contextlib.contextmanager
    def runs(self, **environment: str):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
        argv = [
            sys.executable,
            "-m",
            "flows.cli",
            "study",
            "--spec",
            str(self.spec),
            "--workspace",
            str(self.workspace.root),
        ]
        with self.said.open("wb") as said:
            process = subprocess.Popen(
                argv,
                env=kept | {"PREFECT_HOME": str(self.workspace.root / "prefect"), **environment},
                cwd=ROOT,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def text(self) -> str:
        return self.said.read_text(errors="replace")

    def server(self, process: subprocess.Popen) -> psutil.Process | None:
        """The Prefect server of a command that lives."""
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error):
                if "flows.server.served" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                    return child
        return None

    def at_work(self, process: subprocess.Popen) -> psutil.Process:
        """The extraction, stopped once something of it is journaled."""

        def begun():
            assert process.poll() is None, self.text()
            return self.journal.exists() and self.journal.stat().st_size

        until(begun, "a journaled sequence", 240, poll_seconds=0.002)
        job = jobs.newest(self.workspace.root, f"extract-{self.prepared.capture_id}")
        child = psutil.Process(read_json(job.folder / "started.json")["child"])
        child.suspend()
        return child


@pytest.fixture
def command(tmp_path):
    made = Command(tmp_path)
    yield made
    for handle in jobs.running(made.workspace.root):
        jobs.cancel(handle.folder, 0.1)


def no_job_is_left(command):
    return not jobs.running(command.workspace.root)


@pytest.mark.studies
def test_a_server_that_dies_is_started_again_and_the_study_goes_on(command):
    """All of it behind a proxy that the shell names for the rest of the world: nothing of it goes there."""
    with (
        Recorder() as proxy,
        command.runs(HTTP_PROXY=proxy.url, ALL_PROXY=proxy.url, NO_PROXY="example.org") as process,
    ):
        work = command.at_work(process)
        server = command.server(process)
        server.send_signal(signal.SIGKILL)
        until(lambda: (again := command.server(process)) is not None and again.pid != server.pid, "another server")
        work.resume()
        assert process.wait(240) == 0, command.text()
    assert proxy.asked == []
    assert "it is started again" in command.text()
    assert (command.workspace.study(command.prepared.study_id) / "report.html").exists()
    (line,) = (command.workspace.capture(command.prepared.capture_id) / "extractions.jsonl").read_text().splitlines()
    assert json.loads(line)["sequences"] == 60, "the step was not begun again"


@pytest.mark.long
def test_a_server_that_can_not_be_started_again_ends_the_command_in_words(command):
    with command.runs() as process:
        work = command.at_work(process)
        database = command.workspace.root / "prefect" / "prefect.db"
        server = command.server(process)
        for path in database.parent.glob("prefect.db*"):
            path.unlink()
        database.write_bytes(b"not a database, and not empty either")
        server.send_signal(signal.SIGKILL)
        # the job is stopped: it is ended by force
        assert process.wait(120) == 1, command.text()
    assert "failed: Prefect's server ended with 3, and can't be started again" in command.text()
    assert "file is not a database" in command.text()
    assert "the same command goes on where this one stopped" in command.text()
    assert "Traceback" not in command.text()
    assert no_job_is_left(command)
    assert not work.is_running() or work.status() == psutil.STATUS_ZOMBIE
    done = len(command.journal.read_text().splitlines())
    database.unlink()
    with command.runs() as process:
        assert process.wait(240) == 0, command.text()
    record = command.workspace.capture(command.prepared.capture_id) / "extractions.jsonl"
    assert [json.loads(line)["sequences"] for line in record.read_text().splitlines()] == [60 - done]


@pytest.mark.parametrize(
    "signals", [pytest.param(2, marks=pytest.mark.studies), pytest.param(1, marks=pytest.mark.long)]
)
def test_ctrl_c_ends_a_command_whose_server_does_not_answer(command, signals):
    """The server is there and says nothing, and the job is deaf: the worst of both. A second Ctrl-C changes nothing."""
    with command.runs() as process:
        command.at_work(process)
        server = command.server(process)
        server.suspend()
        try:
            began = time.monotonic()
            for _ in range(signals):
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            assert process.wait(60) == 130, command.text()
            assert time.monotonic() - began < ENDS_SECONDS
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                server.resume()
        until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, "the end of its server")
    assert "the same command goes on where this one stopped" in command.text()
    assert no_job_is_left(command)


def test_ctrl_c_ends_a_command_that_is_starting_its_server(command):
    with command.runs() as process:
        until(lambda: process.poll() is not None or command.server(process), "a server", 120)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, command.text()
        assert time.monotonic() - began < ENDS_SECONDS
    assert "Traceback" not in command.text()
