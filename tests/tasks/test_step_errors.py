"""What a step says that the operating system refuses something: one line with the cause, and what to do; no traceback."""

from __future__ import annotations

import sys

import pytest

from outliers.errors import JobFailed
from outliers.jobs import jobs
from outliers.workspace import open_workspace
from tests.support.captured import prepared
from tests.support.commands import run_step


@pytest.fixture
def begun(tmp_path, llama, text):
    """A workspace with a study in it, and that study's file."""
    workspace = open_workspace(tmp_path / "ws")
    study = prepared(workspace, llama, text, sequences=2, length=16)
    spec = tmp_path / "prepared.json"
    spec.write_text(study.model_dump_json())
    return (
        workspace,
        study,
        [sys.executable, "-m", "outliers", "extract", str(spec), "--workspace", str(workspace.root)],
    )


def test_a_file_in_the_way_is_told_in_one_line(begun):
    workspace, study, command = begun
    obstacle = workspace.capture(study.capture_id)
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_text("in the way")
    done = run_step(*command[3:])
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: extract: [Errno ")
    assert str(obstacle) in line
    assert "run the same again" in line


def test_the_cause_is_told_where_not_even_that_can_be_written(begun):
    """A file system that lets no file grow: the job's error can't be left in a file either."""
    workspace, _, command = begun
    code = (
        f"import os, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); os.execv({command[0]!r}, {command!r})"
    )
    job = jobs.start(workspace.root, jobs.JobSpec("limited", (sys.executable, "-c", code)))
    with pytest.raises(JobFailed, match="exit code 2") as caught:
        jobs.result(job.folder)
    assert "can't be written: File too large; give another folder" in str(caught.value).splitlines()[-1]
