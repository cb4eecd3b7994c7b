"""JSON from a place that others write to: plain, or refused.

Python's own reader accepts NaN, repeated keys, numbers of thousands of digits, and nesting up to its recursion limit; a
program that computes with the result, shows it, or writes it again would fail later. The size of the bytes is limited
before, and the schema is checked after.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64
"""Depth of lists and objects. summary.json has 6; `spec` and `provenance` of a manifest are a program's own."""
MAX_DIGITS = 40
"""Digits of a whole number: a seed has at most 20."""


def strict_json(data: bytes) -> Any:
    """The value in `data`. Raises ValueError, which says why it is not plain JSON."""
    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    _check_depth(found)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text):,} digits, at most {MAX_DIGITS} are read")
    return int(text)


def _float(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError("a number is beyond float64")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        within = [item for item in level if isinstance(item, dict | list)]
        if not within:
            return
        level = [inner for item in within for inner in (item.values() if isinstance(item, dict) else item)]
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
