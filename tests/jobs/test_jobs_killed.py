"""Detached jobs that are killed or cancelled, with real processes: what is recorded, and that none of their processes is left."""

import json
import os
import signal
import subprocess
import time

import pytest

from outliers import errors
from outliers.jobs import jobs
from outliers.locks import is_locked
from tests.support.detached import alive, lines, python, started, until, workspace

__all__ = ["workspace"]  # the fixture, found by name
pytestmark = pytest.mark.servers


def test_a_killed_command_failed_for_want_of_memory(workspace):
    handle = jobs.start(workspace, python("print('so far', flush=True); import time; time.sleep(30)"))
    until(lambda: "so far" in (handle.folder / "events.jsonl").read_text())
    os.kill(started(handle.folder)["child"], signal.SIGKILL)
    with pytest.raises(errors.JobFailed, match=r"(?s)signal 9.*memory.* [1-9][0-9.]* GB.*so far"):
        jobs.result(handle.folder)
    assert jobs.status(handle.folder) == "failed"


def test_a_signal_that_is_no_cancel_is_named(workspace):
    handle = jobs.start(workspace, python("import time; time.sleep(30)"))
    os.kill(started(handle.folder)["child"], signal.SIGTERM)
    with pytest.raises(errors.JobFailed, match="signal 15"):
        jobs.result(handle.folder)
    assert jobs.cancel(handle.folder) == "failed"


def test_a_killed_supervisor_takes_its_command_along(workspace):
    handle = jobs.start(workspace, python("import time; time.sleep(30)"))
    os.kill(started(handle.folder)["pgid"], signal.SIGKILL)
    assert jobs.wait(handle.folder, 10) == "lost"
    assert not alive(started(handle.folder)["child"])
    with pytest.raises(errors.MachineLost):
        jobs.result(handle.folder)
    # Nothing is written over a loss, and the next start is a new attempt.
    assert jobs.cancel(handle.folder) == "lost" and not (handle.folder / "cancel.json").exists()
    assert jobs.start(workspace, python("pass")).attempt == 2


def test_what_a_killed_supervisor_leaves_is_removed_by_who_finds_the_job_dead(workspace):
    """64 KB for each, for good: its reserve, and a file that it was writing."""
    dead = [jobs.start(workspace, python("import time; time.sleep(30)", name=name)) for name in ("a", "b", "c")]
    for handle in dead:
        os.kill(started(handle.folder)["pgid"], signal.SIGKILL)
        assert jobs.wait(handle.folder, 10) == "lost"
        (handle.folder / ".exit.json.0123456789abcdef.part").write_text("{")
        os.utime(handle.folder / ".exit.json.0123456789abcdef.part", (0, 0))
    (young := dead[1].folder / ".exit.json.fedcba9876543210.part").write_text("{")
    (draft := dead[2].folder.parent / ".new").mkdir()

    def leftovers():
        return {path.parent.parent.name for path in (workspace / "jobs").glob("*/*/*") if path.suffix == ".part"} | {
            path.parent.parent.name for path in (workspace / "jobs").glob("*/*/reserve")
        }

    assert leftovers() == {"a", "b", "c"}
    with pytest.raises(errors.MachineLost):
        jobs.result(dead[0].folder)
    assert leftovers() == {"b", "c"}
    live = jobs.start(workspace, python("import time; time.sleep(30)", name="d"))
    assert not draft.exists()
    assert young.exists(), "somebody may be writing it"
    young.unlink()
    assert leftovers() == {"d"}
    assert jobs.status(live.folder) == "running"
    jobs.cancel(live.folder)
    assert leftovers() == set()


STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(30)"
)


def test_a_command_that_outlives_its_supervisor_still_runs(workspace):
    """No second one may start while it runs, and it can be ended: the lock is the command's too."""
    handle = jobs.start(workspace, python(STUBBORN))
    until(lambda: "deaf" in (handle.folder / "events.jsonl").read_text())
    supervisor = started(handle.folder)["pgid"]
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: not alive(supervisor), 10)
    assert jobs.status(handle.folder) == "running" and alive(started(handle.folder)["child"])
    assert jobs.start(workspace, python("pass")) == handle
    assert jobs.cancel(handle.folder, grace_seconds=0.1) == "cancelled"
    assert not alive(started(handle.folder)["child"])
    assert json.loads((handle.folder / "exit.json").read_text())["signal"] == 9


@pytest.mark.parametrize("child_code", ["import time; time.sleep(30)", STUBBORN])
def test_cancel_ends_the_whole_family(workspace, child_code):
    pids = workspace / "pids"
    grandchild = (
        f"import os, signal; signal.signal(15, signal.SIG_IGN); open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')"
    )
    code = (
        f"import subprocess, sys\nfor _ in range(2):\n"
        f"    subprocess.Popen([sys.executable, '-c', {grandchild!r} + '; import time; time.sleep(30)'])\n{child_code}"
    )
    handle = jobs.start(workspace, python(code))
    until(lambda: pids.exists() and pids.read_text().count("\n") == 2)
    if child_code is STUBBORN:
        until(lambda: "deaf" in (handle.folder / "events.jsonl").read_text())
    began = time.monotonic()
    assert jobs.cancel(handle.folder, grace_seconds=0.5) == "cancelled"
    assert time.monotonic() - began < 5
    family = [int(pid) for pid in pids.read_text().split()] + list(started(handle.folder).values())[:2]
    until(lambda: not any(map(alive, family)), 2)
    before = (handle.folder / "exit.json").read_bytes()
    assert jobs.cancel(handle.folder) == "cancelled" and (handle.folder / "exit.json").read_bytes() == before
    with pytest.raises(errors.JobCancelled, match="cancelled"):
        jobs.result(handle.folder)


def test_a_cancelled_command_may_tidy_up(workspace):
    code = (
        "import signal, sys, time\n"
        "def leave(*_): time.sleep(0.3); print('tidied', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave); print('ready', flush=True); time.sleep(30)"
    )
    handle = jobs.start(workspace, python(code))
    until(lambda: "ready" in (handle.folder / "events.jsonl").read_text())
    assert jobs.cancel(handle.folder, grace_seconds=10) == "cancelled"
    assert lines(handle.folder) == ["ready", "tidied"]


def test_cancel_leaves_what_has_ended(workspace):
    handle = jobs.start(workspace, python("pass"))
    jobs.wait(handle.folder, 10)
    assert jobs.cancel(handle.folder) == "done" and not (handle.folder / "cancel.json").exists()


def test_a_free_lock_means_no_signal(tmp_path):
    """The group's number in an old record is this test's own bystander: it must live."""
    bystander = subprocess.Popen(["sleep", "30"], start_new_session=True)
    (tmp_path / "lock").touch()
    (tmp_path / "job.json").write_text("{}")
    (tmp_path / "started.json").write_text(json.dumps({"pgid": bystander.pid, "child": bystander.pid}))
    try:
        assert jobs.cancel(tmp_path, grace_seconds=0) == "lost"
        with pytest.raises(subprocess.TimeoutExpired):
            bystander.wait(0.2)
    finally:
        bystander.kill()
        bystander.wait()


def test_what_a_command_leaves_running_ends_with_it(workspace):
    """A worker that inherited the lock and the group, as a forked one does."""
    handle = jobs.start(workspace, jobs.JobSpec("step", ("sh", "-c", "sleep 30 >/dev/null 2>&1 & echo $!")))
    assert jobs.wait(handle.folder, 10) == "done"
    pid = int(lines(handle.folder)[0])
    until(lambda: not alive(pid), 3)
    until(lambda: not is_locked(handle.folder / "lock"), 3)
