"""What `ssh` is given as a host: which names are taken, so that none is an option of ssh or is read by a shell."""

from __future__ import annotations

import re

from outliers.errors import BadInput
from outliers.untrusted.visible import visible_line

_DESTINATION = re.compile(r"[^\s\x00-\x1f\x7f;&|<>$`\"'(){}*?!#]{1,512}")
_SCOPED = re.compile(r"(?<=:)([0-9a-f:.]*)%[0-9A-Za-z]+(?=\]?$)")
"""The interface behind an IPv6 address: elsewhere ssh puts something in the place of a percent sign."""
_WITH_PORT = re.compile(r"(?:([^@/]+)@)?\[?([^@/:\[\]]+)\]?:([0-9]+)")
"""One colon: an IPv6 address has more."""


def check_destination(text: str) -> None:
    """BadInput where `text` can't be what `ssh` calls a host, or has a port, which ssh takes from its configuration.

    ssh's configuration may hand the name to a shell (ProxyCommand, Match exec): it has no character that one reads.
    """
    shown, what = visible_line(text), "user@host, or a name of your ssh configuration"
    # of a user and a host, and of an address, each part
    if text.startswith("-") or "@-" in text or "/-" in text:
        raise BadInput(
            f"'{shown}' is not a valid host name: a name that begins with a dash would be an option of ssh; give {what}"
        )
    host = text.rpartition("@")[2]
    plain = visible_line(text, len(text)) == text and "%" not in _SCOPED.sub("", text)
    if not (_DESTINATION.fullmatch(text) and plain) or not host or "\\" in host or host.startswith("~"):
        raise BadInput(f"'{shown}' is not a valid host name: {what}")
    if with_port := _WITH_PORT.fullmatch(text):
        user, host, port = with_port.groups()
        raise BadInput(
            f"'{text}' is not a valid host name: a port stands in the ssh configuration. "
            f"Put 'Host NAME', 'HostName {host}', 'Port {port}'"
            + (f", 'User {user}'" if user else "")
            + " into ~/.ssh/config, a line each, and use NAME"
        )
