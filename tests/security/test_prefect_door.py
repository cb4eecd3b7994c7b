"""The door and the password of Prefect's servers by themselves: every kind of Host, Origin, password file and address."""

from __future__ import annotations

import asyncio
import os
import stat

import pytest

from flows.server import password as server_password
from flows.server.guard import Guard


def test_a_password_is_new_at_each_start_and_its_file_is_gone_at_the_end(tmp_path):
    first, second = server_password.make(), server_password.make()
    assert first != second
    with server_password.kept(tmp_path, 4200, first):
        (file,) = tmp_path.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert server_password.read(tmp_path, 4200) == first
        assert server_password.read(tmp_path, 4201) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["readable by all", "a link", "a pipe", "a folder", "other words", "a large file"])
def test_a_file_that_is_not_what_was_written_is_no_password(tmp_path, kind):
    path = server_password.file_of(tmp_path, 4200)
    good = server_password.make()
    if kind == "a link":
        (tmp_path / "elsewhere").write_text(good)
        (tmp_path / "elsewhere").chmod(0o600)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "a pipe":
        os.mkfifo(path, 0o600)
    elif kind == "a folder":
        path.mkdir(0o700)
    else:
        path.write_text({"other words": "outliers:\x1b[2J", "a large file": good + "x" * 10_000}.get(kind, good))
        path.chmod(0o644 if kind == "readable by all" else 0o600)
    assert server_password.read(tmp_path, 4200) is None


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://127.0.0.1:4200/api", True),
        ("http://localhost:4200/api", True),
        ("http://127.0.0.1:4201/api", False),
        ("http://127.0.0.1/api", False),
        ("https://127.0.0.1:4200/api", False),
        ("http://[::1]:4200/api", False),  # `make ui` is not there: another user may be
        ("http://127.0.0.2:4200/api", False),
        ("http://evil.example:4200/api", False),
        ("http://127.0.0.1.evil.example:4200/api", False),
        ("http://127.0.0.1:4200@evil.example/api", False),
        ("http://me:mine@127.0.0.1:4200/api", False),
        ("http://127.0.0.1:port/api", False),
        ("", False),
    ],
)
def test_the_password_goes_to_its_own_server_alone(tmp_path, monkeypatch, url, found):
    with server_password.kept(tmp_path, 4200, server_password.make()):
        monkeypatch.setattr(os, "environ", {"PREFECT_API_URL": url})
        server_password.adopt([tmp_path])
        assert ("PREFECT_API_AUTH_STRING" in os.environ) is found
        monkeypatch.setattr(os, "environ", {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": "admin:mine"})
        server_password.adopt([tmp_path])
        assert os.environ["PREFECT_API_AUTH_STRING"] == "admin:mine", "the user's own wins"


class Through:
    """What the door lets pass."""

    def __init__(self) -> None:
        self.passed = False

    async def __call__(self, scope, receive, send) -> None:
        self.passed = True


DOOR = [
    # host, origin, more headers, passes
    ("127.0.0.1:4200", None, {}, True),
    ("prefect.lab", None, {}, True),  # OUTLIERS_UI_HOSTS
    ("prefect.lab:8443", "https://prefect.lab:8443", {}, True),
    ("127.0.0.1:4200", "https://prefect.lab", {}, True),  # a proxy that names us by our own name
    ("127.0.0.1:4200", "https://other.lab", {}, True),  # PREFECT_SERVER_CORS_ALLOWED_ORIGINS
    ("127.0.0.1:4200", "https://other.lab:1", {}, False),
    ("127.0.0.1:4200", "http://localhost:4200", {}, False),
    ("other.lab", None, {}, False),
    ("sub.prefect.lab", None, {}, False),
    ("", None, {}, False),
    (None, None, {}, False),
    ("127.0.0.1:4200", "", {}, False),
    ("127.0.0.1:4200", None, {"host": "127.0.0.1:4200"}, False),  # two
    ("127.0.0.1:4200", "http://127.0.0.1:4200", {"origin": "http://evil.example"}, False),
    ("127.0.0.1:4200", None, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
    (
        "127.0.0.1:4200",
        None,
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
        False,
    ),
    ("127.0.0.1:4200", None, {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, True),
]


@pytest.mark.parametrize(("host", "origin", "more", "passes"), DOOR)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_the_door(kind, host, origin, more, passes):
    """By hand, without a server: every kind of Host and Origin."""
    named = [("host", host), ("origin", origin), *more.items()]
    headers = [(key.encode(), value.encode()) for key, value in named if value is not None]
    app, sent = Through(), []

    async def send(message) -> None:
        sent.append(message)

    guard = Guard(app, ["prefect.lab", ""], ["*", "https://other.lab"])
    asyncio.run(guard({"type": kind, "path": "/api/flows/", "method": "GET", "headers": headers}, None, send))
    assert app.passed is passes
    assert bool(sent) is not passes
