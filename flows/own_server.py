"""Prefect's server for one command, where the user has configured none: on loopback, beside the process, gone with it.

Prefect would start one too: by importing its whole server into this process first, which takes seconds, one after the other,
and leaving it to itself where this process is killed. What runs is the same application with the same services. One that dies
while the command lives is started again, on the same socket and history: whoever asks meanwhile waits. Before it:
`inprocess`, which says when. After it: a process of its own that runs this file.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
from collections.abc import Callable
from pathlib import Path

from flows.loopback import bypass_proxies, open_direct
from outliers.errors import JobFailed
from outliers.files import size_of
from outliers.supervisor import end_with_parent

HOST = "127.0.0.1"
STOP_SECONDS = 10.0
LOOK_SECONDS = 0.5
"""Between two looks whether it still lives."""
RESTARTS = 3
"""A server that dies a fourth time is not started again."""
BACKLOG = 128
AUTH, SERVER_AUTH = "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"
LOG = "server.log"
log = logging.getLogger("outliers.own_server")

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

    def __init__(self, home: Path, give_up: Callable[[str], None] = lambda text: None) -> None:
        """Start it with its history below `home`; its address is in PREFECT_API_URL from now on. Not for two at once.

        `give_up`: called, in another thread, when it died and can't be started again, with a sentence that says so.
        """
        home.mkdir(parents=True, exist_ok=True)
        self._log, self._give_up = home / LOG, give_up
        self._stopped = threading.Event()
        # the socket is made here, and kept: nobody can take the port while the server is being loaded, and who asks while
        # there is none waits
        self._held = socket.socket()
        self._held.bind((HOST, 0))
        self._held.listen(BACKLOG)
        self.url = f"http://{HOST}:{self._held.getsockname()[1]}/api"
        os.environ["PREFECT_API_URL"] = self.url
        bypass_proxies(self.url)
        # a password that the user's own servers ask for: this one too, and its clients here know it
        if password := os.environ.get(AUTH) or os.environ.get(SERVER_AUTH):
            os.environ[AUTH] = os.environ[SERVER_AUTH] = password
        self._process = self._start()
        atexit.register(self.stop)  # before Prefect's own, which still talk to it and so run first

    def _start(self) -> subprocess.Popen[bytes]:
        self._from = size_of(self._log)
        known = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}
        with self._log.open("ab") as log:
            return subprocess.Popen(
                # -P: a folder called `flows` where the person stands is not ours
                [sys.executable, "-P", "-m", "flows.own_server", str(self._held.fileno())],
                env=known | {"PREFECT_SERVER_UI_ENABLED": "false"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self._held.fileno()],
                start_new_session=True,  # Ctrl-C is for the command: the server hears of the run's end first
                preexec_fn=end_with_parent(),
            )

    def wait(self) -> None:
        """Until it answers; from then on it is started again when it dies. JobFailed, with the end of its log, where it
        doesn't."""
        if (how := self._answers()) is not None:
            self.stop()
            raise JobFailed(
                f"Prefect's server {how}; {self._last_words()} (the time it is given is "
                "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS; or start one with `make ui` and set PREFECT_API_URL)"
            )
        threading.Thread(target=self._watch, name="own-server", daemon=True).start()

    def _answers(self) -> str | None:
        """None once it answers; what it did instead where it ended, or took too long."""
        seconds = float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"])
        until = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < until and not self._stopped.is_set():
            try:
                with open_direct(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return None
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass  # not yet
            time.sleep(0.1)
        code = self._process.poll()
        return f"ended with {code}" if code is not None else f"did not answer within {seconds:.0f} s"

    def _last_words(self) -> str:
        try:
            with self._log.open("rb") as file:
                file.seek(self._from)
                said = file.read()[-2000:].decode(errors="replace")
        except OSError as error:
            return f"its log can't be read: {error}"
        return f"{self._log} says: {said.strip() or 'nothing'}"

    def _watch(self) -> None:
        """The thread that starts it again. It lives as long as the process: its children end with it."""
        restarts = 0
        while not self._stopped.wait(LOOK_SECONDS):
            code = self._process.poll()
            if code is None:
                continue
            restarts += 1
            how: str | None = f"ended with {code}, for the {restarts}th time"
            if restarts <= RESTARTS:
                log.warning("Prefect's server ended with %s while it was needed: it is started again", code)
                try:
                    self._process = self._start()
                    how = self._answers()
                except OSError as error:
                    how = f"can't be started again: {error}"
            if how is not None and not self._stopped.is_set():
                # who asks is refused from now on, and does not wait for nothing
                self._held.close()
                self._give_up(
                    f"Prefect's server {how}, and can't be started again; {self._last_words()}. What is done is kept: the same "
                    "command goes on where this one stopped"
                )
                return

    def stop(self) -> None:
        """End it; again is nothing."""
        self._stopped.set()
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
