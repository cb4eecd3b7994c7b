"""The guard of a Prefect server that this project starts: which requests reach the application at all.

A browser sends requests to loopback on behalf of any page that is open in it. Prefect does not check the `Host` header, and
answers a browser's requests from every origin. Here a request passes only if it names this server by a loopback name (another
name may have been made to point here: DNS rebinding), and if it does not come from a page of another origin. Behind this
guard Prefect asks for the password. The guard knows no Prefect and no password; it wraps the application that
`prefect.server.api.server.create_app` makes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""Names that no page of another server can have. Any port passes: a forwarded port (`ssh -L`) differs from the server's."""
HOSTS = "OUTLIERS_UI_HOSTS"
"""Setting: names, separated by commas, under which a reverse proxy of the user's own offers the server."""
ENTRANCE = "/enter"
"""Path of the page that logs a browser in: the password follows `#`, which a browser does not send."""
CLOSED = ("/docs", "/redoc")
"""Prefect's descriptions of its API load scripts from elsewhere, and a script of this origin can read the password."""

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_ORIGIN = re.compile(r"https?://(.+)")
_POLICY = (
    b"script-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    b"frame-ancestors 'none'"
)
_HEADERS = (
    # no page of another origin may show this one in a frame (clickjacking)
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", _POLICY),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
_SCRIPT = (
    "localStorage.setItem('prefect-password', btoa(decodeURIComponent(location.hash.slice(1))));location.replace('/');"
)
"""Keeps the password as the login page of Prefect's UI does (3.8.8, both UIs)."""
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_PAGE = f"<!doctype html><meta charset=utf-8><title>Prefect</title><script>{_SCRIPT}</script>".encode()


class Guard:
    """An ASGI application that wraps another one. `names`: hosts besides LOOPBACK; `origins`: origins besides its own.

    `entrance`: whether there are pages, and so one that logs a browser in.
    """

    def __init__(
        self, app: Application, names: Iterable[str] = (), origins: Iterable[str] = (), entrance: bool = False
    ) -> None:
        self._app, self._entrance = app, entrance
        self._more = frozenset(name.strip().lower() for name in names if name.strip())
        self._origins = frozenset(origin.strip().lower().rstrip("/") for origin in origins) - {"", "*"}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if scope["type"] == "websocket":
            if refusal is None:
                await self._app(scope, receive, send)
            else:
                # before it is accepted: the server answers 403
                await send({"type": "websocket.close", "code": 1008})
            return
        if refusal is not None:
            await _answer(send, *refusal)
        elif scope["path"] in CLOSED:
            await _answer(send, 404, "this server does not offer that page, which loads scripts from elsewhere\n")
        elif self._entrance and scope["path"] == ENTRANCE and scope["method"] == "GET":
            policy = f"default-src 'none'; script-src 'sha256-{_HASH}'; frame-ancestors 'none'; base-uri 'none'"
            await _answer(send, 200, _PAGE, b"text/html; charset=utf-8", policy.encode())
        else:
            await self._app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """Status and sentence of the answer where the request does not pass."""
        headers: dict[bytes, list[str]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.lower(), []).append(value.decode("latin-1").strip().lower())
        hosts, origins = headers.get(b"host", []), headers.get(b"origin", [])
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            listed = ", ".join(sorted(LOOPBACK | self._more))
            return 400, f"this server answers to these names only: {listed}. {HOSTS} lists more, for `make ui`\n"
        if any(not self._is_own_page(origin, hosts[0]) for origin in origins):
            return 403, "this server answers no page of another origin\n"
        # a link may lead here from anywhere, but not to the page that sets the password
        link = () if scope["path"] == ENTRANCE else _LINK
        if not origins and _is_of_other_page(headers, scope.get("method", ""), link):
            return 403, "this server answers no page of another origin\n"
        return None

    def _is_ours(self, authority: str) -> bool:
        """Whether a host, with or without a port, is one of this server's names."""
        found = _AUTHORITY.fullmatch(authority)
        return found is not None and (found[1] in LOOPBACK or found[1] in self._more)

    def _is_own_page(self, origin: str, host: str) -> bool:
        """Whether a page of that origin is this server's own, as the request names it, or one that the user listed."""
        if origin in self._origins:
            return True
        found = _ORIGIN.fullmatch(origin)
        if found is None:
            return False
        named = _AUTHORITY.fullmatch(found[1])
        # a proxy may use a loopback name for the server, while the browser uses the proxy's name
        return found[1] == host or (named is not None and named[1] in self._more)


_LINK = ("GET", ["navigate"], ["document"])
"""Method, mode and destination with which a browser follows a link."""


def _is_of_other_page(headers: dict[bytes, list[str]], method: str, allowed: tuple[object, ...]) -> bool:
    """Whether a browser says that another page wants this, for itself: an image, a script, a frame. `allowed`: what passes."""
    sites = headers.get(b"sec-fetch-site", [])
    if all(site in ("same-origin", "none") for site in sites):
        return False
    modes, wanted = headers.get(b"sec-fetch-mode"), headers.get(b"sec-fetch-dest")
    return (method, modes, wanted) != allowed


def _with_headers(send: Send) -> Send:
    async def add(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_HEADERS]
        await send(message)

    return add


async def _answer(
    send: Send, status: int, text: str | bytes, kind: bytes = b"text/plain; charset=utf-8", policy: bytes | None = None
) -> None:
    body = text.encode() if isinstance(text, str) else text
    headers = [
        (name, policy if policy is not None and name == b"content-security-policy" else value)
        for name, value in _HEADERS
    ]
    headers += [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
