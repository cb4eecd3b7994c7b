"""A name that is not known, and the known one that was probably meant. Knows no kind of name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest(name: str, known: Sequence[str]) -> str:
    """` (did you mean ...?)`, where one of the known names is close or goes on where `name` ends; else nothing."""
    begun = [other for other in known if name and other.startswith(name)]
    close = begun[:1] if len(begun) == 1 else difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
