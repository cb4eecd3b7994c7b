"""Artifact stores: the few things that publishing asks of one, for a folder (file://) and for a bucket (s3://).

A store holds small objects under keys. What matters is `create`: of several that create one key at once, exactly one
succeeds, and no reader ever sees a part of an object. Every failure is an error of `outliers.errors`; none carries a
secret. It knows nothing of studies, manifests or what may be published.
Before it: a URL from the spec. After it: `publish`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from outliers.errors import AccessDenied, BadInput, OutliersError, PublishRefused, StoreUnavailable, TargetError
from outliers.files.atomic import temporary_for, unfinished_name, write_new
from outliers.files.beneath import LISTED, REFUSED, read_beneath, remove_beneath, write_beneath

MAX_OBJECT_BYTES = 8_000_000
"""No published file is larger (`allowlist.MAX_FILE_BYTES`)."""
LISTED_BELOW = 100_000
"""Objects below one prefix that `list` names: a study has some dozens."""

_SHAPE = "an artifact store is s3://bucket/prefix or file:///folder"


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


@contextlib.contextmanager
def opened(target: str) -> Iterator[Store]:
    """The store at the URL `target`, closed afterwards; it connects at the first use. TargetError for another URL."""
    store = _store(target)
    try:
        yield store
    finally:
        store.close()


def _store(target: str) -> Store:
    if re.search(r"://[^/]*@", target):
        raise TargetError(f"the target's URL carries a user or password; {_SHAPE}, and keys come from the environment")
    parts = urlsplit(target)
    if parts.query or parts.fragment:
        raise TargetError(f"'{target}' has a query or fragment; {_SHAPE}")
    if parts.scheme == "file" and not parts.netloc and parts.path.strip("/") and parts.path.startswith("/"):
        return FolderStore(target.rstrip("/"), Path(parts.path))
    if parts.scheme == "s3" and parts.netloc:
        try:
            from outliers.publish.stores.bucket import BucketStore
        except ImportError as error:
            message = f"'{target}' needs the package {error.name}: pip install 'outlier-features[flows]'"
            raise TargetError(message) from error
        return BucketStore(target.rstrip("/"), parts.netloc, parts.path.strip("/"))
    raise TargetError(f"'{target}' is no artifact store; {_SHAPE}")


class FolderStore:
    """A folder as a store: keys are relative paths, `create` is a hard link to a finished temporary file."""

    def __init__(self, url: str, root: Path) -> None:
        self.url = url
        self._root = root

    def close(self) -> None:
        """Nothing is held."""

    def check(self) -> None:
        remedy = "give another folder with --publish-to"
        first, second = temporary_for(self._root / "probe"), temporary_for(self._root / "probe")
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            write_new(first, b"probe")
            os.link(first, second)
        except OSError as error:
            why = f"{self.url} can't be written ({error.strerror or error}"
            if first.exists():
                why = f"the file system of {self.url} has no hard links, which publishing needs ({error.strerror}"
            raise TargetError(f"{why}); {remedy}") from error
        finally:
            for probe in (first, second):
                with contextlib.suppress(OSError):
                    probe.unlink(missing_ok=True)

    def read(self, key: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes | None:
        with self._translated("read", key):
            try:
                return read_beneath(self._root, key, max_bytes)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put(self, key: str, data: bytes) -> None:
        with self._translated("write", key):
            self._root.mkdir(parents=True, exist_ok=True)
            write_beneath(self._root, key, data, replace=True)

    def create(self, key: str, data: bytes) -> bool:
        with self._translated("write", key):
            self._root.mkdir(parents=True, exist_ok=True)
            try:
                write_beneath(self._root, key, data, replace=False)
            except FileExistsError:
                return False
            return True

    def list(self, prefix: str) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        waiting = [prefix]
        with self._translated("list", prefix):
            while waiting:
                folder = waiting.pop()
                # another publisher may remove what it lists
                with (
                    contextlib.suppress(FileNotFoundError, NotADirectoryError),
                    os.scandir(self._root / folder) as entries,
                ):
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(f"{folder}{entry.name}/")
                        elif entry.is_file(follow_symlinks=False) and unfinished_name(entry.name) is None:
                            stat = entry.stat(follow_symlinks=False)
                            found[f"{folder}{entry.name}"] = Stored(stat.st_size, stat.st_mtime)
                        if len(found) + len(waiting) > LISTED_BELOW:
                            raise PublishRefused(too_many(f"{self.url}/{prefix}"))
        return dict(sorted(found.items()))

    def children(self, prefix: str) -> Children:
        found = Children([], [], [], whole=True)
        try:
            with os.scandir(self._root / prefix) as entries:
                for number, entry in enumerate(entries):
                    if number == LISTED:
                        return found._replace(whole=False)
                    link, folder = entry.is_symlink(), entry.is_dir(follow_symlinks=False)
                    (found.links if link else found.folders if folder else found.files).append(entry.name)
        except (FileNotFoundError, NotADirectoryError) as error:
            if prefix:  # removed since it was listed
                return Children([], [], [], whole=True)
            raise BadInput(
                f"{self.url} is not there, or is no folder; give the URL that studies are published to"
            ) from error
        except OSError as error:
            raise AccessDenied(f"could not list {self.url}/{prefix}: {error.strerror or error}") from error
        return found

    def delete(self, key: str) -> None:
        with self._translated("remove", key):
            remove_beneath(self._root, key)

    @contextlib.contextmanager
    def _translated(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _disk_error(error, doing, f"{self.url}/{key}") from error


def too_many(url: str) -> str:
    """Why a listing is refused."""
    return f"there are more than {LISTED_BELOW:,} files below {url}, which no study has; look at what they are"


def _disk_error(error: OSError, doing: str, url: str) -> OutliersError:
    why = f"could not {doing} {url}: {error.strerror or error}"
    if error.errno in REFUSED:
        return PublishRefused(f"{why}; remove it there, or give another target")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(f"{why}; ask for the right to write there, or give another folder with --publish-to")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PublishRefused(f"{why}; free some space there (a study takes at most 16 MB) and run the same again")
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTSUP, errno.EINVAL):
        return TargetError(f"{why}; give another folder with --publish-to")
    return StoreUnavailable(f"{why}; is the disk mounted? Run the same again when it is")
