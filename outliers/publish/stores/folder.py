"""A folder as an artifact store (file://): a mounted disk, or one that others read over the web."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from outliers.errors import AccessDenied, BadInput, OutliersError, PublishRefused, StoreUnavailable, TargetError
from outliers.files.atomic import temporary_for, unfinished_name, write_new
from outliers.files.beneath import LISTED, REFUSED, read_beneath, remove_beneath, write_beneath
from outliers.publish.stores.base import LISTED_BELOW, MAX_OBJECT_BYTES, Children, Stored, create_in_order, too_many


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

    def create_with(self, files: Mapping[str, bytes], key: str, data: bytes) -> bool:
        return create_in_order(self, files, key, data)

    def list(self, prefix: str) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        waiting = [prefix]
        with self._translated("list", prefix):
            while waiting:
                folder = waiting.pop()
                # another publisher may remove a folder meanwhile
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
                f"{self.url} is not there, or is not a folder; give the URL that studies are published to"
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
