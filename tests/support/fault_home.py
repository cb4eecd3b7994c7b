"""A Prefect server and worker that can be killed and started again, and what a user does there: start, cancel, Retry, reap.

What carries the address of the server in its environment is ours, and ends with the test, however that ends. Before it:
`prefect_home`. After it: `fault_world`.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from tests.support.prefect_home import PrefectHome

LIMIT = 300.0
"""Seconds in which anything that is waited for has happened, on the slowest computer."""

_JANITOR = """
import sys, psutil
sys.stdin.read()  # until whoever started this is gone
for process in psutil.process_iter():
    try:
        if process.environ().get("PREFECT_API_URL") == sys.argv[1]:
            process.kill()
    except psutil.Error:
        pass
"""


def until(condition: Callable[[], Any], what: str, poll_seconds: float = 0.2, explain=lambda: "") -> Any:
    """What `condition` gives, once that is true."""
    deadline = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}: {explain()}"
        time.sleep(poll_seconds)
    return found


class Home(PrefectHome):
    """A server and a worker that can be killed and started again, on the same port and data."""

    def __enter__(self) -> Home:
        self._janitor = subprocess.Popen(
            [sys.executable, "-c", _JANITOR, self.api], stdin=subprocess.PIPE, start_new_session=True
        )
        super().__enter__()
        self.server, self.worker = self._processes
        deployment = self.call("GET", "/deployments/name/reap/reap")
        self.reap_id = deployment["id"]
        for schedule in deployment["schedules"]:
            # reap runs when a test says so
            self.call("DELETE", f"/deployments/{self.reap_id}/schedules/{schedule['id']}")
        self.study_id = self.call("GET", "/deployments/name/study/study")["id"]
        self.sweep_id = self.call("GET", "/deployments/name/sweep/sweep")["id"]
        return self

    def __exit__(self, *stack: object) -> None:
        super().__exit__(*stack)
        assert self._janitor.stdin is not None
        self._janitor.stdin.close()
        self._janitor.wait()

    def kill_worker(self) -> None:
        """SIGKILL."""
        self._kill(self.worker)

    def start_worker(self) -> None:
        """Another one, as a service manager starts it."""
        self._spawn("worker", "worker", "start", "--pool", "outliers")
        self.worker = self._processes[-1]

    def kill_server(self) -> None:
        """SIGKILL: what a power cut does."""
        self._kill(self.server)

    def start_server(self) -> None:
        """On its port and data; returns once it answers."""
        self._spawn("server", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        self.server = self._processes[-1]
        self._await(lambda: self._get("/health") is True, "server")

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        self._processes.remove(process)

    def start(self, deployment: str, parameters: dict[str, Any], state: str | None = None) -> str:
        """A run of a deployment, as the form of the UI makes it; its id. `state`: the one it begins in."""
        asked = {"parameters": parameters} | ({"state": {"type": state}} if state else {})
        made = self.call("POST", f"/deployments/{deployment}/create_flow_run", asked)
        return str(made["id"])

    def cancel(self, run: str) -> None:
        """As the Cancel button does."""
        self.call("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def retry(self, run: str) -> None:
        """As the Retry button and `prefect flow-run retry` do."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
        self.call("POST", f"/flow_runs/{run}/set_state", {"state": state, "force": True})

    def state(self, run: str) -> dict[str, Any]:
        """The state of a run now."""
        found: dict[str, Any] = self.call("GET", f"/flow_runs/{run}")["state"]
        return found

    def reap(self) -> str:
        """The deployment `reap`, once, by the worker; what it said."""
        run = self.start(self.reap_id, {})
        self.wait(run, "Completed")
        # lines are on their way for a moment after the end
        until(lambda: "Finished in state" in self.logs(run), "what reap said")
        return self.logs(run)

    def task_runs(self, flow_run: str) -> dict[str, dict]:
        """The newest task run of each task: a Retry makes new ones, and those of a killed flow stay as they were."""
        return {name: runs[-1] for name, runs in self.all_task_runs(flow_run).items()}

    def all_task_runs(self, flow_run: str) -> dict[str, list[dict]]:
        """The runs of each task, by its name; the newest last."""
        runs = self.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
        found: dict[str, list[dict]] = {}
        for run in sorted(runs, key=lambda run: run["flow_run_run_count"]):
            found.setdefault(run["task_key"].rsplit(".", 1)[-1].split("-")[0], []).append(run)
        return found

    def children(self, flow_run: str) -> list[str]:
        """The runs that a sweep started, the newest last."""
        asked = {"flow_runs": {"parent_flow_run_id": {"any_": [flow_run]}}}
        found = self.post("/flow_runs/filter", asked)
        return [str(run["id"]) for run in sorted(found, key=lambda run: run["created"])]

    def ours(self) -> list[psutil.Process]:
        """Every process that has this server's address in its environment, but the server, the worker and the commands."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PREFECT_API_URL") != self.api or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.environ().get("PREFECT__FLOW_RUN_ID"):
                    found.append(process)
        return found

    def flow_process(self, run: str) -> psutil.Process:
        """The process that runs a flow, once it is there."""

        def look() -> psutil.Process | None:
            for process in self.ours():
                with contextlib.suppress(psutil.Error):
                    mine = process.environ().get("PREFECT__FLOW_RUN_ID") == run
                    if mine and any("prefect" in word and "engine" in word for word in process.cmdline()):
                        return process
            return None

        return until(look, f"the process of {run}", 0.05)
