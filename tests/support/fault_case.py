"""One study that meets faults: begun, held in the middle of a step, retried, and looked at when it is over.

Its steps are held by SIGSTOP or by the gate, so that no test counts on its speed. `Case` is a study on this computer;
`fault_kinds` has the others. Before it: `fault_world`. After it: `fault_suite`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.hooks.stale import end_stale_runs
from outliers.files.records import read_json
from outliers.jobs import jobs
from outliers.spec import StudySpec
from outliers.study.prepare import Prepared, prepare
from outliers.workspace import Workspace, open_workspace
from tests.support.fault_home import LIMIT, until
from tests.support.fault_world import GRACE_SECONDS, SEQUENCES, Row, World, spec_of
from tests.support.s3 import BUCKET

ENDS = ("Completed", "Failed", "Crashed", "Cancelled")
JOBS = ("extract", "analyze", "report")
"""Steps that are jobs; the others are work of the flow itself."""


class Case:
    """One study in a workspace of its own, and its runs."""

    kind = ""
    """What the table says of its steps."""
    tasks: Mapping[str, str] = {}
    """Step -> the task that does it, where they differ in name."""

    def __init__(self, world: World, name: str, compute: dict[str, Any] | None = None) -> None:
        self.world, self.name, self.home = world, name, world.home
        self.workspace: Workspace = open_workspace(world.folder / name / "work space")
        self.place = self.workspace
        """Where the steps work: here."""
        self.target = f"s3://{BUCKET}/{name}"
        compute = {"workspace": str(self.workspace.root), **(compute or {})}
        self.parameters = spec_of(world) | {"compute": compute, "publish_to": self.target}
        self.study: Prepared = prepare(StudySpec.model_validate(self.parameters), self.workspace)
        self.runs: list[str] = []
        self._stopped: list[psutil.Process] = []
        self._ahead: list[psutil.Process] = []
        """Jobs that were stopped before anybody waited for them."""
        self._by_hand: subprocess.Popen[str] | None = None
        self.again: Counter[str] = Counter()
        """How many more times than once the job of a step had to be started: it was ended before it was done."""
        self.killed_at: int | None = None
        """Sequences that were journaled when an extraction was killed: it has written no record of them."""

    def __enter__(self) -> Case:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped += self._ahead
        self.thaw()
        self.world.gate.open()
        if self._by_hand is not None:
            self._by_hand.kill()
            self._by_hand.wait()
        for process in self.home.ours():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PREFECT__FLOW_RUN_ID") in self.all_runs():
                    process.kill()
        shutil.rmtree(self.workspace.root, ignore_errors=True)

    # what a user does

    def begin(self) -> str:
        """Start a run; its id."""
        self.runs.append(self.home.start(self.home.study_id, self.parameters))
        return self.runs[-1]

    @property
    def run(self) -> str:
        return self.runs[-1]

    def all_runs(self) -> list[str]:
        """The runs, and whatever they started."""
        return self.runs

    def wait(self, *states: str, run: str | None = None) -> dict[str, Any]:
        """The state of a run, once it is one of `states`; fails where it is another end."""
        found = self.home.wait(run or self.run, *(states or ENDS), *ENDS, seconds=LIMIT)["state"]
        assert not states or found["name"] in states, f"{found}\n{self.home.logs(run or self.run)}"
        return dict(found)

    def crashed(self) -> dict[str, Any]:
        """The state of a run whose process was killed, once no record says so any more.

        Who watched the process says it first; its worker mostly says it again a moment later, which would undo a Retry
        in between.
        """
        state = self.wait("Crashed")
        last = time.monotonic() + 10.0
        while time.monotonic() < last and not state["message"].startswith("Flow run infrastructure exited"):
            time.sleep(0.2)
            state = self.wait("Crashed")
        return state

    def until(self, condition: Callable[[], Any], what: str, poll_seconds: float = 0.2) -> Any:
        """What `condition` gives, once that is true; fails early where a run of the case has ended meanwhile."""
        look = time.monotonic() + 2.0

        def both() -> Any:
            nonlocal look
            if time.monotonic() > look:
                ended = [state for run in self.runs if (state := self.home.state(run))["name"] in ENDS]
                look = time.monotonic() + 2.0
                assert not ended or condition(), f"it ended before {what}: {self.log()}"
            return condition()

        return until(both, what, poll_seconds, self.log)

    def retry(self) -> None:
        """Retry the run, until it is begun: the worker may say Crashed a second time, which undoes a Retry in between."""
        before = self.home.call("GET", f"/flow_runs/{self.run}")["run_count"]
        for _ in range(3):
            self.home.retry(self.run)
            until(lambda: self.home.state(self.run)["type"] not in ("SCHEDULED", "PENDING"), "a Retry", 0.2, self.log)
            if self.home.call("GET", f"/flow_runs/{self.run}")["run_count"] > before:
                return
        raise AssertionError(f"Retry was undone: {self.log()}")

    def back_at(self, step: str, since: str) -> bool:
        """Whether a run that crashed at `since` is at the step again, after a Retry."""
        found = self.home.all_task_runs(self.run).get(self.tasks.get(step, step), ())
        states = [task["state"] for task in found if task["state"]]
        return any(state["name"] == "Running" and state["timestamp"] > since for state in states)

    # holding a step

    def job_name(self, step: str) -> str:
        """What the job of a step is called."""
        return f"{step}-{self.study.capture_id if step == 'extract' else self.study.study_id}"

    def _job(self, step: str) -> jobs.JobHandle | None:
        return jobs.newest(self.place.root, self.job_name(step))

    def attempts(self, step: str) -> int:
        """How many times the job of a step was started."""
        job = self._job(step)
        return job.attempt if job else 0

    def ended(self, *steps: str) -> None:
        """The jobs of steps were ended, or failed: each is due once more."""
        self.again.update(step for step in steps if step in JOBS)

    def check_attempts(self) -> None:
        """No step was done again that was done; where two runs are at one study, one may come when the other is through."""
        for step in ("analyze", "report"):
            least = 1 + self.again[step]
            assert least <= self.attempts(step) < least + len(self.runs), f"{self.attempts(step)} jobs did {step}"

    def failed_task(self, step: str) -> dict[str, Any] | None:
        """The task that does a step, once Prefect's server has heard that it failed."""
        runs = self.home.all_task_runs(self.run).get(self.tasks.get(step, step), [])
        return next((dict(run) for run in runs if run["state_name"] == "Failed"), None)

    def journaled(self) -> int:
        return len(self._lines(self.place, "journal.jsonl"))

    def unrecorded(self) -> int:
        """Sequences, in all places, of extractions that ended before they could write a record."""
        return sum(len(self._lines(place, "journal.jsonl")) - sum(self._recorded(place)) for place in self.places())

    def _lines(self, place: Workspace, name: str) -> list[str]:
        path = place.capture(self.study.capture_id) / name
        # a line without its end is being written
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def _recorded(self, place: Workspace) -> list[int]:
        return [json.loads(line)["sequences"] for line in self._lines(place, "extractions.jsonl")]

    def hold(self, step: str) -> None:
        """Return once the run is in the middle of `step`, which stays there. `sync` must be announced: gate.hold()."""
        if step == "sync":
            self.until(lambda: self.world.gate.held, "a publication at the gate")
            return
        if step == "beginning":
            self._stopped.append(self.home.flow_process(self.run))
            self._stopped[-1].suspend()
            assert self.home.state(self.run)["type"] == "PENDING", "held too late"
            return
        if step == "provision":
            self.until(lambda: "provision" in self.home.task_runs(self.run), "provision", 0.05)
            return
        if step == "extract":
            self.until(lambda: self.journaled() > 0, "a journaled sequence", 0.002)
        process = self.until(lambda: self._child(step), f"a job that does {step}", 0.002)
        process.suspend()
        self._stopped.append(process)
        if step == "extract":
            assert self.journaled() < SEQUENCES, "held too late to show anything: give the study more sequences"

    @contextlib.contextmanager
    def held_ahead(self, step: str) -> Iterator[None]:
        """In the block the job of a step is stopped as soon as it works: it may come while the block waits for others.

        `hold` then finds it so, and `thaw` lets it go only after that.
        """
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.01):
                with contextlib.suppress(psutil.Error):
                    if (process := self._child(step)) is not None:
                        process.suspend()
                        self._ahead.append(process)
                        return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _child(self, step: str) -> psutil.Process | None:
        """The process that does a step now."""
        job = self._job(step)
        if job is None or jobs.status(job.folder) != "running":
            return None
        started = read_json(job.folder / "started.json")
        try:
            return psutil.Process(self.pid(started["child"])) if started else None
        except (psutil.NoSuchProcess, ProcessLookupError):
            return None

    def pid(self, number: int) -> int:
        """What this side calls the process that is called `number` where the step works."""
        return number

    def thaw(self) -> None:
        """What was stopped goes on."""
        for process in self._stopped:
            with contextlib.suppress(psutil.Error):
                process.resume()
        self._stopped.clear()

    def release(self, step: str) -> None:
        """What holds a step lets it go on; a gate that waits for `sync` goes on waiting at the steps before."""
        self.thaw()
        if step == "sync":
            self.world.gate.open()

    def kill_job(self, step: str, *, supervisor: bool) -> None:
        """SIGKILL of a step's process; with its supervisor, so that no process is left to record how it ended."""
        job = self._job(step)
        assert job is not None
        started = read_json(job.folder / "started.json") or {}
        self.ended(step)
        if step == "extract":
            self.killed_at = self.journaled()
        if supervisor:
            os.killpg(started["pgid"], signal.SIGKILL)
        else:
            os.kill(started["child"], signal.SIGKILL)
        self._stopped.clear()

    def forbid_writing(self) -> None:
        """The process that is held may make no file longer: what it does next fails, as on a file system that has a limit."""
        for process in self._stopped:
            process.rlimit(psutil.RLIMIT_FSIZE, (0, 0))

    def drop(self) -> None:
        """What was held is gone."""
        self._stopped.clear()

    def extract_by_hand(self) -> subprocess.Popen[str]:
        """`python -m outliers extract` of the same study in the same workspace; what it says is in its standard output."""
        place = self.workspace.root / "by-hand.json"
        place.write_text(self.study.model_dump_json())
        self._by_hand = subprocess.Popen(
            [sys.executable, "-m", "outliers", "extract", str(place), "--workspace", str(self.workspace.root)],
            env=self.home.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self._by_hand

    def cancel_asked(self, step: str) -> bool:
        """Whether the end of the step's job was asked for."""
        job = self._job(step)
        return job is not None and (job.folder / "cancel.json").exists()

    def look_for_stale_runs(self, grace_seconds: float = GRACE_SECONDS) -> list[str]:
        """What `reap` does about runs, from this process; what it did."""
        with temporary_settings({PREFECT_API_URL: self.home.api}):
            return end_stale_runs(self.workspace, grace_seconds)[0]

    def kill_flow(self, run: str | None = None) -> None:
        """SIGKILL of the process that runs the flow."""
        self.home.flow_process(run or self.run).kill()

    # what is there at the end

    def check(self) -> str:
        """Everything that must hold once a run is Completed; how many sequences each extraction did."""
        self.check_nothing_is_left()
        manifest = json.loads((self.workspace.study(self.study.study_id) / "manifest.json").read_text())
        assert manifest["results_digest"] == self.world.digest, "other results than those of an undisturbed study"
        self.check_published()
        self.check_attempts()
        done = [count for place in self.places() for count in self._recorded(place)]
        before = [] if self.killed_at is None else [self.killed_at]
        assert sum(before) + sum(done) == SEQUENCES, f"{before} and {done}: some of {SEQUENCES} were done twice"
        return " + ".join(map(str, before + done))

    def published(self) -> list[str]:
        """Every object below the target, by its path there."""
        root = self.target.removeprefix("s3://")
        found = self.world.bucket().find(root)
        return sorted(path.removeprefix(f"{root}/") for path in found)

    def check_published(self) -> None:
        """One manifest, the files that it names, and nothing else."""
        there = self.published()
        (place,) = [path for path in there if path.endswith(f"{self.study.study_id}/manifest.json")]
        manifest = json.loads(self.world.bucket().cat(f"{self.target.removeprefix('s3://')}/{place}"))
        assert manifest["results_digest"] == self.world.digest
        folder = place.replace("manifest.json", manifest["folder"])
        # a log says when: its folder is another one for each report, and one that no manifest names is invisible
        assert {path for path in there if path.startswith(folder)} == {
            f"{folder}/{f['path']}" for f in manifest["files"]
        }
        assert [path for path in there if path != place and not path.startswith(folder)] == [], "half a publication"

    def check_nothing_is_left(self) -> None:
        """No process, lock or record of a machine."""

        runs = self.all_runs()

        def left() -> list[str]:
            found = []
            for process in self.home.ours():
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("PREFECT__FLOW_RUN_ID") in runs:
                        found.append(f"{process.pid} {process.cmdline()}")
            root = self.workspace.root
            found += [str(path) for path in (*root.glob("runs/*"), *root.glob("machines/*.json"))]
            return found + [handle.name for place in self.places() for handle in jobs.running(place.root)]

        until(lambda: not left(), "an end of all that ran", explain=lambda: "\n".join(left()))

    def places(self) -> tuple[Workspace, ...]:
        """Every workspace in which a step of the study works."""
        return (self.place,)

    def log(self) -> str:
        return "\n".join(f"{self.home.state(run)}\n{self.home.logs(run)}" for run in self.all_runs())

    # the table

    def note(self, fault: str, step: str, state: dict[str, Any] | str, then: str) -> None:
        """A line of the table; how it ended is added by `close_rows`."""
        name, message = (state, "") if isinstance(state, str) else (state["name"], state.get("message") or "")
        self.world.rows.append(Row(fault, step + self.kind, name, message.replace("\n", " "), then, ""))

    def close_rows(self, first: int, ended: str) -> None:
        """Say how the study ended in the rows from `first` on."""
        for number in range(first, len(self.world.rows)):
            row = self.world.rows[number]
            self.world.rows[number] = Row(row.fault, row.step, row.state, row.message, row.then, ended)
