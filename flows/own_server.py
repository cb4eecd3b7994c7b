"""Prefect's server for one command, where the user has configured none: on loopback, beside the process, gone with it.

Prefect would start one too: by importing its whole server into this process first, which takes seconds, one after the other,
and leaving it to itself where this process is killed. What runs is the same application with the same services. Before it:
`inprocess`, which says when. After it: a process of its own that runs this file.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from outliers.errors import JobFailed
from outliers.files import size_of
from outliers.supervisor import end_with_parent

HOST = "127.0.0.1"
STOP_SECONDS = 10.0
LOG = "server.log"
FAILED = 3
"""Exit code of a server that never answered, as uvicorn's own command has it."""
DECIDED = ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "PREFECT_API_KEY")
"""Settings with which a user says which server is meant, beside the files that Prefect reads."""
NO_SERVER = ("PREFECT_SERVER_EPHEMERAL_ENABLED", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE")
"""Settings with which a user says whether a command may start one."""


def is_decided(home: Path) -> bool:
    """Whether the user has told Prefect anything about servers: then Prefect goes by that, and nothing is started here.

    `home`: the folder of Prefect's profiles. Knows what Prefect reads: the environment, profiles, and in the current folder
    .env, prefect.toml and [tool.prefect] of pyproject.toml.
    """
    if any(os.environ.get(name) for name in (*DECIDED, *NO_SERVER)):
        return True
    if any(path.exists() for path in (home / "profiles.toml", Path("prefect.toml"))):
        return True
    if Path(".env").is_file() and b"PREFECT_" in Path(".env").read_bytes().upper():
        return True
    project = Path("pyproject.toml")
    if not project.is_file():
        return False
    try:
        return "prefect" in tomllib.loads(project.read_text("utf-8")).get("tool", {})
    except ValueError:
        return True  # Prefect says what is wrong with it


class OwnServer:
    """A server that was started and may not answer yet; it ends with this process, however that ends."""

    def __init__(self, home: Path) -> None:
        """Start it with its history below `home`; its address is in PREFECT_API_URL from now on. Not for two at once."""
        home.mkdir(parents=True, exist_ok=True)
        self._log = home / LOG
        self._from = size_of(self._log)
        # the socket is made here: nobody can take the port while the server is being loaded
        with socket.socket() as held, self._log.open("ab") as log:
            held.bind((HOST, 0))
            self.url = f"http://{HOST}:{held.getsockname()[1]}/api"
            self._process = self._start(held, log)
        os.environ["PREFECT_API_URL"] = self.url
        atexit.register(self.stop)  # before Prefect's own, which still talk to it and so run first

    def _start(self, held: socket.socket, log: IO[bytes]) -> subprocess.Popen[bytes]:
        known = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}
        return subprocess.Popen(
            # -P: a folder called `flows` where the person stands is not ours
            [sys.executable, "-P", "-m", "flows.own_server", str(held.fileno())],
            env=known | {"PREFECT_SERVER_UI_ENABLED": "false"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[held.fileno()],
            start_new_session=True,  # Ctrl-C is for the command: the server hears of the run's end first
            preexec_fn=end_with_parent(),
        )

    def wait(self) -> None:
        """Until it answers. JobFailed, with the end of its log, where it doesn't."""
        seconds = float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"])
        until = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass  # not yet
            time.sleep(0.1)
        code = self._process.poll()
        how = f"ended with {code}" if code is not None else f"did not answer within {seconds:.0f} s"
        self.stop()
        with self._log.open("rb") as log:
            log.seek(self._from)
            said = log.read()[-2000:].decode(errors="replace")
        raise JobFailed(
            f"Prefect's server {how}; {self._log} says: {said.strip() or 'nothing'} (the time it is given is "
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS; or start one with `make ui` and set PREFECT_API_URL)"
        )

    def stop(self) -> None:
        """End it; again is nothing."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def serve(descriptor: int) -> None:
    """Prefect's server as it runs for a command, without pages, on a bound socket; until SIGTERM."""
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    with socket.socket(fileno=descriptor) as held:
        server.run(sockets=[held])
    if not server.started:
        sys.exit(FAILED)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
