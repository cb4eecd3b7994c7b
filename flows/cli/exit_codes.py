"""What the command exits with."""

from __future__ import annotations

DONE, FAILED, REFUSED = 0, 1, 2
NOT_TRACKED = 3
"""The study is finished, and the tracker that --track names has it not."""
