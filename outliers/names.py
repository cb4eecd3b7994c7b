"""Names: the provider that is this computer, and for a name that is not known the one that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

LOCAL = "local"
"""The provider that is this computer."""


def nearest(name: str, known: Sequence[str]) -> str:
    """` (did you mean ...?)`, if a known name is close to `name` or begins with it; else an empty text."""
    begun = [other for other in known if name and other.startswith(name)]
    close = begun[:1] if len(begun) == 1 else difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
