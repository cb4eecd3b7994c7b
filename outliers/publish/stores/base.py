"""Artifact stores: the few things that publishing asks of one.

A store holds small objects under keys. What matters is `create`: of several that create one key at once, exactly one
succeeds, and no reader ever sees a part of an object. Every failure is an error of `outliers.errors`; none carries a
secret. It knows nothing of studies, manifests or what may be published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

MAX_OBJECT_BYTES = 8_000_000
"""No published file is larger (`allowlist.MAX_FILE_BYTES`)."""
LISTED_BELOW = 100_000
"""Objects below one prefix that `list` names: a study has some dozens."""


@dataclass(frozen=True)
class Stored:
    """One object: its size in bytes and when it was last written, in seconds since 1970 by the store's clock."""

    size_bytes: int
    modified: float


class Children(NamedTuple):
    """What is right below a prefix, by name and in no order: folders, objects, and links, which are not followed.

    `whole` is False where there are more than LISTED, of which so many are named.
    """

    folders: list[str]
    files: list[str]
    links: list[str]
    whole: bool


class Store(Protocol):
    """Objects under keys such as "a/b/c". Raises AccessDenied, StoreUnavailable, TargetError or PublishRefused."""

    url: str

    def check(self) -> None:
        """Does nothing where an object could be read, listed and written; raises what is in the way otherwise."""

    def read(self, key: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes | None:
        """The object's bytes; None where there is none. PublishRefused where it is no plain object, or has more bytes."""

    def put(self, key: str, data: bytes) -> None:
        """Writes or replaces one object; it is seen whole or not at all."""

    def create(self, key: str, data: bytes) -> bool:
        """Writes one object where there is none; False, and nothing changed, where there is one."""

    def list(self, prefix: str) -> dict[str, Stored]:
        """Every object below `prefix` (a key that ends in a slash). PublishRefused for more than LISTED_BELOW."""

    def children(self, prefix: str) -> Children:
        """What is right below `prefix` (a key that ends in a slash, or nothing); nothing further down is listed."""

    def delete(self, key: str) -> None:
        """Removes one object, if it is there."""

    def close(self) -> None:
        """Gives back connections."""


def too_many(url: str) -> str:
    """Why a listing is refused."""
    return f"there are more than {LISTED_BELOW:,} files below {url}, which no study has; look at what they are"
