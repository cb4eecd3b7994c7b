"""transformers' report of a checkpoint that it loaded: weights that no file gave, and weights that no module took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Shape = tuple[int, ...]


class Report(NamedTuple):
    """What a loader found: names that no file gave, (name, stored shape, needed shape), and names that no module took."""

    missing: list[str]
    mismatched: list[tuple[str, Shape, Shape]]
    unexpected: list[str]


def read_report(report: Mapping[str, Any]) -> Report:
    """A Report of what `output_loading_info` gives."""
    mismatched = [(str(key), tuple(stored), tuple(needed)) for key, stored, needed in report["mismatched_keys"]]
    return Report(sorted(report["missing_keys"]), sorted(mismatched), sorted(report["unexpected_keys"]))
