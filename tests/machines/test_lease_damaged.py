"""A lease that is not what was written ends the machine; no damage, and no clock, keeps it for longer."""

from __future__ import annotations

import json
import math
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers.errors import BadInput
from outliers.jobs import jobs
from outliers.jobs.jobs import JobSpec
from outliers.locks import is_locked
from outliers.machines import lease
from outliers.spec import ComputeSpec
from tests.support.one_host import until

DAY = 86_400.0


def unwatched(folder):
    """In the place of a watchdog: the test ends the lease itself."""


DAMAGES = [
    b"",
    b"\0" * 300,
    b"{",
    b"[]",
    b"null",
    b"NaN",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"holders": []}',
    b'{"holders": null, "remove_files": true}',
    b'{"holders": {"a": null}}',
    b'{"holders": {"a": {}}}',
    b'{"holders": {"a": {"title": "t"}}}',
    *(
        f'{{"holders": {{"a": {{"title": "t", "until": {until}}}}}}}'.encode()
        for until in ("NaN", "Infinity", "-Infinity", "-1", '"9999999999"', "null", "true", "[]", "1e999", "1" * 5000)
    ),
    b'{"holders": {"a": {"title": "t", "until": 99999999999999999999}}}',  # finite, and never over
]


@pytest.mark.parametrize("content", DAMAGES, ids=lambda content: content[:60].decode("latin-1").replace("\0", "0"))
def test_what_can_not_be_read_is_held_by_nobody(tmp_path, content):
    (tmp_path / "lease.json").write_bytes(content)
    found = lease.read(tmp_path)
    assert (found.left(), found.holders, found.readable) == (0.0, {}, False)
    assert found.remove_files == (b"remove_files" in content), "files go only where that was said"


def test_a_folder_in_its_place_is_held_by_nobody_and_holding_mends_it(tmp_path):
    (tmp_path / "lease.json" / "deep").mkdir(parents=True)
    assert not lease.read(tmp_path).readable
    assert 59 < lease.hold(tmp_path, "run", "title", 60, watchdog=unwatched).left() <= 60
    (tmp_path / "lease.json").unlink()
    (tmp_path / "lease.json").mkdir()
    assert lease.release(tmp_path).holders == {}


@pytest.mark.servers
@pytest.mark.parametrize("content", [b"", b'{"holders": {"run-1": {"title": "t", "until": NaN}}}', None])
def test_the_watchdog_ends_a_machine_whose_lease_is_damaged(tmp_path, monkeypatch, content):
    """With a real watchdog and a real job; None: a folder in place of the file."""
    monkeypatch.setenv(lease.POLL_VARIABLE, "0.1")
    lease.hold(tmp_path, "run-1", "a study", 600)
    job = jobs.start(tmp_path, JobSpec("step", (sys.executable, "-c", "import time; time.sleep(300)")))
    path = tmp_path / "lease.json"
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content)
    assert until(lambda: jobs.status(job.folder) == "cancelled")
    until(lambda: not is_locked(tmp_path / "watchdog.lock"))
    assert lease.read(tmp_path) == lease.Lease({}, 0.0, False)


@pytest.mark.servers
def test_one_bad_moment_ends_nothing(tmp_path, monkeypatch):
    """The file is read once more before a machine ends for it."""
    monkeypatch.setenv(lease.POLL_VARIABLE, "0.05")
    lease.hold(tmp_path, "run-1", "a study", 600)
    path = tmp_path / "lease.json"
    whole = path.read_bytes()
    job = jobs.start(tmp_path, JobSpec("step", (sys.executable, "-c", "import time; time.sleep(300)")))
    try:
        path.write_bytes(whole[:20])
        time.sleep(0.4)
        path.write_bytes(whole)
        time.sleep(2 * lease.CONFIRM_SECONDS)
        assert jobs.status(job.folder) == "running"
    finally:
        lease.release(tmp_path)


@pytest.mark.servers
def test_a_job_is_found_and_ended_where_what_its_supervisor_wrote_is_damaged(tmp_path):
    for content in (b"", b'{"pgid": 1}', b'{"pgid": 0}', b'{"pgid": "7"}', b'{"pgid": 1e99}', b'{"pgid": -1}'):
        job = jobs.start(tmp_path, JobSpec("step", (sys.executable, "-c", "import time; time.sleep(300)")))
        (job.folder / "started.json").write_bytes(content)
        lease.end(tmp_path, remove_files=False)
        assert jobs.status(job.folder) == "cancelled"


class Clocks:
    """The clock on the wall and the one since the boot, each set by the test."""

    CLOCK_BOOTTIME = 7

    def __init__(self) -> None:
        self.wall, self.up = 1_000_000.0, 500.0

    def time(self) -> float:
        return self.wall

    def clock_gettime(self, which: int) -> float:
        assert which == self.CLOCK_BOOTTIME
        return self.up


@settings(max_examples=200, deadline=None)
@given(
    asked=st.integers(1, int(lease.MAX_SECONDS)),
    passed=st.integers(0, int(2 * lease.MAX_SECONDS)),
    step=st.integers(-10_000_000, 10_000_000),
)
def test_no_step_of_the_clock_lengthens_a_lease(tmp_path_factory, asked, passed, step):
    place, clocks = tmp_path_factory.mktemp("lease"), Clocks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "time", clocks)
        lease.hold(place, "run", "title", asked, watchdog=unwatched)
        clocks.up += passed
        clocks.wall = max(0.0, clocks.wall + passed + step)
        left = lease.read(place).left()
        assert 0 <= left <= max(0, asked - passed)
        if step == 0:
            assert left == max(0, asked - passed)
        # after a boot the clock on the wall alone is there, and the lease is what was asked at most
        clocks.up = 1.0
        assert lease.read(place).left() <= asked


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["until", "seconds", "boot", "since", "title"]),
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just(10**400)
        ),
    )
)
def test_whatever_stands_there_is_read_and_bounded(tmp_path_factory, entry):
    place = tmp_path_factory.mktemp("lease")
    (place / "lease.json").write_text(json.dumps({"holders": {"a": entry, "b": entry}, "remove_files": 1}))
    found = lease.read(place)
    assert 0 <= found.left() <= lease.MAX_SECONDS + lease.SLACK_SECONDS
    assert found.remove_files is False


def test_the_longest_lease_is_the_longest_that_a_study_may_ask_for(tmp_path):
    fields = ComputeSpec.model_json_schema()["properties"]
    longest = max(fields[name]["maximum"] for name in ("lease_seconds", "grace_seconds", "keep_seconds"))
    assert longest == lease.MAX_SECONDS == 7 * DAY
    for asked in (math.inf, 1e300, 8 * DAY):
        assert lease.hold(tmp_path, "run", "title", asked, watchdog=unwatched).left() <= 7 * DAY
    for asked in (math.nan, -math.inf, -1.0, 10**400, "60", None, True):
        with pytest.raises(BadInput, match="a lease of"):
            lease.hold(tmp_path, "run", "title", asked, watchdog=unwatched)
