"""One event of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]
LEVELS: dict[Level, int] = {"debug": 10, "info": 20, "warning": 30, "error": 40}
"""As `logging` counts them."""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the stream; fields that its kind does not use keep their defaults.

    `t`: unix seconds. `kind`: log (level, message), progress (step, done, total, unit), heartbeat, or one that a newer
    version made. `end`: the byte offset after this event, from which `read` goes on without losing or doubling one.
    """

    t: float
    kind: str
    level: Level = "info"
    message: str = ""
    step: str = ""
    done: int = 0
    total: int | None = None
    unit: str = ""
    end: int = field(default=0, compare=False)
