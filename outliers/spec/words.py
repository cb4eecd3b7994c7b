"""Digests of what is asked for, and what its words say: names of models and texts, logins in URLs."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BUILTIN_NAMES = {"builtin:smollm2": "SmolLM2-135M-Instruct"}
"""What the built-in models are called, by the id that is typed and that stands in ids."""
LOCAL_PREFIX = "local:"
"""Begins the id of a model or text of somebody's own: a hash of its content follows, and no name."""
PUBLIC_NAME = r"^[A-Za-z0-9]([A-Za-z0-9 ._+()-]{0,78}[A-Za-z0-9._+)-])?$"
"""A name under which a model or text of one's own is published. No slash and no colon: it can be taken neither for a path nor for
an id of the hub, of a built-in model or of a hash."""


def short_model_name(model_id: str) -> str:
    """`Qwen3-0.6B`, from a model's id as it is given: nothing is looked up for a name."""
    known = BUILTIN_NAMES.get(model_id)
    return known or model_id.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:").removesuffix(".gguf")


def public_name(model_id: str) -> str:
    """What a model is called where it has no name of its own: a built-in one by its name, others by their id."""
    return BUILTIN_NAMES.get(model_id, model_id)


def path_name(path: str) -> str:
    """The name of a file or folder as a person knows it: `notes.txt` of ~/texts/notes.txt, `texts` of `.` there."""
    given = Path(path)
    if given.name in ("", "..") or (path.startswith("~") and "/" not in path):
        given = given.expanduser().resolve()
    return given.name or str(given)


def has_login(url: str) -> bool:
    """Whether a URL carries a user or password before its host."""
    parts = urlsplit(url)
    return bool(parts.username or parts.password or re.search(r"://[^/]*@", url))


def digest(payload: Any) -> str:
    """sha256 (hex) of `payload` as JSON with sorted keys: the same on every machine, day and hash seed."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
