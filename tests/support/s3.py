"""A real S3 server for tests: SeaweedFS on free loopback ports, with keys and rights that it checks.

`S3Server` is a context manager; it can be killed and started again on the same ports and data. The fixture `s3_server`
gives one for the whole session. The server dies with the process that started it, however that ends.
Telemetry is off, and nothing listens beyond 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import pytest
import s3fs

BUCKET = "atlas"
GRPC_OFFSET = 10_000
START_SECONDS = 60.0
_SERVICES = ("master", "volume", "filer", "s3", "admin")

# The kernel kills the server when its parent dies (PR_SET_PDEATHSIG = 1); a fork hook of subprocess would run Python
# between fork and exec, which may deadlock in a process with threads.
_DIES_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Keys:
    """One identity of the server."""

    access_key: str
    secret_key: str = field(repr=False)


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def free_ports(count: int) -> tuple[int, ...]:
    """`count` ports of 127.0.0.1 below the ephemeral range that are free, with port + 10000 free too."""
    found: list[int] = []
    start = 10_100 + secrets.randbelow(10_000)
    for port in range(start, start + 2_000):
        if not _listening(port) and not _listening(port + GRPC_OFFSET):
            found.append(port)
        if len(found) == count:
            return tuple(found)
    raise RuntimeError(f"found {len(found)} of {count} free ports from {start} on")


def remove_sockets(ports: Iterable[int]) -> None:
    """Removes what weed leaves behind: it puts sockets into /tmp, whatever TMPDIR says."""
    for port in (port + offset for port in ports for offset in (0, GRPC_OFFSET)):
        for leftover in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            leftover.unlink(missing_ok=True)


class S3Server:
    """`weed mini` on `folder`: `admin` may do all, `writer` and `reader` what they are called, in BUCKET alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.admin = Keys("admin", secrets.token_hex(20))
        self.writer = Keys("writer", secrets.token_hex(20))
        self.reader = Keys("reader", secrets.token_hex(20))
        self.ports = dict(zip(_SERVICES, free_ports(len(_SERVICES)), strict=True))
        self.endpoint = f"http://127.0.0.1:{self.ports['s3']}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> S3Server:
        tries_left = 2
        while True:
            try:
                self.start()
                return self
            except RuntimeError as error:
                # another server took a port between our look and our start
                if not tries_left or "Port allocation failed" not in str(error):
                    raise
            tries_left -= 1
            self.ports = dict(zip(_SERVICES, free_ports(len(_SERVICES)), strict=True))
            self.endpoint = f"http://127.0.0.1:{self.ports['s3']}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        remove_sockets(self.ports.values())

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the server is not started")
        return self._process.pid

    def environment(self, keys: Keys | None = None) -> dict[str, str]:
        """What a client needs in its environment to be `keys` (default: the writer) here, and no identity anywhere else."""
        keys = keys or self.writer
        return {
            "AWS_ACCESS_KEY_ID": keys.access_key,
            "AWS_SECRET_ACCESS_KEY": keys.secret_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(self.folder / "no-aws-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "no-aws-credentials"),
        }

    def start(self) -> None:
        """Starts the server, on the data it had, and waits until it answers; call it on a thread that stays."""
        if self.running:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "data").mkdir(exist_ok=True)
        config = self.folder / "s3.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps(self._identities()))
        log = (self.folder / "weed.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _DIES_WITH_PARENT, str(os.getpid()), *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )
        self._wait_until_ready()

    def kill(self) -> None:
        """Ends the server at once, as a power cut does; its data stays."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """The server accepts connections and answers nothing, until `thaw`."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _identities(self) -> dict[str, object]:
        def identity(keys: Keys, actions: list[str]) -> dict[str, object]:
            credentials = {"accessKey": keys.access_key, "secretKey": keys.secret_key}
            return {"name": keys.access_key, "credentials": [credentials], "actions": actions}

        may_write = [f"{action}:{BUCKET}" for action in ("Read", "Write", "List", "Tagging")]
        may_read = [f"{action}:{BUCKET}" for action in ("Read", "List")]
        return {
            "identities": [
                identity(self.admin, ["Admin"]),
                identity(self.writer, may_write),
                identity(self.reader, may_read),
            ]
        }

    def _command(self) -> list[str]:
        weed = Path(sys.executable).with_name("weed")
        ports = [f"-{name}.port={port}" for name, port in self.ports.items()]
        ports += [f"-{name}.port.grpc={port + GRPC_OFFSET}" for name, port in self.ports.items()]
        options = {
            "dir": self.folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.config": self.folder / "s3.json",
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "bucket": BUCKET,
            "admin.ui": "false",
            "webdav": "false",
            "master.telemetry": "false",
        }
        return [str(weed), "-logtostderr=true", "mini", *(f"-{k}={v}" for k, v in options.items()), *ports]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.running and time.monotonic() < deadline:
            if self._answers() == 403 and self._has_bucket():
                return
            time.sleep(0.05)
        log = (self.folder / "weed.log").read_text(errors="replace")[-3000:]
        self.kill()
        raise RuntimeError(f"weed was not ready on {self.endpoint} within {START_SECONDS} s; its log ends:\n{log}")

    def _has_bucket(self) -> bool:
        """Whether the bucket is there: weed makes it a moment after it first answers."""
        keys = {"key": self.admin.access_key, "secret": self.admin.secret_key, "endpoint_url": self.endpoint}
        admin = s3fs.S3FileSystem(**keys, client_kwargs={"region_name": "us-east-1"}, skip_instance_cache=True)
        try:
            admin.call_s3("list_objects_v2", Bucket=BUCKET, MaxKeys=1)
        except OSError:
            return False
        return True

    def _answers(self) -> int | None:
        """The status of an unsigned GET /: 403 once the identities are loaded."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["s3"], timeout=2)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/")
            return connection.getresponse().status
        return None


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """This process's environment with `values`, and with no other AWS_ setting; put back afterwards."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests; who kills it starts it again."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server
