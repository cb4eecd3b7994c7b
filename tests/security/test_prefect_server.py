"""Prefect's servers of this project (`make ui`, and a command's own) give nothing to what was not meant to use them.

A page that is open in a browser of the user sends what it can to loopback, also under a name of its own that was made to
point here; another user of the machine has no password. Real servers; requests as bytes, for a library would not send them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from flows.server import password as server_password
from flows.server import ui
from flows.server.asking import asks_for_password, check_owner
from tests.flows.test_own_server import COMMAND
from tests.support.prefect_ui import Ui

ROOT = Path(__file__).resolve().parent.parent.parent
JSON = {"Content-Type": "application/json"}
TEXT = {"Content-Type": "text/plain"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
FLOW = '{"name": "of-a-page"}'
SOCKETS = ("/api/events/in", "/api/events/out", "/api/logs/out", "/api/task_runs/subscriptions/scheduled")


class Server:
    """A running server: its port, its password, the folder of its files, whose processes are `pids`, what was `said`."""

    def __init__(self, port: int, password: str, home: Path, pids: list[int], pages: bool, said: str = "") -> None:
        self.port, self.password, self.home, self.pids, self.pages, self.said = port, password, home, pids, pages, said

    @property
    def credentials(self) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(self.password.encode()).decode()}

    def send(self, method: str, path: str, headers: dict[str, str], body: str = "", host: str | None = None):
        """Status, headers (lines, small letters) and body of the answer to these very bytes."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host or f'127.0.0.1:{self.port}'}"]
        lines += [f"{name}: {value}" for name, value in ({"Connection": "close"} | headers).items()]
        if body:
            lines.append(f"Content-Length: {len(body.encode())}")
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as sent:
            sent.sendall(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
            got = b""
            # a connection that is taken over for messages does not end
            while (piece := sent.recv(65536)) and not (got := got + piece).startswith(b"HTTP/1.1 101"):
                pass
        head, _, content = got.partition(b"\r\n\r\n")
        status, *rest = head.decode("latin-1").split("\r\n")
        return int(status.split()[1]), [line.lower() for line in rest], content

    def token(self) -> dict[str, str]:
        """What the server's own page sends with a change."""
        status, _, body = self.send("GET", "/api/csrf-token?client=test", self.credentials)
        assert status == 200, body
        found = re.search(rb'"token":"([^"]+)"', body)
        return {"Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": found[1].decode()}

    def flows(self) -> set[str]:
        headers = self.credentials | self.token() | JSON
        status, _, body = self.send("POST", "/api/flows/filter", headers, "{}")
        assert status == 200, body
        return {flow["name"] for flow in json.loads(body[body.index(b"[") : body.rindex(b"]") + 1])}


@pytest.fixture(scope="module")
def made_by_ui(tmp_path_factory):
    with Ui(tmp_path_factory.mktemp("ui"), {}) as running:
        yield Server(
            running.port, running.password, running.folder / "home", running.pids(), True, running.said.read_text()
        )


@pytest.fixture(scope="module")
def of_a_command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    script = COMMAND.replace('"pid":', '"auth": __import__("os").environ["PREFECT_API_AUTH_STRING"], "pid":')
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    command = [sys.executable, "-c", script, str(folder)]
    environment = kept | {"HOME": str(folder), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = json.loads(process.stdout.readline())
            assert json.loads(process.stdout.readline())[1] == 200, "its own client is let in"
            port = int(said["url"].split(":")[2].split("/")[0])
            yield Server(port, said["auth"], folder / "prefect", [said["pid"], process.pid], False)
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.fixture(params=["made_by_ui", pytest.param("of_a_command", marks=pytest.mark.studies)])
def server(request) -> Server:
    return request.getfixturevalue(request.param)


pytestmark = pytest.mark.servers

# what a page of another origin can have a browser send; the last three a browser says of itself, and no page can change that
PAGES = [
    ("a form", "POST", FORM | {"Origin": "http://evil.example"}),
    ("text that is JSON", "POST", TEXT | {"Origin": "http://evil.example"}),
    ("no type, which Prefect takes for JSON", "POST", {"Origin": "http://evil.example"}),
    ("JSON", "POST", JSON | {"Origin": "http://evil.example"}),
    ("a sandboxed frame, a file", "POST", TEXT | {"Origin": "null"}),
    ("another server on this machine", "POST", TEXT | {"Origin": "http://127.0.0.1:1"}),
    ("a name that begins like ours", "POST", TEXT | {"Origin": "http://127.0.0.1.evil.example"}),
    ("another scheme", "POST", TEXT | {"Origin": "chrome-extension://127.0.0.1"}),
    ("a browser that sends no origin", "POST", TEXT | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}),
    ("another port of this machine", "POST", TEXT | {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate"}),
    ("no browser", "POST", JSON),
]


@pytest.mark.parametrize(("method", "headers"), [case[1:] for case in PAGES], ids=[case[0] for case in PAGES])
def test_nothing_is_made_by_what_has_no_password(server, method, headers):
    before = server.flows()
    status, lines, body = server.send(method, "/api/flows/", headers, FLOW)
    assert status in (401, 403), body
    assert not [line for line in lines if line.startswith("access-control-")]
    assert server.flows() == before


@pytest.mark.parametrize("headers", [case[2] for case in PAGES[:-1]], ids=[case[0] for case in PAGES[:-1]])
def test_a_page_gets_nothing_where_a_browser_adds_the_password(server, headers):
    """Even with all that our own page would send: the door does not need the password."""
    everything = server.credentials | server.token() | headers
    before = server.flows()
    status, lines, _ = server.send("POST", "/api/flows/", everything, FLOW)
    assert status == 403
    assert not [line for line in lines if line.startswith("access-control-")]
    for path in ("/api/deployments/name/study/study", "/api/admin/settings", "/ui-settings", "/openapi.json", "/"):
        status, lines, body = server.send("GET", path, server.credentials | headers)
        assert (status, len(body) < 200) == (403, True), (path, body)
        assert not [line for line in lines if line.startswith("access-control-")]
    assert server.flows() == before


def test_a_change_needs_the_token_besides(server):
    status, _, body = server.send("POST", "/api/flows/", server.credentials | JSON, FLOW)
    assert (status, b"CSRF" in body) == (403, True)
    wrong = {"Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": "wrong"}
    assert server.send("POST", "/api/flows/", server.credentials | JSON | wrong, FLOW)[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1"])
def test_a_preflight_allows_nothing(server, origin):
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": "authorization,content-type"}
    status, lines, _ = server.send("OPTIONS", "/api/flows/", asked)
    assert status == 403
    assert not [line for line in lines if line.startswith("access-control-")]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{}", "127.0.0.1.evil.example:{}", "localhost.:{}", "a@127.0.0.1:{}", "[::2]:{}"],
)
def test_a_name_that_was_made_to_point_here_gets_nothing(server, host):
    """DNS rebinding: for the browser that page and this server are one origin."""
    name = host.format(server.port)
    known = server.credentials | server.token() | JSON | {"Origin": f"http://{name}"}
    before = server.flows()
    for headers in (known, JSON, server.credentials):
        for method, path, content in [("POST", "/api/flows/", FLOW), ("GET", "/api/health", ""), ("GET", "/", "")]:
            status, _, body = server.send(method, path, headers, content, host=name)
            assert (status, len(body) < 200) == (400, True), (path, body)
    assert server.flows() == before


def test_our_own_page_and_client_get_what_they_ask_for(server):
    """The same bytes without the attack, so that what is above can fail; by each of the names, and by a forwarded port."""
    before = server.flows()
    for number, name in enumerate(("127.0.0.1", "localhost", "[::1]", "localhost:1", "LOCALHOST")):
        host = name if name == "localhost:1" else f"{name}:{server.port}"
        own = server.credentials | server.token() | JSON | {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        status, _, body = server.send("POST", "/api/flows/", own, f'{{"name": "ours-{number}"}}', host=host)
        assert status in (200, 201), body
    assert server.flows() - before == {f"ours-{number}" for number in range(5)}
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.send("GET", "/api/health", link)[0] == 200, "a link to it may stand anywhere"
    assert server.send("GET", "/enter", link)[0] == 403, "but none that sets another password"


def test_what_is_open_without_a_password_tells_nothing(server):
    for path in ("/api/health", "/api/ready"):
        status, _, body = server.send("GET", path, {})
        assert (status, len(body) < 40) == (200, True)
    for path in (
        "/api/admin/version",
        "/api/admin/settings",
        "/api/docs",
        "/api/openapi.json",
        "/api/csrf-token?client=x",
    ):
        assert server.send("GET", path, {})[0] == 401, path
    for path in ("/docs", "/redoc"):
        assert server.send("GET", path, {})[0] == 404, "it loads scripts from elsewhere"


def test_no_page_shows_it_in_a_frame(server):
    for path in ("/api/health", "/", "/login"):
        _, lines, _ = server.send("GET", path, {})
        assert "x-frame-options: deny" in lines
        assert any(line.startswith("content-security-policy: ") and "frame-ancestors 'none'" in line for line in lines)


@pytest.mark.parametrize("path", SOCKETS)
def test_a_socket_is_not_for_another_page(server, path):
    handshake = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
    }
    handshake |= {"Sec-WebSocket-Protocol": "prefect"} | server.credentials
    for attack, host in (
        ({"Origin": "http://evil.example"}, None),
        ({"Origin": "null"}, None),
        ({"Origin": "http://evil.example"}, "evil.example"),
        ({}, f"evil.example:{server.port}"),
    ):
        got = server.send("GET", path, handshake | attack, host=host)
        assert got[0] == 403, got
    assert server.send("GET", path, handshake)[0] == 101, "as a client has it"


@pytest.mark.parametrize("path", SOCKETS)
@pytest.mark.parametrize("token", [None, "outliers:guessed"])
def test_a_socket_says_nothing_without_the_password(server, path, token):
    with connect(f"ws://127.0.0.1:{server.port}{path}", subprotocols=["prefect"], proxy=None) as opened:
        with contextlib.suppress(ConnectionClosed):
            opened.send(json.dumps({"type": "auth", "token": token}))
        with pytest.raises(ConnectionClosed):
            opened.recv(20)


def test_the_password_is_in_no_command_line_and_in_no_log(server):
    secret = server.password.partition(":")[2]
    assert len(secret) >= 32
    for pid in server.pids:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            assert secret not in " ".join(one.cmdline())
    assert secret not in server.said
    holding = [path.name for path in server.home.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert holding == ([f"ui-{server.port}.password"] if server.pages else [])


def test_what_it_writes_is_for_the_user_alone(server):
    assert stat.S_IMODE(server.home.stat().st_mode) == 0o700
    files = [path for path in server.home.iterdir() if path.is_file() and not path.name.startswith("worker")]
    assert {"prefect.db", "server.log"} <= {path.name for path in files}
    assert {path.name: oct(path.stat().st_mode & 0o077) for path in files} == {path.name: "0o0" for path in files}


def test_a_person_and_a_command_find_the_password(made_by_ui, monkeypatch):
    file = made_by_ui.home / f"ui-{made_by_ui.port}.password"
    assert f"password    cat {file}" in made_by_ui.said
    monkeypatch.setattr(os, "environ", {"PREFECT_API_URL": f"http://localhost:{made_by_ui.port}/api"})
    server_password.adopt([made_by_ui.home.parent, made_by_ui.home])
    assert os.environ == {
        "PREFECT_API_URL": f"http://127.0.0.1:{made_by_ui.port}/api",
        "PREFECT_API_AUTH_STRING": made_by_ui.password,
    }
    assert asks_for_password(made_by_ui.port)


_OTHERS = """
import os, socket
os.setgid(65534)
os.setuid(65534)
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
while True:
    asked = listening.accept()[0]
    asked.recv(4096)
    asked.sendall(b"HTTP/1.0 200 OK\\r\\nContent-Length: 4\\r\\n\\r\\ntrue")
    asked.close()
"""


_STUDY = """
import sys
from pathlib import Path
from flows.cli.inprocess import settle_prefect
from flows.server.reach import check_server
assert settle_prefect(Path(sys.argv[1])) is None
check_server()
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    client.create_flow_from_name("of-a-command")
"""


def test_a_command_in_another_terminal_is_let_in(made_by_ui, tmp_path):
    """It knows the address alone; the folder is that of the workspace."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    (tmp_path / "prefect").symlink_to(made_by_ui.home)
    environment = kept | {"HOME": str(tmp_path), "PREFECT_API_URL": f"http://localhost:{made_by_ui.port}/api"}
    command = [sys.executable, "-c", _STUDY, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "of-a-command" in made_by_ui.flows()
    (tmp_path / "prefect").unlink()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "refuses these credentials (HTTP 401)" in done.stderr, "who can't read the file is not"


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user")
def test_a_server_of_another_user_is_not_used(tmp_path):
    """Whoever has the port first would else say what our worker runs."""
    process = subprocess.Popen([sys.executable, "-c", _OTHERS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        port = int(process.stdout.readline())
        command = [sys.executable, "-m", "flows.server.ui", "--port", str(port), "--home", str(tmp_path / "home")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    finally:
        process.kill()
        process.communicate()
    # root trusts only itself
    assert (done.returncode, "belongs to another user" in done.stderr) == (2, True), done.stdout + done.stderr


def test_a_server_without_a_password_that_was_there_is_called_that(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listening.accept()[0] as asked:
                        asked.recv(4096)
                        asked.sendall(b'HTTP/1.0 200 OK\r\nContent-Length: 7\r\n\r\n"3.8.8"')

        threading.Thread(target=answer, daemon=True).start()
        check_owner(port)
        with ui.settle_password(port, tmp_path, there=True):
            said = capsys.readouterr().out
        listening.shutdown(socket.SHUT_RDWR)
    assert "NO password" in said
    assert "every page" in said
