"""What publishing needs from an artifact store, as a protocol.

A store holds small objects under keys. What matters is `create`: of several writers that create one key at once exactly one
succeeds, and no reader ever sees part of an object. Every failure is an error of `outliers.errors`; none carries a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from outliers.errors import StoreUnavailable

MAX_OBJECT_BYTES = 8_000_000
"""No published file is larger (`allowlist.MAX_FILE_BYTES`)."""
LISTED_BELOW = 100_000
"""Objects below one prefix that `list` names; a study has a few dozen."""


@dataclass(frozen=True)
class Stored:
    """One object: its size in bytes and when it was last written, in seconds since 1970 by the store's clock."""

    size_bytes: int
    modified: float


class Children(NamedTuple):
    """The direct children of a prefix, by name and in no order: folders, objects, and links, which are not followed.

    `whole` is False if there are more than LISTED, of which that many are named.
    """

    folders: list[str]
    files: list[str]
    links: list[str]
    whole: bool


class Store(Protocol):
    """Objects under keys such as "a/b/c". Raises AccessDenied, StoreUnavailable, TargetError or PublishRefused."""

    url: str

    def check(self) -> None:
        """Raises unless objects can be read, listed and written."""

    def read(self, key: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes | None:
        """The object's bytes; None if there is none. Raises PublishRefused for more bytes, or what is not a plain object."""

    def put(self, key: str, data: bytes) -> None:
        """Write or replace one object; readers see it whole or not at all."""

    def create(self, key: str, data: bytes) -> bool:
        """Write an object if its key is free; else return False and change nothing."""

    def create_with(self, files: Mapping[str, bytes], key: str, data: bytes) -> bool:
        """Put `files`, see that they are there, then create `key`, which names them; False where that key is taken.

        A reader who sees the key sees the files. Where it is taken, some of `files` may be there, which no one names.
        """

    def list(self, prefix: str) -> dict[str, Stored]:
        """Every object below `prefix` (a key that ends in a slash). Raises PublishRefused for more than LISTED_BELOW."""

    def children(self, prefix: str) -> Children:
        """The direct children of `prefix` (a key that ends in a slash, or nothing)."""

    def delete(self, key: str) -> None:
        """Remove one object, if it is there."""

    def close(self) -> None:
        """Close the connections."""


def create_in_order(store: Store, files: Mapping[str, bytes], key: str, data: bytes) -> bool:
    """`create_with` of a store whose objects are written one by one: the files, a look at them, then the key."""
    for name in sorted(files):
        store.put(name, files[name])
    folders = {name.rpartition("/")[0] for name in files}
    stored = {name: found for folder in folders for name, found in store.list(f"{folder}/").items()}
    for name, content in files.items():
        there = stored.get(name)
        if there is None or there.size_bytes != len(content):
            size = "absent" if there is None else f"{there.size_bytes:,} bytes"
            raise StoreUnavailable(
                f"{store.url}/{name} was written with {len(content):,} bytes and is {size}; run it again"
            )
    return store.create(key, data)


def too_many(url: str) -> str:
    """Why a listing is refused."""
    return f"there are more than {LISTED_BELOW:,} files below {url}, which no study has; look at what they are"
