"""Digests of what is asked for, and what its words say: names of models, logins in URLs."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any
from urllib.parse import urlsplit


def short_model_name(model_id: str) -> str:
    """`SmolLM2-135M`, from a model's id as it is given: nothing is looked up for a name."""
    return model_id.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:").removesuffix(".gguf")


def has_login(url: str) -> bool:
    """Whether a URL carries a user or password before its host."""
    parts = urlsplit(url)
    return bool(parts.username or parts.password or re.search(r"://[^/]*@", url))


def digest(payload: Any) -> str:
    """sha256 (hex) of `payload` as JSON with sorted keys: the same on every machine, day and hash seed."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
