"""The lease with real watchdogs, on this machine; what any holders leave of it, against a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliers import errors
from outliers.files.records import write_json
from outliers.jobs import jobs
from outliers.jobs.jobs import JobSpec
from outliers.machines import lease
from tests.support.one_host import until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A workspace whose jobs and watchdog do not outlive the test."""
    monkeypatch.setenv(lease.POLL_VARIABLE, "0.1")
    folder = tmp_path / "work space"
    yield folder
    lease.release(folder)
    until(lambda: not watchdogs(folder))


def watchdogs(folder):
    """The watchdogs of a workspace that live; a zombie is dead."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if (
            "outliers.machines.lease" in words
            and str(folder) in words
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ):
            found.append(process)
    return found


def unwatched(folder):
    """In the place of a watchdog: the test ends the lease itself."""


def sleeper(folder, name="step"):
    return jobs.start(folder, JobSpec(name, (sys.executable, "-c", "import time; time.sleep(60)")))


# With real processes


@pytest.mark.servers
def test_a_job_ends_with_the_lease_that_nobody_renews(place):
    held = lease.hold(place, "run-1", "a study", 1.5)
    assert 1 < held.left() <= 1.5
    first, second = sleeper(place), sleeper(place, "other")
    (watchdog,) = until(lambda: watchdogs(place))
    assert os.getsid(watchdog.pid) == watchdog.pid != os.getsid(0)
    assert jobs.status(first.folder) == "running"
    began = time.monotonic()
    with pytest.raises(errors.MachineLost, match="the lease of its machine was not renewed"):
        jobs.result(first.folder)
    assert time.monotonic() - began < 10
    until(lambda: not watchdogs(place))
    assert jobs.status(second.folder) == "cancelled"
    assert lease.read(place) == lease.Lease({}, 0.0, False)


@pytest.mark.servers
def test_it_outlives_who_held_it(place):
    """As the agent does: it answers and ends, and the watchdog stays."""
    code = "import sys; from pathlib import Path; from outliers.machines import lease; lease.hold(Path(sys.argv[1]), 'r', 't', 2)"
    subprocess.run([sys.executable, "-c", code, place], cwd=ROOT, check=True, timeout=30)
    handle = sleeper(place)
    assert len(until(lambda: watchdogs(place))) == 1
    with pytest.raises(errors.MachineLost):
        jobs.result(handle.folder)


@pytest.mark.servers
def test_a_renewal_keeps_the_job_and_the_one_watchdog(place):
    lease.hold(place, "run-1", "a study", 4)
    handle = sleeper(place)
    (before,) = until(lambda: watchdogs(place))
    for _ in range(5):  # longer than one lease, in all
        time.sleep(1)
        lease.hold(place, "run-1", "a study", 4)
    assert jobs.status(handle.folder) == "running"
    assert [process.pid for process in watchdogs(place)] == [before.pid]


@pytest.mark.servers
def test_many_holders_at_once_have_one_watchdog_and_the_last_one_counts(place):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: lease.hold(place, f"run-{i}", "t", 30 + i), range(8)))
    assert set(lease.read(place).holders) == {f"run-{i}" for i in range(8)}
    assert 36 < lease.read(place).left() <= 37
    until(lambda: len(watchdogs(place)) == 1)
    handle = sleeper(place)
    with ThreadPoolExecutor(7) as pool:
        list(pool.map(lambda i: lease.leave(place, f"run-{i}"), range(7)))
    assert jobs.status(handle.folder) == "running"
    assert set(lease.read(place).holders) == {"run-7"}
    lease.leave(place, "run-7")
    assert jobs.status(handle.folder) == "cancelled"
    until(lambda: not watchdogs(place))


@pytest.mark.servers
def test_a_run_that_is_over_may_keep_its_machine_for_a_while(place):
    lease.hold(place, "run-1", "a study", 60)
    handle = sleeper(place)
    kept = lease.leave(place, "run-1", 1.5)
    assert 1 < kept.left() <= 1.5
    assert kept.holders["run-1"]["title"] == "a study"
    assert jobs.status(handle.folder) == "running"
    with pytest.raises(errors.MachineLost):
        jobs.result(handle.folder)


@pytest.mark.servers
def test_what_is_kept_has_a_watchdog_also_where_it_was_killed(place):
    lease.hold(place, "run-1", "a study", 60)
    handle = sleeper(place)
    (killed,) = until(lambda: watchdogs(place))
    killed.kill()
    until(lambda: not watchdogs(place))
    lease.leave(place, "run-1", 0.5)
    with pytest.raises(errors.MachineLost):
        jobs.result(handle.folder)


@pytest.mark.servers
@pytest.mark.parametrize("how", ["over", "left", "released"])
@pytest.mark.parametrize("remove", [True, False])
def test_files_go_only_where_that_was_asked(place, how, remove):
    for name in (*lease.REMOVED, "uploads"):
        (place / name / "deep").mkdir(parents=True)
        (place / name / "deep" / "file").write_text("x")
    lease.hold(place, "run-1", "a study", 0.3 if how == "over" else 60, remove_files=remove)
    lease.hold(place, "run-1", "a study", 0.3 if how == "over" else 60)  # a renewal says nothing of files
    if how == "left":
        lease.leave(place, "run-1")
    elif how == "released":
        lease.release(place)
    until(lambda: not watchdogs(place))
    left = {name for name in lease.REMOVED if (place / name / "deep" / "file").exists()}
    assert left == (set() if remove else set(lease.REMOVED))
    assert (place / "uploads/deep/file").exists()


def test_weights_go_with_the_last_machine_that_needs_them(tmp_path):
    """Those that were sent and those of the hub; not those that no spec names, and not those of a machine that is held."""
    sources = {
        "first": [
            ("folder", f"{tmp_path}/uploads/mine"),
            ("gguf", f"{tmp_path}/uploads/file/m.gguf"),
            ("hub", "org/a"),
        ],
        "second": [("folder", f"{tmp_path}/uploads/mine"), ("hub", "org/b"), ("hub", "org/a")],
        "over": [("hub", "org/a"), ("gguf", f"{tmp_path}/uploads/file/m.gguf")],
    }
    for name, of in sources.items():
        (tmp_path / "machines" / name / "studies").mkdir(parents=True)
        for number, (kind, path) in enumerate(of):
            study = {"model": {"source": {"kind": kind, "path": path}}}
            write_json(tmp_path / "machines" / name / "studies" / f"{number}.json", study)
    (tmp_path / "machines/first/studies/odd.json").write_text("[")
    weights = [tmp_path / "uploads" / name for name in ("mine", "file", "nobody's")]
    weights += [tmp_path / "hub" / f"models--org--{name}" for name in "abc"]
    for folder in weights:
        folder.mkdir(parents=True)

    def there():
        return {folder.name.removeprefix("models--org--") for folder in weights if folder.exists()}

    first, second = tmp_path / "machines/first", tmp_path / "machines/second"
    lease.hold(first, "run-1", "a study", 60, remove_files=True, watchdog=unwatched)
    lease.hold(second, "run-2", "a study", 60, remove_files=False, watchdog=unwatched)
    lease.leave(first, "run-1")
    assert there() == {"mine", "nobody's", "a", "b", "c"}
    lease.release(second)
    assert there() == {"mine", "nobody's", "a", "b", "c"}
    lease.hold(second, "run-3", "a study", 60, remove_files=True, watchdog=unwatched)
    lease.release(second)
    assert there() == {"nobody's", "c"}


@pytest.mark.servers
def test_a_killed_watchdog_is_started_again_by_the_next_renewal(place):
    lease.hold(place, "run-1", "a study", 60)
    (first,) = until(lambda: watchdogs(place))
    time.sleep(0.3)
    first.send_signal(signal.SIGKILL)
    until(lambda: not watchdogs(place))
    handle = sleeper(place)
    lease.hold(place, "run-1", "a study", 1)
    (second,) = until(lambda: watchdogs(place))
    assert second.pid != first.pid
    with pytest.raises(errors.MachineLost):
        jobs.result(handle.folder)


@pytest.mark.servers
def test_who_holds_again_after_the_end_has_a_watchdog_again(place):
    for _ in range(2):
        lease.hold(place, "run-1", "a study", 0.5)
        handle = sleeper(place)
        with pytest.raises(errors.MachineLost):
            jobs.result(handle.folder)


ESCAPED = """
import os, pathlib, time
if os.fork() == 0:
    os.setsid()
    pathlib.Path(os.environ["OUTLIERS_JOB"], "escaped").write_text(str(os.getpid()))
time.sleep(60)
"""
"""A job whose child has left its process group, with the lock: no signal to the group ends it."""


@pytest.fixture
def escaped(place, monkeypatch):
    """(a job that can't be ended, its child, a job that can)"""
    monkeypatch.setattr(lease, "CANCEL_SECONDS", 0.2)
    monkeypatch.setattr(jobs, "KILL_SECONDS", 0.2)
    lease.hold(place, "run-1", "a study", 60)
    first = jobs.start(place, JobSpec("a-first", (sys.executable, "-c", ESCAPED)))
    pid = first.folder / "escaped"
    child = psutil.Process(int(until(lambda: pid.exists() and pid.read_text())))
    yield first, child, sleeper(place, "b-second")
    if child.is_running():
        child.kill()
        until(lambda: jobs.status(first.folder) != "running")


@pytest.mark.servers
def test_one_job_that_can_not_be_ended_spares_no_other(place, escaped):
    first, _, second = escaped
    with pytest.raises(errors.JobFailed, match=r"a-first.*outlives SIGKILL"):
        lease.release(place)
    assert (jobs.status(first.folder), jobs.status(second.folder)) == ("running", "cancelled")


@pytest.mark.servers
def test_the_watchdog_tries_again_what_can_not_be_ended(place, escaped, monkeypatch):
    first, child, second = escaped
    tries, end = [], lease.end

    def counted(workspace, remove_files):
        tries.append(workspace)
        end(workspace, remove_files)

    monkeypatch.setattr(lease, "end", counted)
    (real,) = until(lambda: watchdogs(place))
    real.kill()
    until(lambda: not watchdogs(place))
    lease.hold(place, "run-1", "a study", 0.1, watchdog=unwatched)
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(lease.watch, place)
        until(lambda: jobs.status(second.folder) == "cancelled")
        until(lambda: len(tries) > 2)
        assert not watching.done()
        assert lease.read(place).holders
        child.kill()
        watching.result(20)
    assert lease.read(place).holders == {}
    assert jobs.status(first.folder) != "running"


# Against a model without files, processes and a real clock


class Clock:
    now = 1000.0

    def time(self):
        return self.now

    def monotonic(self):
        return self.now


HOLDERS = st.sampled_from("abc")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), HOLDERS, st.integers(1, 20)),
        st.tuples(st.just("leave"), HOLDERS, st.sampled_from([0, 0, 5, 15])),
        st.tuples(st.just("wait"), HOLDERS, st.integers(1, 12)),
        st.tuples(st.just("release"), HOLDERS, st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_any_holders_leave_what_the_last_word_of_each_says(tmp_path_factory, steps):
    place, clock, ends = tmp_path_factory.mktemp("lease"), Clock(), []
    needed: dict[str, float] = {}  # until when each said last that it needs the machine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "time", clock)
        patch.setattr(lease, "end", lambda workspace, remove_files: ends.append(clock.now))
        for verb, who, seconds in steps:
            before = len(ends)
            if verb == "wait":
                clock.now += seconds
            elif verb == "hold":
                lease.hold(place, who, who, seconds, watchdog=unwatched)
                needed[who] = clock.now + seconds
            elif verb == "leave":
                lease.leave(place, who, seconds, watchdog=unwatched)
                needed[who] = clock.now + seconds if seconds else 0.0
            else:
                lease.release(place)
                needed.clear()
            live = {name: moment for name, moment in needed.items() if moment > clock.now}
            found = lease.read(place)
            assert found.left() == max([0.0, *(moment - clock.now for moment in live.values())])
            assert {key: one["until"] for key, one in found.holders.items() if one["until"] > clock.now} == live
            ended = verb == "release" or (verb == "leave" and not live)
            assert len(ends) - before == ended
