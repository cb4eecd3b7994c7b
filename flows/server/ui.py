"""Prefect on this machine in one command: server, work pool, limit, deployments, worker. `make ui`, `python -m flows.server.ui`.

All of it is on loopback, behind a password, without telemetry. What exists is used: a server on the port, the pool, the
history in the folder. Ctrl-C ends what this started, by its pid, and nothing else. It knows no study.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from flows.arguments import number
from flows.server import own as own_server
from flows.server import password as server_password
from flows.server.asking import ask, asks_for_password, cancel_runs, check_owner, is_prefect
from flows.server.guard import ENTRANCE
from flows.server.loopback import bypass_proxies
from flows.server.password import AUTH, HOST, SERVER_AUTH
from outliers.errors import BadInput, JobFailed, OutliersError
from outliers.jobs.supervisor import end_with_parent
from outliers.workspace import open_workspace

PORT = 4200
"""Prefect's own."""
START_SECONDS = 180.0
"""A server took 17 to 29 s on two cores; its first start also makes the tables."""
STOP_SECONDS = 40.0
"""For a server or a worker to end once asked."""

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # the newer pages ask amplitude.com for their settings, whatever the line above says (seen with Prefect 3.8.8)
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
}
"""No telemetry; the user's own settings win."""
KEPT = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
"""Prefect keeps slots in memory: after a restart of the server they would stay taken for good."""
PAGES = "PREFECT_SERVER_UI_API_URL", "PREFECT_UI_API_URL"
"""Where the pages ask: as they were reached themselves, by `localhost` or a forwarded port too, and never another origin."""


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
    from flows.server.own import settle_home

    if home is not None:
        os.environ["PREFECT_HOME"] = str(home.expanduser().absolute())
    settle_home(open_workspace(None).root)
    own = {"PREFECT_API_URL": f"http://{HOST}:{port}/api", "PREFECT_SERVER_API_HOST": HOST}
    bypass_proxies(own["PREFECT_API_URL"])
    # one password for the server and for all who ask it here
    if password := server_password.given():
        os.environ.setdefault(AUTH, password)
        os.environ.setdefault(SERVER_AUTH, password)
    pages = {} if os.environ.keys() & set(PAGES) else {PAGES[0]: "/api"}
    return QUIET | KEPT | own_server.door(own["PREFECT_API_URL"]) | pages | dict(os.environ) | own


def start_server(port: int, environ: dict[str, str], log: Path) -> Started:
    """Start the server on a socket that is made here, so that no other program can take the port meanwhile. BadInput where
    one has it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((HOST, port))
        except OSError as error:
            raise BadInput(f"{HOST}:{port} can't be used ({error}): choose another with --port N") from error
        held.listen(own_server.BACKLOG)
        with own_server.private_log(log) as out:
            return Started("server", own_server.start(held, environ, out, "pages"), log)


def start(name: str, environ: dict[str, str], log: Path, *arguments: str) -> Started:
    """Start `prefect ARGUMENTS` in a session of its own: Ctrl-C is for this command, which ends it in order."""
    with own_server.private_log(log) as out:
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


def run_settle(environ: dict[str, str], machines: int | None) -> str:
    """`python -m flows.server.settle` in that environment: Prefect reads its settings once a process."""
    options = [] if machines is None else ["--machines", str(machines)]
    done = subprocess.run(
        [sys.executable, "-m", "flows.server.settle", *options],
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
    """What a person does now. The password itself is shown on a terminal alone: elsewhere, this is a log."""
    url = f"http://{HOST}:{port}"
    form = f"{url}/deployments/deployment/{ask(port, '/deployments/name/study/study')['id']}/run"
    start, password, credentials = url, "", ""
    if (made := server_password.read(home, port)) is not None and made == os.environ.get(AUTH):
        file = shlex.quote(str(server_password.file_of(home, port)))
        password = f"\npassword    cat {file}   (for the page that asks for it; new at each start)"
        credentials = f'PREFECT_API_AUTH_STRING="$(cat {file})" '
        if sys.stdout.isatty():
            start = f"{url}{ENTRANCE}#{made}   (this link logs a browser in)"
    elif AUTH in os.environ:
        password = "\npassword    the one in PREFECT_SERVER_API_AUTH_STRING"
    return f"""
open        {start}{password}
a study     {form}
            such as model builtin:smollm2, corpus builtin:python-docs; then Submit
results     {url}/artifacts   (a page for each finished study; the menu of these pages does not name them)
or          {credentials}PREFECT_API_URL={url}/api \\
            prefect deployment run study/study -p model=builtin:smollm2 -p corpus=builtin:python-docs
            `outliers study` with that PREFECT_API_URL shows here too
kept in     {home} (SQLite; server.log, worker.log)"""


def settle_password(port: int, home: Path, there: bool) -> contextlib.AbstractContextManager[None]:
    """See to it that this process, and those it starts, know the password; a context that keeps its file.

    `there`: a server runs that this command did not start. It is used as it is, which a sentence says.
    """
    if there:
        check_owner(port)
        if not asks_for_password(port):
            print(
                f"using the Prefect server at {HOST}:{port}. It asks for NO password: every page that is open in your browser, "
                "and every user of this machine, can run commands as you through it. To have one, end that server first",
                flush=True,
            )
            return contextlib.nullcontext()
        print(f"using the Prefect server at {HOST}:{port}, which asks for a password", flush=True)
        if not server_password.given() and (found := server_password.read(home, port)):
            os.environ[AUTH] = found
        return contextlib.nullcontext()
    if server_password.given():
        server_password.file_of(home, port).unlink(missing_ok=True)  # of a start that was killed
        return contextlib.nullcontext()
    made = server_password.make()
    server_password.settle(made)
    return server_password.kept(home, port, made)


@contextlib.contextmanager
def alone(home: Path) -> Iterator[bool]:
    """Whether this is the only `make ui` of that home; held while the block runs, and gone with the process."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with own_server.private_log(home / "ui.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def serve(port: int, home: Path, environ: dict[str, str], machines: int | None) -> int:
    """Start what is missing, say what to open, wait, and end what was started."""
    there = is_prefect(port)
    with settle_password(port, home, there):
        known = {name: value for name in (AUTH, SERVER_AUTH) if (value := os.environ.get(name))}
        return run(port, home, environ | known, machines, there)


def run(port: int, home: Path, environ: dict[str, str], machines: int | None, there: bool) -> int:
    """`serve`, once it is known whether a server is `there`, and the password."""
    started: list[Started] = []
    try:
        if not there:
            print("starting the Prefect server (half a minute)", flush=True)
            started.append(start_server(port, environ, home / "server.log"))
            wait_for(started[0], port)
        print(run_settle(environ, machines), flush=True)
        from flows.server.settle import POOL

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
            with contextlib.suppress(BadInput, OSError, ValueError):
                cancel_runs(port)
        for one in reversed(started):
            one.stop()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """`python -m flows.server.ui`; the exit codes are those of `outliers`."""
    parser = argparse.ArgumentParser(prog="python -m flows.server.ui", description=(__doc__ or "").splitlines()[0])
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
                if not server_password.given() and (found := server_password.read(home, options.port)):
                    os.environ[AUTH] = found
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
