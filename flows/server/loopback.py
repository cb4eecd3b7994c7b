"""A server on this computer's loopback is reached directly, whatever proxy the shell's variables name for other addresses.

`HTTP_PROXY` without `NO_PROXY` sends requests for 127.0.0.1 to the proxy too, where it is the proxy's own loopback. Only the
server's address and port are excepted: an artifact store on loopback stays as the user configured it. urllib, httpx and
websockets read `NO_PROXY`.
"""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from typing import Any
from urllib.parse import urlsplit


def is_loopback(host: str | None) -> bool:
    """Whether a host's name or address is this computer's loopback, as far as that can be said without asking anybody."""
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def bypass_proxies(url: str) -> None:
    """Add a server on loopback to NO_PROXY of this process and its children; the user's own entries stay."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or {"https": 443}.get(parts.scheme, 80)
    except ValueError:
        return
    if host is None or not is_loopback(host):
        return
    # httpx can't read an IPv6 address with a port there
    name = host if ":" in host else f"{host}:{port}"
    # the lower-case name wins where both are set, also where it is empty, as for all clients that read them
    listed = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    names = [entry.strip() for entry in listed.split(",") if entry.strip()]
    if name not in names and "*" not in names:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*names, name])


def open_direct(request: str | urllib.request.Request, timeout: float) -> Any:
    """`urllib.request.urlopen` of a server on loopback, by no proxy. Raises as that does."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout)
