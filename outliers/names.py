"""Names: the provider that is this computer, and for a name that is not known the one that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

LOCAL = "local"
"""The provider that is this computer."""


def nearest(name: str, known: Sequence[str]) -> str:
    """` (did you mean ...?)`, where one of the known names is close or goes on where `name` ends; else nothing."""
    begun = [other for other in known if name and other.startswith(name)]
    close = begun[:1] if len(begun) == 1 else difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
