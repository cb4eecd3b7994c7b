"""Limits and types of the fields of a study's files, and the strict base of their models.

The limits bound memory: a reader allocates nothing that these do not allow. Strings have a length, lists have a length, and
numbers are finite.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from outliers.spec import PUBLIC_NAME

MAX_LAYERS = 1_024
MAX_FEATURES = 1 << 17
MAX_MAGNITUDES = 33
"""The ladder's 32 and the deciding one."""
MAX_MASSIVE = 1_000
MAX_QUANTILES = 16
MAX_BINS = 4_096
MAX_TOP = 100
MAX_TOKEN_FEATURES = 1_024

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Counts = Annotated[list[Count], Field(max_length=MAX_MAGNITUDES)]
"""One count for each magnitude of a ladder."""
Layer = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
Feature = Annotated[int, Field(ge=0, lt=MAX_FEATURES)]
FeatureNumbers = Annotated[list[Feature], Field(max_length=MAX_FEATURES)]
Share = Annotated[float, Field(ge=0, le=1)]
Ends = Annotated[list[Share], Field(min_length=2, max_length=2)]
"""The low and the high end of a share."""
Number = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=300)]
# A folder of this machine is not a name: neither /home/me/model nor ~/model nor C:\model.
PublicName = Annotated[str, Field(min_length=1, max_length=300, pattern=r"^[A-Za-z0-9][^\\]*$")]
GivenName = Annotated[str, Field(pattern=PUBLIC_NAME)]
"""What somebody calls a model or text of his own in what he publishes."""
Note = Annotated[str, Field(max_length=1_000)]
Context = Annotated[str, Field(max_length=400)]
Digest = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class Strict(BaseModel):
    """A part of a file: exact types, finite numbers, and no key that is not described.

    A reader that must accept what a newer program adds validates with `extra="ignore"`, which holds for nested parts too.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def check_unique(keys: Iterable[Hashable], what: str) -> None:
    """Raise ValueError for the first key that repeats."""
    seen: set[Hashable] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"{what} {key} is there twice")
        seen.add(key)


def check_ascending(values: list[int] | list[float], what: str) -> None:
    """Raise ValueError unless each value is larger than the one before it."""
    if any(a >= b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{what} are not in ascending order")


def other_version(error: ValidationError) -> int | None:
    """The schema_version of a file that is of another format; None where that is not what is wrong."""
    for item in error.errors(include_url=False):
        if item["loc"] == ("schema_version",) and type(item["input"]) is int:
            return item["input"]
    return None


def first_error(error: ValidationError) -> str:
    """The place and the first error there, in printable characters: a place may be a key of untrusted JSON."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(step) for step in first["loc"])[:200] or "the file"
    return "".join(char if char.isprintable() else "\ufffd" for char in f"{place}: {first['msg']}")
