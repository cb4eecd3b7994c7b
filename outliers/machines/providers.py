"""Providers by name.

`local` is this computer, `ssh` hosts that the user names, `sky` rented ones. Another is a module and a line in PROVIDERS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from outliers.errors import BadInput
from outliers.machines.base import Provider
from outliers.machines.local import LocalProvider
from outliers.names import LOCAL
from outliers.spec import PROVIDER_VARIABLE, chosen


def _ssh(workspace: Path) -> Provider:
    from outliers.machines.ssh import SshProvider

    return SshProvider(workspace)


def _sky(workspace: Path) -> Provider:
    from outliers.machines.sky import SkyProvider

    return SkyProvider(workspace)


PROVIDERS: dict[str, Callable[[Path], Provider]] = {LOCAL: LocalProvider, "sky": _sky, "ssh": _ssh}


def provider(name: str, workspace: Path) -> Provider:
    """The provider of that name ("": $OUTLIERS_PROVIDER, else local) for a workspace; BadInput lists what there is."""
    meant = chosen(name)
    if meant in PROVIDERS:
        return PROVIDERS[meant](workspace)
    raise BadInput(
        f"provider '{meant}' is not known: use {', '.join(sorted(PROVIDERS))} (--provider, or ${PROVIDER_VARIABLE})"
    )
