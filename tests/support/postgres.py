"""A real Postgres of the test's own: a data folder and a port that nobody else has, on loopback, ended by its pid.

Postgres refuses to run as root: there it is run by the user `postgres`, whom Debian's package makes.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support.s3 import free_ports

START_SECONDS = 300
USER = "postgres"


def programs():
    """The folder with initdb and postgres, the newest of Debian's; None where there is none."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return newest[-1].parent if newest else None


class Postgres:
    """One server with the database `prefect`; `url` is what Prefect connects to."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-test-"))
        (self.port,) = free_ports(1)
        self._password = secrets.token_hex(16)
        self._as = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam(USER)
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://{USER}:{self._password}@127.0.0.1:{self.port}/prefect"

    def __enter__(self) -> Postgres:
        try:
            told = self.folder / "password"
            told.touch(mode=0o600)
            told.write_text(self._password)
            if self._as:
                os.chown(told, self._as["user"], self._as["group"])
            self._run("initdb", "-D", "data", "-U", USER, "-A", "scram-sha-256", f"--pwfile={told}", "-N", "-E", "UTF8")
            told.unlink()
            self.start()
            self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "prefect")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """On the data it has; nothing but 127.0.0.1 is listened on, and no socket file is made."""
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": 200,
        }
        command = [
            str(programs() / "postgres"),
            "-D",
            "data",
            *(f"--{name}={value}" for name, value in options.items()),
        ]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as
            )
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            if self._run("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port), check=False) == 0:
                return
            time.sleep(0.1)
        raise RuntimeError(f"Postgres did not start: {(self.folder / 'log').read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        if self._process is None:
            return
        # SIGINT: it ends its connections, and then itself
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def query(self, sql: str) -> str:
        """What psql prints, without headings."""
        command = [
            str(programs() / "psql"),
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            USER,
            "-Atc",
            sql,
            "prefect",
        ]
        environment = os.environ | {"PGPASSWORD": self._password}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout

    def _run(self, program: str, *arguments: str, check: bool = True) -> int:
        done = subprocess.run(
            [str(programs() / program), *arguments],
            cwd=self.folder,
            env=os.environ | {"PGPASSWORD": self._password},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=120,
            **self._as,
        )
        if check and done.returncode:
            raise RuntimeError(f"{program} ended with {done.returncode}: {done.stdout!r} {done.stderr!r}")
        return done.returncode
