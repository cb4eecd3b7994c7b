"""A real Prefect server and a worker, on loopback and free ports, in a folder of the test's; both end with the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from flows.server.served import seed
from tests.support.s3 import free_ports

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 600

_ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
# SIGTERM, on which Prefect's commands end the processes that they started themselves
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class PrefectHome:
    """Server, work pool, deployments and worker, with `environment` for whatever talks to them or runs in them."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.api = f"http://127.0.0.1:{self.port}/api"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PREFECT_"))}
        self.environment = kept | {
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_WORKER_PREFETCH_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            # a worker puts its runs below the temporary folder, in one that the first user of the machine owns
            "TMPDIR": str(folder),
            # what is scheduled looks at records of what was rented: not at the user's own
            "OUTLIERS_WORKSPACE": str(folder / "workspace"),
            **environment,
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> PrefectHome:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not any(
            "DATABASE_CONNECTION_URL" in name for name in self.environment
        ):  # Postgres has a database of its own
            seed(self.folder / "home")
        self._spawn("server", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        self._await(lambda: self._get("/health") is True, "server")
        self.prefect("work-pool", "create", "outliers", "--type", "process")
        self.prefect("--no-prompt", "deploy", "--all")
        self._spawn("worker", "worker", "start", "--pool", "outliers")
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def client_environment(self) -> dict[str, str]:
        """Of whoever asks the server: where it has a password, with that."""
        return self.environment

    def headers(self, method: str) -> dict[str, str]:
        """Of a request to the server: where it has a password, with that."""
        return {}

    def prefect(self, *arguments: str, check: bool = True) -> str:
        """Run the `prefect` command; returns what it printed."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name("prefect")), *arguments],
            env=self.client_environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"prefect {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
            )
        return done.stdout + done.stderr

    def run(self, *, name: str | None = None, **parameters: object) -> str:
        """A run of the deployment `study`, as the form of the UI makes it; returns the id of the flow run."""
        deployment = self.call("GET", "/deployments/name/study/study")["id"]
        asked = {"parameters": parameters} | ({"name": name} if name else {})
        return str(self.call("POST", f"/deployments/{deployment}/create_flow_run", asked)["id"])

    def run_typed(self, **parameters: object) -> str:
        """`prefect deployment run study/study`; returns the id of the flow run."""
        before = {run["id"] for run in self.flow_runs()}
        options = []
        for name, value in parameters.items():
            # as a person types it: text bare, the rest as JSON
            options += ["-p", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        self.prefect("deployment", "run", "study/study", *options)
        (made,) = {run["id"] for run in self.flow_runs()} - before
        return made

    def flow_runs(self) -> list[dict]:
        # of studies alone: `reap` has a schedule, and its runs come and go
        return self.post("/flow_runs/filter", {"flows": {"name": {"any_": ["study"]}}})

    def wait(self, flow_run: str, *states: str, seconds: float = START_SECONDS) -> dict:
        """The flow run, once it is in one of `states`."""
        found: dict = {}

        def there() -> bool:
            nonlocal found
            found = self._get(f"/flow_runs/{flow_run}") or {}
            return found.get("state_name") in states

        self._await(there, f"{states}", seconds, lambda: f"{found.get('state')}\n{self.logs(flow_run)}")
        return found

    def task_runs(self, flow_run: str) -> dict[str, dict]:
        """Task runs of a flow run, by the task's name."""
        runs = self.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
        return {run["task_key"].rsplit(".", 1)[-1].split("-")[0]: run for run in runs}

    def logs(self, flow_run: str) -> str:
        rows = self.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run]}}, "sort": "TIMESTAMP_ASC"})
        return "\n".join(row["message"] for row in rows)

    def artifacts(self, flow_run: str) -> list[dict]:
        return self.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run]}}})

    def post(self, path: str, body: object) -> Any:
        return self.call("POST", path, body)

    def call(self, method: str, path: str, body: object = None) -> Any:
        """A call of the server's API; one that says its database is busy (503) is asked again, as by Prefect's client."""
        data = None if body is None else json.dumps(body).encode()
        deadline = time.monotonic() + 60
        while True:
            headers = {"Content-Type": "application/json"} | self.headers(method)
            asked = urllib.request.Request(self.api + path, data, headers, method=method)
            try:
                with urllib.request.urlopen(asked, timeout=60) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def _get(self, path: str):
        try:
            asked = urllib.request.Request(self.api + path, headers=self.headers("GET"))
            with urllib.request.urlopen(asked, timeout=5) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

    def _spawn(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [str(Path(sys.executable).with_name("prefect")), *arguments]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", _ENDS_WITH_PARENT, str(os.getpid()), *command],
                    env=self.environment,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def _await(self, condition, what: str, seconds: float = START_SECONDS, explain=lambda: "") -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            for process in self._processes:
                if process.poll() is not None:
                    raise RuntimeError(f"a Prefect process ended while waiting for {what}: {self._tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} within {seconds} s: {explain()}\n{self._tail()}")
            time.sleep(0.5)  # each question costs the server 10 ms of processor

    def _tail(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory, s3_server):
    """One server and worker for the tests of a file, with the keys of the S3 server's writer.

    They end with the file: a server that nobody asks takes a sixth of a core, for as long as the other tests last.
    """
    with PrefectHome(tmp_path_factory.mktemp("prefect"), s3_server.environment()) as running:
        yield running
