"""Plain requests to a Prefect server on this computer, for `make ui`, without importing Prefect.

They pass the server's password and its CSRF protection, where it has them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from flows.server.loopback import open_direct
from flows.server.password import AUTH, HOST
from outliers.errors import BadInput

CANCEL_SECONDS = 45.0
"""How long a cancelled run has to end; Prefect gives it half a minute."""
_LISTENS = "0A"
"""State of a listening socket in /proc/net/tcp."""


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


def asks_for_password(port: int) -> bool:
    """Whether the server answers only with a password."""
    try:
        with open_direct(f"http://{HOST}:{port}/api/admin/version", timeout=30):
            return False
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)


def check_owner(port: int) -> None:
    """BadInput where the server on the port is another user's: a worker runs the commands that its server names.

    Root's is believed. So is one whose owner can't be seen, on a system without /proc.
    """
    others = _owners(port) - {os.getuid(), 0}
    if others:
        raise BadInput(
            f"the server at {HOST}:{port} belongs to another user of this machine (uid {min(others)}), who could run commands "
            "as you through a worker of yours: choose another port with --port N"
        )


def _owners(port: int) -> set[int]:
    """User ids of those who listen on that port, on 127.0.0.1 or on every address."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text("ascii").splitlines()[1:]:
                fields = line.split()
                address, _, number = fields[1].partition(":")
                reached = address == "0100007F" or not address.strip("0")
                if fields[3] == _LISTENS and int(number, 16) == port and reached:
                    found.add(int(fields[7]))
    return found


def ask(port: int, path: str, body: object = None) -> Any:
    """One request to the server; POST where there is a body. BadInput where it refuses the credentials."""
    headers = _credentials()
    data = None
    if body is not None:
        data = json.dumps(body).encode()
        headers |= {"Content-Type": "application/json"} | _csrf(port)
    return _open(port, path, headers, data)


def _credentials() -> dict[str, str]:
    password = os.environ.get(AUTH)
    return {"Authorization": f"Basic {base64.b64encode(password.encode()).decode()}"} if password else {}


def _csrf(port: int) -> dict[str, str]:
    """The headers without which a server with CSRF protection changes nothing; none for one that has no such thing."""
    client = str(uuid.uuid4())
    try:
        token = _open(port, f"/csrf-token?client={client}", _credentials())["token"]
    except urllib.error.HTTPError as error:
        if error.code in (404, 422):
            return {}
        raise
    return {"Prefect-Csrf-Client": client, "Prefect-Csrf-Token": str(token)}


def _open(port: int, path: str, headers: dict[str, str], data: bytes | None = None) -> Any:
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
    """Cancel what runs in our pool and wait for that: a run whose worker and server just go stays Running.

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
