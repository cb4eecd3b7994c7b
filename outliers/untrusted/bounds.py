"""Limits on what another machine may send, and a JSON reader that keeps them: a machine's answers may be hostile.

All limits are in this one table. What exceeds one is cut, and marked as cut, where it is only shown; it is refused where
something depends on it.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

LINE_BYTES = 1 << 20
"""One line of a stream of events, and of what an installer prints: fifteen times the longest that our steps write."""
ANSWER_BYTES = 4 << 20
"""Standard output of one command on a host, and its standard error. Our agent's longest answer is a list of captures."""
STDERR_BYTES = 1 << 16
"""What is kept of the standard error of a command that is followed."""
MESSAGE_CHARS = 1 << 16
"""One message of an event or of an error."""
NAME_CHARS = 128
"""A step, a unit, a GPU, a version."""
PATH_CHARS = 4096
LOG_CHARS = 16 << 20
"""What all messages of one step may come to: as many as 200,000 lines."""
STEPS = 64
"""Things that one step of a study counts, each with a bar and an artifact. Ours count three."""
INSTALLER_LINES = 20_000
JSON_BYTES = 32 << 20
"""A file of JSON that a job or a lease wrote, or the study that it is of."""
RESULT_BYTES = 1 << 20
"""result.json of a job."""
RECEIVED_BYTES = 512 << 20
"""A file or folder that is brought home, unpacked. No results folder comes near this; a capture, which must stay where it
is, goes far beyond."""
RECEIVED_FILES = 10_000
JSON_DEPTH = 32
JSON_VALUES = 300_000
LARGEST = (1 << 63) - 1
"""The largest number that a count or a size can be."""
LATEST = 253_402_300_799
"""Unix seconds of the last second of the year 9999: no date is later."""


def parse_json(data: bytes | str, depth: int = JSON_DEPTH) -> Any:
    """The value of a JSON text from outside. Raises ValueError, and nothing else, for text that is not JSON, is nested deeper
    than `depth`, or holds NaN, an infinity or a number of thousands of digits."""
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    try:
        found = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {depth} levels") from None
    _check_depth(found, depth)
    return found


def _check_depth(found: Any, depth: int) -> None:
    """Raises ValueError if a value is nested deeper than `depth`, or holds more than JSON_VALUES."""
    level, count = [found], 0
    for _ in range(depth + 1):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        count += len(level)
        if count > JSON_VALUES:
            raise ValueError(f"it holds more than {JSON_VALUES:,} values")
        if not level:
            return
    raise ValueError(f"it is nested deeper than {depth} levels")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _whole(text: str) -> int:
    # Python's own message speaks of an option of the interpreter
    if len(text) > 40:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_int=_whole, parse_constant=_no_number)
