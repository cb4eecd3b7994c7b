"""What the command exits with."""

from __future__ import annotations

DONE, FAILED, REFUSED = 0, 1, 2
