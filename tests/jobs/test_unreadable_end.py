"""Records of a job that can't be read count for nothing."""

from __future__ import annotations

import time

import pytest

from outliers.jobs import jobs
from outliers.locks import is_locked


@pytest.mark.parametrize("content", [b"", b"{", bytes(50), b"\xff\xfe", b"[1]"])
def test_a_job_whose_end_cannot_be_read_is_lost_and_started_again(tmp_path, content):
    first = jobs.start(tmp_path, jobs.JobSpec("extract-x", ("true",)))
    jobs.result(first.folder)
    while is_locked(first.folder / "lock"):  # its supervisor ends after its record does
        time.sleep(0.01)
    for name in ("exit.json", "started.json", "job.json"):
        (first.folder / name).write_bytes(content)
    assert jobs.status(first.folder) == "lost"
    assert jobs.running(tmp_path) == ()
    again = jobs.start(tmp_path, jobs.JobSpec("extract-x", ("true",)))
    assert again.attempt == 2
    jobs.result(again.folder)
