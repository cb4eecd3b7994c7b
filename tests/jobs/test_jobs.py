"""Detached jobs, with real processes: how they end, what is heard of them, who starts one, and what is never written."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outliers import errors
from outliers.jobs import jobs
from tests.support.detached import content, lines, python, until, workspace

__all__ = ["workspace"]  # the fixture, found by name
pytestmark = pytest.mark.servers


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
        "from outliers import errors\nfrom outliers.jobs import jobs\n"
        "try: raise errors.PlanRefused('needs 9 GB, has 1 GB')\n"
        "except errors.OutliersError as error: jobs.record_error(error); raise SystemExit(1)"
    )
    handle = jobs.start(workspace, python(code))
    with pytest.raises(errors.PlanRefused, match=r"^needs 9 GB, has 1 GB$"):
        jobs.result(handle.folder)
    assert json.loads((handle.folder / "exit.json").read_text())["error"]["kind"] == "PlanRefused"


def test_no_job_there(tmp_path):
    with pytest.raises(errors.BadInput):
        jobs.status(tmp_path / "jobs" / "a" / "0001")


# Events


def test_followers_lose_and_double_nothing(workspace):
    """The step prints and reports at once; two followers look in at other moments and break off at other events."""
    code = (
        "import time\nfrom outliers.events.stream import reporter_from_environment\nreporter = reporter_from_environment()\n"
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


# One job, however many start it


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
    "import sys, time\nfrom pathlib import Path\nfrom outliers.jobs import jobs\n"
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
    argv = [sys.executable, "-m", "outliers.jobs.supervisor", str(folder), str(lock)]
    subprocess.run(argv, input=said, pass_fds=(lock,), start_new_session=True, timeout=20)
    os.close(lock)
    with pytest.raises(errors.MachineLost, match="environment"):
        jobs.result(folder)
    assert not (tmp_path / "ran").exists()


# What is never written


def test_a_secret_is_in_no_file_and_on_no_command_line(workspace):
    secret = "s3cr3t-" + hashlib.sha256(os.urandom(8)).hexdigest()
    code = "import hashlib, os, time; print(hashlib.sha256(os.environ['KEY'].encode()).hexdigest()); time.sleep(30)"
    job = python(code, KEY=secret)
    handle = jobs.start(workspace, job)
    fingerprint = hashlib.sha256(secret.encode()).hexdigest()
    until(lambda: fingerprint in (handle.folder / "events.jsonl").read_text())
    command_lines = b"".join(_bytes(path) for path in Path("/proc").glob("[0-9]*/cmdline"))
    assert b"outliers.jobs.supervisor" in command_lines and secret.encode() not in command_lines
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
    code = "import sys, outliers.jobs.jobs; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "transformers", "numpy", "pydantic", "prefect") if f"'{name}'" in loaded]
