"""JSON from a place that others write to: read whole and plain, or refused.

Python's own reader takes NaN, keys that are there twice, numbers of thousands of digits, and nesting until it gives up.
Whoever computes with the result, shows it, or writes it again would meet these later. It knows no schema: that is checked
next. The bytes are of limited size already. Before it: `beneath`, a bucket. After it: `manifest`, `published_summary`.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64
"""Lists and objects within one another. summary.json has 6; `spec` and `provenance` of a manifest are a program's own."""
MAX_DIGITS = 40
"""Of a whole number: a seed has 20 at most."""


def strict_json(data: bytes) -> Any:
    """The value in `data`. Raises ValueError, which says in what it is not plain JSON."""
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
    raise ValueError(f"{name} is no number of JSON")


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
