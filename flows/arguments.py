"""Kinds of arguments that more than one command has."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any


def number(kind: Callable[[str], Any], allowed: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """A number as an option; another is refused with what was given and what is allowed."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if allowed(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"'{text}' is not {what}")

    return read
