"""Detached jobs and their events, with real processes: ends, kills, cancels, races, and what is never written."""

import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from outliers import errors, events, jobs
from outliers.events import ConsoleReporter, JsonReporter, send_logs_to

pytestmark = pytest.mark.servers


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


# How it ends


@pytest.mark.parametrize(
    ("code", "status", "record"),
    [
        ("print('a'); print('b')", "done", {"code": 0, "signal": None}),
        ("raise SystemExit(3)", "failed", {"code": 3, "signal": None}),
        ("1 / 0", "failed", {"code": 1, "signal": None}),
        ("import os; os.kill(os.getpid(), 11)", "failed", {"code": None, "signal": 11}),
    ],
)
def test_the_end_is_recorded(workspace, code, status, record):
    handle = jobs.start(workspace, python(code))
    assert jobs.wait(handle.folder, 10) == status
    written = json.loads((handle.folder / "exit.json").read_text())
    assert {key: written[key] for key in record} == record
    assert abs(written["ended"] - time.time()) < 10


def test_a_failure_shows_the_last_fifteen_lines_in_order(workspace):
    """Both streams go through one pipe, so that an error stands where it happened."""
    code = "import sys\nfor i in range(40): print(i, file=sys.stderr if i % 2 else sys.stdout)\nsys.exit('ouch')"
    handle = jobs.start(workspace, python(code))
    with pytest.raises(errors.JobFailed, match="exit code 1") as caught:
        jobs.result(handle.folder)
    assert [line.strip() for line in str(caught.value).splitlines()[2:]] == [*map(str, range(26, 40)), "ouch"]


def test_a_command_that_does_not_exist(workspace):
    handle = jobs.start(workspace, jobs.JobSpec("step", ("/no/such/program",)))
    with pytest.raises(errors.JobFailed, match="/no/such/program"):
        jobs.result(handle.folder)


@pytest.mark.parametrize(
    ("name", "argv"),
    [("", ("true",)), ("../up", ("true",)), (".new", ("true",)), ("a/b", ("true",)), ("ok", ()), ("ok", ("a\0b",))],
)
def test_what_cannot_be_a_job_is_refused(workspace, name, argv):
    with pytest.raises(errors.BadInput):
        jobs.start(workspace, jobs.JobSpec(name, argv))
    assert not list(workspace.glob("jobs/*/0001"))


def test_the_error_of_a_step_arrives_as_what_it_was(workspace):
    code = (
        "from outliers import errors, jobs\n"
        "try: raise errors.PlanRefused('needs 9 GB, has 1 GB')\n"
        "except errors.OutliersError as error: jobs.record_error(error); raise SystemExit(1)"
    )
    handle = jobs.start(workspace, python(code))
    with pytest.raises(errors.PlanRefused, match=r"^needs 9 GB, has 1 GB$"):
        jobs.result(handle.folder)
    assert type(jobs.recorded_error(handle.folder)) is errors.PlanRefused
    assert json.loads((handle.folder / "exit.json").read_text())["error"]["kind"] == "PlanRefused"


def test_no_job_there(tmp_path):
    with pytest.raises(errors.BadInput):
        jobs.status(tmp_path / "jobs" / "a" / "0001")


# Events


def test_followers_lose_and_double_nothing(workspace):
    """The step prints and reports at once; two followers look in at other moments and break off at other events."""
    code = (
        "import time\nfrom outliers.events import reporter_from_environment\nreporter = reporter_from_environment()\n"
        "for i in range(400):\n    print('out', i)\n    reporter.log('warning', f'own {i} \\u00e9\\n')\n"
        "    if i % 40 == 0: time.sleep(0.05)\n"
    )
    handle = jobs.start(workspace, python(code))
    for stride in (7, 97):
        seen, offset = [], 0
        while True:
            before = len(seen)
            for event in jobs.follow(handle.folder, offset, poll_seconds=0.003):
                offset = event.end
                seen.append(event)
                if len(seen) % stride == 0:
                    break
            if len(seen) % stride or len(seen) == before:
                break
        assert [event.message for event in seen if event.level == "warning"] == [f"own {i} é\n" for i in range(400)]
        printed = [event.message for event in seen if event.kind == "log" and event.level == "info"]
        assert printed == [f"out {i}" for i in range(400)]
    assert offset == (handle.folder / "events.jsonl").stat().st_size


def test_what_is_printed_right_before_the_end_is_kept(workspace):
    handle = jobs.start(
        workspace, python("import os; os.write(1, b'\\n'.join(b'%d' % i for i in range(12000))); os._exit(0)")
    )
    assert lines(handle.folder) == [str(i) for i in range(12000)]


def test_heartbeats_come_while_nothing_is_said(workspace, monkeypatch):
    monkeypatch.setenv(jobs.HEARTBEAT_VARIABLE, "0.05")
    handle = jobs.start(workspace, python("import time; time.sleep(0.5)"))
    assert sum(event.kind == "heartbeat" for event in jobs.follow(handle.folder)) >= 4


def test_a_bar_drawn_over_is_one_line(workspace):
    handle = jobs.start(
        workspace, python("print('10%\\r50%\\r100%'); print('x' * 70000); print('caf\\u00e9', flush=True)")
    )
    printed = lines(handle.folder)
    assert printed[0] == "100%" and "".join(printed[1:-1]) == "x" * 70000 and printed[-1] == "café"


def test_a_torn_last_line_waits_for_its_end(tmp_path):
    path = tmp_path / "events.jsonl"
    assert events.read(path) == ([], 0)
    whole = b'{"t": 1, "kind": "log", "message": "a"}\n{"t": 2, "kind": "log", "message": "b", "newer": []}\n'
    path.write_bytes(whole + b'{"t": 3, "kind"')
    found, offset = events.read(path)
    assert [event.message for event in found] == ["a", "b"] and offset == len(whole) == found[-1].end
    assert events.read(path, offset) == ([], offset)
    with path.open("ab") as file:
        file.write(b': "log", "message": "c"}\n')
    found, offset = events.read(path, offset)
    assert [event.message for event in found] == ["c"] and offset == path.stat().st_size


def test_what_a_killed_writer_tore_costs_no_other_event(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"t": 1, "kind": "log", "mess')
    JsonReporter(path).log("info", 'says "{\\"t\\": 5}" itself')
    (torn, good), offset = events.read(path)
    assert torn.level == "warning" and '"mess' in torn.message and torn.end == 29
    assert good.message == 'says "{\\"t\\": 5}" itself' and good.end == offset == path.stat().st_size
    assert events.read(path, torn.end) == ([good], offset)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000])
def test_any_chunk_reads_the_same(tmp_path, chunk_bytes):
    path = tmp_path / "events.jsonl"
    reporter = JsonReporter(path)
    for i in range(30):
        reporter.log("info", f"{i}" * i)
    seen, offset = [], 0
    while found := events.read(path, offset, chunk_bytes)[0]:
        offset = found[-1].end
        seen += found
    assert [event.message for event in seen] == [f"{i}" * i for i in range(30)]


def test_progress_is_thinned_but_its_end_is_kept(tmp_path):
    reporter = JsonReporter(tmp_path / "events.jsonl")
    for done in range(1, 1001):
        reporter.progress("capture", done, 1000, "sequences")
    found = events.read(tmp_path / "events.jsonl")[0]
    assert 2 <= len(found) < 50 and found[0].done == 1
    assert (found[-1].step, found[-1].done, found[-1].total, found[-1].unit) == ("capture", 1000, 1000, "sequences")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_console_progress_has_a_rate_and_the_time_left():
    now, plain, terminal = [0.0], io.StringIO(), Terminal()
    reporters = [ConsoleReporter(stream, clock=lambda: now[0]) for stream in (plain, terminal)]
    # 20 of 100 were done before this process: 2 a second since, and 76 left take 38 s.
    for second, done in ((0.0, 20), (0.5, 21), (2.0, 24), (40.0, 100)):
        now[0] = second
        for reporter in reporters:
            reporter.progress("capture", done, 100, "sequences")
    reporters[1].log("warning", "careful")
    shown = plain.getvalue().splitlines()
    assert len(shown) == 3 and "24 sequences of 100 sequences  2 sequences/s  0:38 left" in shown[1]
    assert "100%" in shown[2] and "left" not in shown[2]
    assert terminal.getvalue().count("\n") == 2 and terminal.getvalue().endswith("\nwarning: careful\n")


def test_the_loggers_of_the_package_reach_the_reporter(tmp_path):
    logger = logging.getLogger("outliers_test_events")
    for _ in range(2):  # the second replaces the first: no line twice
        send_logs_to(JsonReporter(tmp_path / "events.jsonl"), logger.name)
    logger.debug("no")
    logger.getChild("part").info("yes %d", 1)
    try:
        raise KeyError("lost")
    except KeyError:
        logger.exception("failed")
    found = events.read(tmp_path / "events.jsonl")[0]
    assert [(event.level, event.message.splitlines()[0]) for event in found] == [("info", "yes 1"), ("error", "failed")]
    assert "KeyError: 'lost'" in found[1].message


def test_a_full_disk_ends_no_step():
    reporter = JsonReporter("/dev/full")
    reporter.log("info", "lost")
    reporter.progress("capture", 1, 2, "sequences")


# One job, whoever starts it


def test_starting_again_finds_the_one_that_runs(workspace):
    first = jobs.start(workspace, python("import time; time.sleep(30)"))
    assert jobs.start(workspace, python("print('another')")) == first == jobs.newest(workspace, "step")
    assert jobs.start(workspace, python("pass", name="other")).folder != first.folder
    jobs.cancel(first.folder)
    second = jobs.start(workspace, python("pass"))
    assert (first.attempt, second.attempt) == (1, 2)
    assert jobs.wait(second.folder, 10) == "done" and jobs.status(first.folder) == "cancelled"


def test_a_start_during_a_cancel_is_another_attempt(workspace):
    first = jobs.start(workspace, python("import time; time.sleep(30)"))
    (first.folder / "cancel.json").write_text("{}")
    assert jobs.start(workspace, python("pass")).attempt == 2
    assert jobs.status(first.folder) == "cancelled"


STARTER = (
    "import sys, time\nfrom pathlib import Path\nfrom outliers import jobs\n"
    "root, code = Path(sys.argv[1]), sys.argv[2]\n"
    "(root / f'ready-{sys.argv[3]}').touch()\n"
    "while not (root / 'go').exists(): time.sleep(0.0005)\n"
    "print(jobs.start(root, jobs.JobSpec('step', (sys.executable, '-c', code))).folder, flush=True)\n"
    "time.sleep(float(sys.argv[4]))"
)


def starter(workspace, code, number, stay_seconds):
    argv = [sys.executable, "-c", STARTER, str(workspace), code, str(number), str(stay_seconds)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def test_starters_at_once_start_one_job(workspace):
    ran = workspace / "ran"
    code = f"import time; print('x', file=open({str(ran)!r}, 'a')); time.sleep(30)"
    starters = [starter(workspace, code, number, 0) for number in range(4)]
    until(lambda: len(list(workspace.glob("ready-*"))) == 4)
    (workspace / "go").touch()
    folders = {process.communicate(timeout=20)[0].strip() for process in starters}
    assert folders == {str(workspace / "jobs" / "step" / "0001")}
    assert content(ran) == "x\n" and len(list(workspace.glob("jobs/step/0*"))) == 1


def test_the_job_outlives_its_starter(workspace):
    (workspace / "go").touch()
    process = starter(workspace, "import time\nfor i in range(8): print(i); time.sleep(0.1)", 0, 60)
    folder = Path(process.stdout.readline().strip())
    process.kill()
    process.communicate()
    assert jobs.status(folder) == "running"
    assert lines(folder) == [str(i) for i in range(8)] and jobs.status(folder) == "done"


@pytest.mark.parametrize("said", [b"", b'{"TOKEN": "abc'])
def test_a_starter_that_dies_before_the_hand_over(tmp_path, said):
    """The command must not run without the environment that it was promised."""
    folder = tmp_path / "jobs" / "step" / "0001"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"argv": ["touch", str(tmp_path / "ran")]}))
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    argv = [sys.executable, "-m", "outliers.supervisor", str(folder), str(lock)]
    subprocess.run(argv, input=said, pass_fds=(lock,), start_new_session=True, timeout=20)
    os.close(lock)
    with pytest.raises(errors.MachineLost, match="environment"):
        jobs.result(folder)
    assert not (tmp_path / "ran").exists()


# Killed and cancelled


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


STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(30)"
)


def test_a_command_that_outlives_its_supervisor_still_runs(workspace):
    """No second one may start beside it, and it can be ended: the lock is the command's too."""
    handle = jobs.start(workspace, python(STUBBORN))
    until(lambda: "deaf" in (handle.folder / "events.jsonl").read_text())
    os.kill(started(handle.folder)["pgid"], signal.SIGKILL)
    time.sleep(0.2)
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
    with pytest.raises(errors.JobFailed, match="cancelled"):
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
    until(lambda: not jobs._held(handle.folder), 3)


# What is never written


def test_a_secret_is_in_no_file_and_on_no_command_line(workspace):
    secret = "s3cr3t-" + hashlib.sha256(os.urandom(8)).hexdigest()
    code = "import hashlib, os, time; print(hashlib.sha256(os.environ['KEY'].encode()).hexdigest()); time.sleep(30)"
    job = python(code, KEY=secret)
    handle = jobs.start(workspace, job)
    fingerprint = hashlib.sha256(secret.encode()).hexdigest()
    until(lambda: fingerprint in (handle.folder / "events.jsonl").read_text())
    command_lines = b"".join(_bytes(path) for path in Path("/proc").glob("[0-9]*/cmdline"))
    assert b"outliers.supervisor" in command_lines and secret.encode() not in command_lines
    jobs.cancel(handle.folder)
    files = [path for path in workspace.rglob("*") if path.is_file()]
    assert len(files) >= 6 and not [path for path in files if secret.encode() in path.read_bytes()]
    assert json.loads((handle.folder / "job.json").read_text())["env"] == ["KEY"] and secret not in repr(job)


def _bytes(path):
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""


def test_the_supervisor_is_light():
    code = "import sys, outliers.jobs; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "transformers", "numpy", "pydantic", "prefect") if f"'{name}'" in loaded]
