"""Records: one JSON object a file, written whole or not at all, read within bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from outliers.files.atomic import write_atomic
from outliers.untrusted.bounds import JSON_BYTES, parse_json


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_atomic(path, json.dumps(value).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file, or it holds no readable object: NaN and numbers of thousands of
    digits are refused, and so is a file of more than JSON_BYTES. Raises OSError for a file that can't be opened."""
    try:
        with path.open("rb") as file:
            data = file.read(JSON_BYTES + 1)
        value = parse_json(data) if len(data) <= JSON_BYTES else None
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None
