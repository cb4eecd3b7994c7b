"""Prefect on this machine in one command: server, work pool, limit, deployments, worker. `make ui`, `python -m flows.ui`.

All on loopback; nobody is told anything. What is there already is used: a server on the port, the pool, the history in
the folder. Ctrl-C ends what this started, by its pid, and nothing else. It knows no study. Before it: nothing. After it:
a person with a browser.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from flows.loopback import bypass_proxies, open_direct
from flows.options import number
from outliers.errors import BadInput, JobFailed, OutliersError
from outliers.supervisor import end_with_parent
from outliers.workspace import open_workspace

HOST = "127.0.0.1"
PORT = 4200
"""Prefect's own."""
START_SECONDS = 180.0
"""A server took 17 to 29 s on two cores; its first start also makes the tables."""
CANCEL_SECONDS = 45.0
"""Prefect gives a cancelled run half a minute."""
STOP_SECONDS = 40.0
"""For a server or a worker to end once asked."""

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # the newer pages ask amplitude.com for their settings, whatever the line above says (seen with Prefect 3.8.8)
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
}
"""Nobody is told anything; a setting of the user's own wins."""
KEPT = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
"""Prefect keeps slots in memory: after a restart of the server they would stay taken for good."""


@dataclass
class Started:
    """A process that this command started."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Ask it to end, wait, and see to it."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def environment(home: Path | None, port: int) -> dict[str, str]:
    """What server, worker and set-up run with: one home, one address."""
    from flows.inprocess import settle_home

    if home is not None:
        os.environ["PREFECT_HOME"] = str(home.expanduser().absolute())
    settle_home(open_workspace(None).root)
    own = {"PREFECT_API_URL": f"http://{HOST}:{port}/api", "PREFECT_SERVER_API_HOST": HOST}
    bypass_proxies(own["PREFECT_API_URL"])
    # one password for the server and for all who ask it here
    if password := os.environ.get("PREFECT_SERVER_API_AUTH_STRING") or os.environ.get("PREFECT_API_AUTH_STRING"):
        os.environ.setdefault("PREFECT_API_AUTH_STRING", password)
        os.environ.setdefault("PREFECT_SERVER_API_AUTH_STRING", password)
    return QUIET | KEPT | dict(os.environ) | own


def is_prefect(port: int) -> bool:
    """Whether a Prefect server answers there. BadInput where something else does."""
    try:
        with open_direct(f"http://{HOST}:{port}/api/health", timeout=5) as answer:
            if json.load(answer) is True:
                return True
    except urllib.error.HTTPError:
        pass
    except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) != 0:
                return False
    raise BadInput(f"something that is not Prefect answers at {HOST}:{port}: choose another with --port N")


def start(name: str, environ: dict[str, str], log: Path, *arguments: str) -> Started:
    """Start `prefect ARGUMENTS` in a session of its own: Ctrl-C is for this command, which ends it in order."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
    return Started(name, process, log)


def wait_for(server: Started, port: int) -> None:
    """Until the server answers. JobFailed, with the end of its log, where it doesn't."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and server.alive():
        with contextlib.suppress(BadInput):  # it listens a moment before it answers
            if is_prefect(port):
                return
        time.sleep(0.3)
    raise JobFailed(f"the server did not start; {server.log} ends:\n{server.log.read_text(errors='replace')[-2000:]}")


def ask(port: int, path: str, body: object = None) -> Any:
    """One request to the server; POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if password := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    request = urllib.request.Request(f"http://{HOST}:{port}/api{path}", data, headers)
    try:
        with open_direct(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise BadInput(
                f"the Prefect server at {HOST}:{port} refuses these credentials (HTTP {error.code}): PREFECT_API_AUTH_STRING "
                "must be what it has in PREFECT_SERVER_API_AUTH_STRING"
            ) from error
        raise


def cancel_runs(port: int) -> None:
    """Cancel what runs in our pool and wait for that: a run whose worker and server just go stays Running for ever.

    One that does not answer lost its process before, and is said to be cancelled.
    """
    states = {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}
    wanted = {"flow_runs": {"state": states}, "work_pools": {"name": {"any_": ["outliers"]}}}
    found = ask(port, "/flow_runs/filter", wanted)
    for run in found:
        print(f"cancelling {run['name']}: Retry goes on with what it has", flush=True)
        ask(port, f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    until = time.monotonic() + CANCEL_SECONDS
    while found and time.monotonic() < until:
        time.sleep(0.3)
        found = ask(port, "/flow_runs/filter", wanted)
    for run in found:
        state = {"type": "CANCELLED", "name": "Cancelled", "message": "its process was gone when the server ended"}
        ask(port, f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def run_settle(environ: dict[str, str], machines: int | None) -> str:
    """`python -m flows.settle` in that environment: Prefect reads its settings once a process."""
    options = [] if machines is None else ["--machines", str(machines)]
    done = subprocess.run(
        [sys.executable, "-m", "flows.settle", *options],
        env=environ,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise JobFailed(f"the set-up failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def what_next(port: int, home: Path) -> str:
    """What a person does now."""
    url = f"http://{HOST}:{port}"
    form = f"{url}/deployments/deployment/{ask(port, '/deployments/name/study/study')['id']}/run"
    return f"""
open        {url}
a study     {form}
            such as model builtin:smollm2, corpus builtin:python-docs; then Submit
or          PREFECT_API_URL={url}/api prefect deployment run study/study -p model=builtin:smollm2 -p corpus=builtin:python-docs
            `outliers study` with that PREFECT_API_URL shows here too
kept in     {home} (SQLite; server.log, worker.log)"""


@contextlib.contextmanager
def alone(home: Path) -> Iterator[bool]:
    """Whether this is the only `make ui` of that home; held while the block runs, and gone with the process."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "ui.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def serve(port: int, home: Path, environ: dict[str, str], machines: int | None) -> int:
    """Start what is missing, say what to open, wait, and end what was started."""
    started: list[Started] = []
    try:
        if is_prefect(port):
            print(f"using the Prefect server at {HOST}:{port}", flush=True)
        else:
            print("starting the Prefect server (half a minute)", flush=True)
            command = ("server", "start", "--host", HOST, "--port", str(port))
            started.append(start("server", environ, home / "server.log", *command))
            wait_for(started[0], port)
        print(run_settle(environ, machines), flush=True)
        from flows.settle import POOL

        started.append(start("worker", environ, home / "worker.log", "worker", "start", "--pool", POOL))
        print(what_next(port, home), flush=True)
        print("Ctrl-C ends " + " and ".join(f"{one.name} ({one.process.pid})" for one in started), flush=True)
        while all(one.alive() for one in started):
            time.sleep(0.3)
        gone = next(one for one in started if not one.alive())
        raise JobFailed(f"the {gone.name} ended by itself with {gone.process.returncode}; see {gone.log}")
    except KeyboardInterrupt:
        print("\nending", flush=True)
        return 0
    finally:
        # a second Ctrl-C must not leave half of it behind
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if [one.name for one in started if one.alive()] == ["server", "worker"]:
            with contextlib.suppress(OSError, ValueError):
                cancel_runs(port)
        for one in reversed(started):
            one.stop()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """`python -m flows.ui`; the exit codes are those of `outliers`."""
    parser = argparse.ArgumentParser(prog="python -m flows.ui", description=(__doc__ or "").splitlines()[0])
    port = number(int, lambda value: 0 < value < 65536, "a port: 1 to 65535")
    parser.add_argument("--port", type=port, default=PORT, metavar="N", help="port on 127.0.0.1 (default: %(default)s)")
    parser.add_argument("--home", type=Path, metavar="DIR", help="Prefect's folder (default: that of `outliers study`)")
    machines = number(int, lambda value: value > 0, "a number of machines, 1 or more")
    parser.add_argument(
        "--machines", type=machines, metavar="N", help="rented machines at once (default: as it is, else 4)"
    )
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        environ = environment(options.home, options.port)
        home = Path(environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
        with alone(home) as first:
            if not first:
                print(f"it runs already, from {home}: Ctrl-C there ends it" + what_next(options.port, home))
                return 0
            return serve(options.port, home, environ, options.machines)
    except BadInput as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except (OutliersError, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
