"""Machines, behind one seam (`base`): providers by name.

`local` is this computer. `ssh` (hosts that the user names) and `sky` (rented ones) are planned; each adds a module and
a line to PROVIDERS. Nothing here is imported by a step: it runs the same on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from outliers.errors import BadInput
from outliers.machines.base import Provider
from outliers.machines.local import LocalProvider

PROVIDER_VARIABLE = "OUTLIERS_PROVIDER"
DEFAULT_PROVIDER = "local"

PROVIDERS: dict[str, Callable[[Path], Provider]] = {"local": LocalProvider}
_PLANNED = ("sky", "ssh")


def provider(name: str, workspace: Path) -> Provider:
    """The provider of that name ("": $OUTLIERS_PROVIDER, else local) for a workspace; BadInput lists what there is."""
    chosen = name or os.environ.get(PROVIDER_VARIABLE) or DEFAULT_PROVIDER
    if chosen in PROVIDERS:
        return PROVIDERS[chosen](workspace)
    what = "is planned, but not in this version" if chosen in _PLANNED else "is not known"
    raise BadInput(
        f"provider '{chosen}' {what}: use {', '.join(sorted(PROVIDERS))} (--provider, or ${PROVIDER_VARIABLE})"
    )
