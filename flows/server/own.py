"""Prefect's server for one command, where the user has configured none: a process on loopback that ends with the command.

Prefect would start one too, but it imports its whole server into this process first, which takes seconds, and does not end
it where this process is killed. Here the same application with the same services runs in a process of its own (`served`),
behind the `guard` and a `password`. A server that dies while the command lives is started again, on the same socket and
history: requests wait in the meantime.
"""

from __future__ import annotations

import atexit
import json
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
from typing import IO, Any

from flows.server import password as server_password
from flows.server.loopback import bypass_proxies, open_direct
from outliers.errors import BadInput, JobFailed
from outliers.files.atomic import size_of
from outliers.jobs.supervisor import end_with_parent

HOST = server_password.HOST
STOP_SECONDS = 10.0
LOOK_SECONDS = 0.5
"""Between two checks whether the server still runs."""
RESTARTS = 3
"""How often a server that dies is started again."""
BACKLOG = 128
LOG = "server.log"
PRIVATE = 0o077
"""The umask of a server: only this user can read its database, log and results."""
TIMEOUT, TIMEOUT_SECONDS = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", 120
"""Prefect's own setting; its 20 s are not enough on two busy cores."""
log = logging.getLogger("outliers.own_server")

DECIDED = ("PREFECT_API_URL", "PREFECT_PROFILES_PATH", "PREFECT_API_KEY")
"""Settings that choose a server, besides the files that Prefect reads."""
NO_SERVER = ("PREFECT_SERVER_EPHEMERAL_ENABLED", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE")
"""Settings that say whether a command may start a server."""
_PROFILE = "ephemeral"
"""Prefect's default profile, with which a command may start a server."""
_WORDS = ("api", "cloud", "ephemeral", "profile")
"""Substrings of the names of settings that choose a server, or say whether one may be started."""
_YES = ("1", "true", "yes", "on", "t", "y")


def is_decided(home: Path) -> bool:
    """Whether the user has configured Prefect's servers: then Prefect follows that, and nothing is started here.

    A permission to start one does not count: this module starts it then, because Prefect's has no guard. `home`: the folder
    of Prefect's profiles. Knows what Prefect reads: the environment, profiles, and in the current folder .env, prefect.toml and
    [tool.prefect] of pyproject.toml.
    """
    return _decides(dict(os.environ)) or _profile_decides(home / "profiles.toml") or _folder_decides()


def _folder_decides() -> bool:
    """Whether a file of the current folder has settings of servers, or can't be read: then Prefect reports what is wrong."""
    said = []
    try:
        if Path("prefect.toml").exists():
            said.append(Path("prefect.toml").read_text("utf-8"))
        if Path(".env").is_file():
            lines = Path(".env").read_text("utf-8", "replace").upper().splitlines()
            said += [line for line in lines if "PREFECT_" in line]
        if Path("pyproject.toml").is_file():
            said.append(
                json.dumps(tomllib.loads(Path("pyproject.toml").read_text("utf-8")).get("tool", {}).get("prefect"))
            )
    except (ValueError, TypeError, OSError):
        return True
    text = "\n".join(said).lower()
    return any(word in text for word in _WORDS)


def _decides(settings: dict[str, Any]) -> bool:
    """Whether settings choose a server, or forbid to start one."""
    if any(settings.get(name) for name in DECIDED):
        return True
    return any(str(settings.get(name, "")).lower() not in ("", *_YES) for name in NO_SERVER)


def _profile_decides(path: Path) -> bool:
    """Whether the profile that Prefect uses decides; so does one that is not in the file."""
    try:
        content = tomllib.loads(path.read_text("utf-8")) if path.exists() else {}
        name = os.environ.get("PREFECT_PROFILE") or content.get("active", _PROFILE)
        profile = content.get("profiles", {}).get(name)
        if profile is None:
            return bool(name != _PROFILE)
        return _decides({key.upper(): value for key, value in profile.items()})
    except (ValueError, TypeError, AttributeError, OSError):
        return True  # Prefect reports what is wrong with it


def startup_seconds() -> int:
    """How long a server may take to answer. BadInput where the user's setting is not a number of seconds."""
    text = os.environ.get(TIMEOUT) or str(TIMEOUT_SECONDS)
    try:
        seconds = int(text)
    except ValueError:
        seconds = 0
    if seconds < 1:
        raise BadInput(f"{TIMEOUT} is {text[:40]!r}: it must be a whole number of seconds, 1 or more")
    return seconds


def door(url: str) -> dict[str, str]:
    """Settings of a server at `url` (http://HOST:PORT/api): pages of its own origin alone may read it, changes need a token."""
    return {
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": url.removesuffix("/api"),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    }


def private_log(path: Path) -> IO[bytes]:
    """Open a log for appending; a new one is readable by this user alone. Raises OSError."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "ab")


def start(held: socket.socket, environ: dict[str, str], log: IO[bytes], *options: str) -> subprocess.Popen[bytes]:
    """`python -m flows.server.served` on a socket that listens, with its `options`; it ends with this process."""
    return subprocess.Popen(
        # -P: a folder called `flows` in the current folder must not be imported
        [sys.executable, "-P", "-m", "flows.server.served", str(held.fileno()), *options],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        umask=PRIVATE,
        pass_fds=[held.fileno()],
        start_new_session=True,  # Ctrl-C ends the command alone: the server must hear of the run's end first
        preexec_fn=end_with_parent(),
    )


class OwnServer:
    """A server that was started and may not answer yet; it ends with this process, however that ends."""

    def __init__(self, home: Path, give_up: Callable[[str], None] = lambda text: None) -> None:
        """Start it with its history below `home`; its address is in PREFECT_API_URL from now on. Not for two at once.

        `give_up`: called, in another thread, when it died and can't be started again, with a sentence that says so.
        """
        self._seconds = startup_seconds()
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._log, self._give_up = home / LOG, give_up
        self._stopped = threading.Event()
        # the socket is made here and kept: no other process can take the port while the server loads, and requests wait
        self._held = socket.socket()
        self._held.bind((HOST, 0))
        self._held.listen(BACKLOG)
        self.url = f"http://{HOST}:{self._held.getsockname()[1]}/api"
        os.environ["PREFECT_API_URL"] = self.url
        bypass_proxies(self.url)
        server_password.settle(server_password.given() or server_password.make())
        self._process = self._start()
        atexit.register(self.stop)  # registered before Prefect's own handlers, which still need it and so run first

    def _start(self) -> subprocess.Popen[bytes]:
        self._from = size_of(self._log)
        known = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}
        with private_log(self._log) as log:
            return start(self._held, known | door(self.url) | {"PREFECT_SERVER_UI_ENABLED": "false"}, log)

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
        until = time.monotonic() + self._seconds
        while self._process.poll() is None and time.monotonic() < until and not self._stopped.is_set():
            try:
                with open_direct(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return None
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass  # not yet
            time.sleep(0.1)
        code = self._process.poll()
        return f"ended with {code}" if code is not None else f"did not answer within {self._seconds} s"

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
                # refuse connections from now on, so that no client waits for an answer
                self._held.close()
                self._give_up(
                    f"Prefect's server {how}, and can't be started again; {self._last_words()}. What is done is kept: the same "
                    "command goes on where this one stopped"
                )
                return

    def stop(self) -> None:
        """End the server. May be repeated."""
        self._stopped.set()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def settle_home(root: Path) -> None:
    """Settings of Prefect: where its history is kept, and no telemetry. BadInput where a setting can't be used."""
    startup_seconds()
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ[TIMEOUT] = os.environ.get(TIMEOUT) or str(TIMEOUT_SECONDS)
    configured = {"PREFECT_HOME", "PREFECT_API_URL", "PREFECT_PROFILE"} & os.environ.keys()
    if not configured and not (Path.home() / ".prefect" / "profiles.toml").exists():
        os.environ["PREFECT_HOME"] = str(root / "prefect")
