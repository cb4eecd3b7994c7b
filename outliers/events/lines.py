"""Parses one line of a stream of events as hostile input: a compromised machine may have written it.

A line may hold what the model `_Line` allows; anything else becomes a warning that shows its beginning. Pydantic takes a tenth
of a second to import, too long for the agent on a machine: `stream` imports this module only to read a line.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from outliers.events.event import Event, Level
from outliers.untrusted.bounds import LARGEST, LATEST, LINE_BYTES, MESSAGE_CHARS, NAME_CHARS, parse_json
from outliers.untrusted.visible import cut, last_drawn, visible, visible_line

_BEGIN = b'{"t": '
_TORN = 16
"""Events searched for on one line: a killed writer leaves half an event before the next one."""
_SHOWN_CHARS = 400
"""Characters shown of a line that can't be read."""

_Name = Annotated[str, Field(max_length=NAME_CHARS)]
_Count = Annotated[int, Field(ge=0, le=LARGEST)]


class _Line(BaseModel):
    """As `Event`; further keys, of a newer version, are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    t: Annotated[float, Field(ge=0, le=LATEST, allow_inf_nan=False)]
    kind: Annotated[str, Field(min_length=1, max_length=NAME_CHARS)]
    level: Level = "info"
    message: str = ""
    step: _Name = ""
    done: _Count = 0
    total: _Count | None = None
    unit: _Name = ""


def parse_line(line: bytes, end: int) -> list[Event]:
    """The events of one whole line, which ends at byte `end` of its stream; anything else on it becomes a warning that shows it.

    Raises nothing. A line longer than LINE_BYTES is not read.
    """
    if len(line) > LINE_BYTES:
        return [_unreadable(line, end)]
    found: list[Event] = []
    end_of = end
    for _ in range(_TORN):
        event = _read(line, end_of)
        # A writer that was killed left half a line and another process wrote on. No text of an event holds these
        # bytes, for its quotes are escaped: they are where the whole event begins.
        begin = line.rfind(_BEGIN) if event is None else 0
        if event is not None or begin <= 0:
            return [event or _unreadable(line, end_of), *found]
        found.insert(0, _read(line[begin:], end_of) or _unreadable(line[begin:], end_of))
        line, end_of = line[:begin], end_of - len(line) + begin
    return [_unreadable(line, end_of), *found]


def _read(line: bytes, end: int) -> Event | None:
    try:
        read = _Line.model_validate(parse_json(line))
    except ValueError:  # pydantic's is a ValueError
        return None
    kind, step, unit = (visible_line(text, NAME_CHARS) for text in (read.kind, read.step, read.unit))
    message = visible(cut(read.message, MESSAGE_CHARS))
    return Event(read.t, kind, read.level, message, step, read.done, read.total, unit, end)


def _unreadable(line: bytes, end: int) -> Event:
    # the rest is not shown and need not be decoded
    text = visible_line(last_drawn(line[: 4 * _SHOWN_CHARS]), _SHOWN_CHARS)
    return Event(0.0, "log", level="warning", message=f"unreadable event: {text}", end=end)
