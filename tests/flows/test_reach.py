"""The Prefect server that the user named is asked first: what is wrong with it is one line, in seconds. Loopback by no proxy."""

from __future__ import annotations

import base64
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    temporary_settings,
)

from flows.server import loopback, reach, ui
from outliers.errors import BadInput
from tests.support import tiny
from tests.support.commands import run_command
from tests.support.s3 import free_ports

ROOT = Path(__file__).resolve().parents[2]
VERSION = "3.8.8"
PASSWORD = "admin:pass:word"


@contextmanager
def answering(answers):
    """A server on loopback that answers GET by path: (status, body); 401 without PASSWORD where that is asked. Its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, body = answers.get(self.path, (404, "{}"))
            wanted = "Basic " + base64.b64encode(PASSWORD.encode()).decode()
            if status == "password":
                status = 200 if self.headers["Authorization"] == wanted else 401
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *words):
            pass

    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


GOOD = {"/api/health": (200, "true"), "/api/admin/version": (200, json.dumps(VERSION))}


def check(url):
    with temporary_settings({PREFECT_API_URL: url}):
        reach.check_server()


@pytest.mark.parametrize("path", ["/api", "/api/"])
def test_a_server_that_is_well_is_asked_two_things(path):
    """A sweep gives its studies the address with a slash at its end."""
    with answering(GOOD) as (url, asked):
        check(url + path)
    assert asked == ["/api/health", "/api/admin/version"]


@pytest.mark.parametrize(
    ("answers", "path", "said"),
    [
        ({}, "/api", "is no Prefect server (HTTP 404)"),
        ({"/api/health": (200, "<html>")}, "/api", "is no Prefect server"),
        ({"/api/health": (200, '"fine"')}, "/api", "is no Prefect server"),
        ({"/api/health": (302, "")}, "/api", "is no Prefect server (HTTP 302)"),
        (GOOD, "", "Its address ends in /api"),
        (GOOD | {"/api/admin/version": (200, "7")}, "/api", "is no Prefect server"),
        (GOOD | {"/api/admin/version": (200, '"2.20.1"')}, "/api", "is Prefect 2.20.1"),
        (GOOD | {"/api/admin/version": (401, "")}, "/api", "refuses these credentials (HTTP 401)"),
        (GOOD | {"/api/admin/version": (403, "")}, "/api", "refuses these credentials (HTTP 403)"),
        ({"/api/health": (403, "")}, "/api", "PREFECT_API_AUTH_STRING must be"),
        ({"/api/health": (503, "")}, "/api", "is not well (HTTP 503)"),
    ],
)
def test_what_is_wrong_with_a_server_is_one_line(answers, path, said):
    with answering(answers) as (url, _), pytest.raises(BadInput) as caught:
        check(url + path)
    assert said in str(caught.value)
    assert url + path in str(caught.value) and "\n" not in str(caught.value)


def test_a_password_is_given_where_one_is_asked_for():
    with answering(GOOD | {"/api/admin/version": ("password", f'"{VERSION}"')}) as (url, _):
        with temporary_settings({PREFECT_API_URL: url + "/api", PREFECT_API_AUTH_STRING: PASSWORD}):
            reach.check_server()
        wrong = temporary_settings({PREFECT_API_URL: url + "/api", PREFECT_API_AUTH_STRING: "admin:other"})
        with wrong, pytest.raises(BadInput, match="HTTP 401"):
            reach.check_server()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:{free}/api", "no Prefect server answers at http://127.0.0.1:"),
        ("http://someone:secret@127.0.0.1:{free}/api", "no Prefect server answers at http://127.0.0.1:"),
        ("https://127.0.0.1:{open}/api", "no Prefect server answers"),  # no TLS there
        ("http://no-such-host.invalid:4200/api", "no Prefect server answers"),
        ("127.0.0.1:4200/api", "is not an address of a Prefect server"),
        ("ftp://127.0.0.1/api", "is not an address of a Prefect server"),
        ("http:///api", "is not an address of a Prefect server"),
        ("http://127.0.0.1:99999/api", "answers at|address"),
    ],
)
def test_an_address_at_which_nobody_is_is_refused_in_seconds(url, said):
    began = time.monotonic()
    with answering(GOOD) as (there, _), pytest.raises(BadInput) as caught:
        check(url.format(free=free_ports(1)[0], open=there.rpartition(":")[2]))
    assert any(part in str(caught.value) for part in said.split("|")), caught.value
    assert "secret" not in str(caught.value)
    assert time.monotonic() - began < 30


def test_a_server_that_says_nothing_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(reach, "READ_SECONDS", 0.5)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(BadInput, match="no Prefect server answers"):
            check(f"http://127.0.0.1:{deaf.getsockname()[1]}/api")


def test_where_no_server_is_named_and_none_may_be_started_nothing_begins():
    none = temporary_settings({PREFECT_SERVER_EPHEMERAL_ENABLED: False}, restore_defaults={PREFECT_API_URL})
    with none, pytest.raises(BadInput, match="PREFECT_SERVER_EPHEMERAL_ENABLED"):
        reach.check_server()
    with temporary_settings({PREFECT_SERVER_EPHEMERAL_ENABLED: True}, restore_defaults={PREFECT_API_URL}):
        reach.check_server()


def test_the_command_refuses_a_dead_server_in_one_line(tmp_path):
    model = tiny.make_model(tmp_path / "model", "Llama", hidden_size=64, num_hidden_layers=8)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    dead = f"http://127.0.0.1:{free_ports(1)[0]}/api"
    options = ["--model", str(model), "--workspace", str(tmp_path / "w"), "--corpus", "builtin:python-docs"]
    words = ("study", *options, "--num-sequences", "2", "--sequence-length", "32")
    done = run_command(tmp_path, *words, environment=kept | {"HOME": str(tmp_path), "PREFECT_API_URL": dead})
    assert done.returncode == 2, done.stderr
    assert f"refused: no Prefect server answers at {dead}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "w").glob("captures/*")), "nothing was run"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PREFECT_API_URL", "http://[::1/api"),
        pytest.param("PREFECT_CLIENT_MAX_RETRIES", "many", marks=pytest.mark.studies),
        pytest.param("PREFECT_LOGGING_LEVEL", "LOUD", marks=pytest.mark.studies),
    ],
)
def test_settings_that_prefect_can_not_read_are_one_line(tmp_path, name, value):
    code = (
        "from flows.server.reach import check_server\ntry:\n    check_server()\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"HOME": str(tmp_path), name: value},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (said,) = done.stdout.strip().splitlines() or [done.stderr]
    assert said.startswith("BadInput Prefect's settings can't be used"), said


# Proxies


class Recorder:
    """A proxy on loopback that answers nothing and notes what it was asked."""

    def __enter__(self):
        self.asked: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def _listen(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                self.asked.append(connection.recv(4096).partition(b"\r\n")[0].decode("latin-1"))

    def __exit__(self, *_):
        self._socket.close()


NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def proxies():
    """Set proxies for a test, and nothing else of them; what the code under test sets is undone too."""
    before = dict(os.environ)
    for name in NAMES:
        os.environ.pop(name, None)
    yield os.environ.update
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_on_loopback_is_asked_by_no_proxy(proxies, name, host):
    with answering(GOOD) as (url, asked), Recorder() as proxy:
        proxies(**{name: proxy.url})
        check(url.replace("127.0.0.1", host) + "/api")
        assert len(asked) == 2
        assert proxy.asked == []
        # whatever else there is on loopback stays as the user has said
        with pytest.raises(httpx.HTTPError):
            httpx.get("http://127.0.0.1:9/other", timeout=5)
        assert len(proxy.asked) == 1


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_what_the_user_listed_stays(proxies, name):
    proxies(HTTP_PROXY="http://127.0.0.1:9", **{name: "example.org, .lab"})
    for _ in range(2):
        loopback.bypass_proxies("http://127.0.0.1:4200/api")
    loopback.bypass_proxies("http://[::1]:4201/api")
    loopback.bypass_proxies("http://prefect.lab.example/api")
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "example.org,.lab,127.0.0.1:4200,::1"
    for url, bypassed in [
        ("127.0.0.1:4200", True),
        ("127.0.0.1:4300", False),
        ("example.org:80", True),
        ("node.lab:80", True),
        ("prefect.lab.example:80", False),
    ]:
        assert bool(urllib.request.proxy_bypass(url)) is bypassed, url
    httpx.Client().close()  # it can read the list


def test_no_proxy_at_all_is_left_alone(proxies):
    proxies(NO_PROXY="*", HTTP_PROXY="http://127.0.0.1:9")
    loopback.bypass_proxies("http://127.0.0.1:4200/api")
    assert os.environ["NO_PROXY"] == "*"


@pytest.mark.parametrize("given", ["socks5://127.0.0.1:9", "nonsense://127.0.0.1:9", "http://[::1"])
def test_a_proxy_that_can_not_be_used_is_one_line(proxies, given):
    proxies(ALL_PROXY=given)
    with answering(GOOD) as (url, _):
        try:
            check(url + "/api")
        except BadInput as error:
            assert "ALL_PROXY" in str(error) and "\n" not in str(error)
        else:
            httpx.Client().close()


def test_make_ui_asks_its_server_by_no_proxy_and_with_its_password(proxies, tmp_path):
    for name in ("PREFECT_API_AUTH_STRING", "PREFECT_HOME", "PREFECT_API_URL"):
        os.environ.pop(name, None)
    os.environ["PREFECT_SERVER_API_AUTH_STRING"] = PASSWORD
    guarded = GOOD | {"/api/admin/version": ("password", f'"{VERSION}"')}
    with answering(guarded) as (url, _), Recorder() as proxy:
        proxies(HTTP_PROXY=proxy.url, ALL_PROXY=proxy.url, NO_PROXY="example.org")
        port = int(url.rpartition(":")[2])
        given = ui.environment(tmp_path, port)
        assert given["NO_PROXY"] == given["no_proxy"] == f"example.org,127.0.0.1:{port}"
        assert given["HTTP_PROXY"] == proxy.url
        assert ui.is_prefect(port)
        assert ui.ask(port, "/admin/version") == VERSION
        os.environ["PREFECT_API_AUTH_STRING"] = "admin:other"
        with pytest.raises(BadInput, match=r"HTTP 401.*PREFECT_API_AUTH_STRING"):
            ui.ask(port, "/admin/version")
        assert proxy.asked == []
