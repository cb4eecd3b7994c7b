"""A data set repository of the hub (hf://datasets/ORG/NAME) as an artifact store.

A key is created in a commit whose parent is the commit at which the key was seen to be free. The hub takes such a commit only
while its parent is the head, so of several writers one is first, and the others look again. The files of a study and its
manifest are one commit: no reader sees a part of them. What is read through one store is read at one commit, until it writes.
"""

from __future__ import annotations

import builtins
import random
import threading
import time
from collections.abc import Mapping, Sequence

from outliers.errors import PublishRefused, StoreUnavailable, TargetError
from outliers.files.beneath import LISTED
from outliers.hub.datasets import DatasetRepo, Head, Moved
from outliers.publish.stores.base import LISTED_BELOW, MAX_OBJECT_BYTES, Children, Stored

TRIES = 8
"""Commits of others that may come between reading and writing, before it is left to a later run."""
FIRST_WAIT_SECONDS = 0.5
"""Up to that long before the second try, twice as long before each further one, by chance: two writers must not keep step."""
LONGEST_WAIT_SECONDS = 8.0
MAX_LISTED = 1_000_000
"""Files of a whole store: its names are held in memory."""
OWN_FILES = ("README.md", ".gitattributes", ".gitignore")
"""What a repository has of its own at its top: no study, and not strange there."""
IGNORE = ".gitignore"
MAX_IGNORE_BYTES = 64_000


class DatasetStore:
    """Files below `prefix` of the data set `repo`, for one use (`open.opened`). Threads may share it."""

    def __init__(self, url: str, repo: DatasetRepo, prefix: str) -> None:
        self.url = url
        self._repo = repo
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._head: Head | None = None
        self._names: tuple[str, dict[str, int]] | None = None
        """A commit, and every file below the prefix at it: size in bytes by path."""

    def close(self) -> None:
        """Do nothing: no connection is kept."""

    def check(self) -> None:
        head = self._at()
        self._repo.check_write()
        self._check_ignore(head)

    def read(self, key: str, max_bytes: int = MAX_OBJECT_BYTES) -> bytes | None:
        head = self._at()
        names = self._names
        if names is not None and names[0] == head.commit and self._prefix + key not in names[1]:
            return None
        return self._repo.read(self._prefix + key, head.commit, max_bytes)

    def put(self, key: str, data: bytes) -> None:
        self._commit({key: data}, (), f"put {key}")

    def create(self, key: str, data: bytes) -> bool:
        return self.create_with({}, key, data)

    def create_with(self, files: Mapping[str, bytes], key: str, data: bytes) -> bool:
        made = self._commit({**files, key: data}, (), f"publish {key}", free=key)
        if made is None:
            return False
        self._check_whole({**files, key: data}, made, key)
        return True

    def list(self, prefix: str) -> dict[str, Stored]:
        head = self._at()
        found = self._repo.tree((self._prefix + prefix).rstrip("/"), head.commit, LISTED_BELOW)
        # the time of the newest commit of all: no file is newer, and asking for each one's takes a request for fifty
        return {
            path.removeprefix(self._prefix): Stored(size, head.modified)
            for path, size in found.items()
            if self._prefix or path not in OWN_FILES
        }

    def children(self, prefix: str) -> Children:
        folders, files = dict[str, None](), builtins.list[str]()
        below = self._prefix + prefix
        for path in self._listed():
            name, more, _ = path.removeprefix(below).partition("/")
            if not path.startswith(below) or path in OWN_FILES:
                continue
            if more:
                folders[name] = None
            else:
                files.append(name)
            if len(folders) + len(files) > LISTED:
                return Children([*folders], files, [], whole=False)
        return Children([*folders], files, [], whole=True)

    def delete(self, key: str) -> None:
        self._commit({}, (key,), f"remove {key}")

    def _at(self) -> Head:
        """The commit at which this store is read: the head when it was first asked for."""
        with self._lock:
            if self._head is None:
                self._head = self._repo.head()
            return self._head

    def _listed(self) -> dict[str, int]:
        """Every file below the prefix: one listing answers for all folders, which are many in a store."""
        commit = self._at().commit
        with self._lock:
            # another thread may have written since: names are kept with their commit
            if self._names is None or self._names[0] != commit:
                self._names = commit, self._repo.tree(self._prefix.rstrip("/"), commit, MAX_LISTED)
            return self._names[1]

    def _forget(self) -> None:
        """Read the newest commit from now on."""
        with self._lock:
            self._head, self._names = None, None

    def _commit(
        self, files: Mapping[str, bytes], remove: Sequence[str], message: str, *, free: str | None = None
    ) -> str | None:
        """Write and remove in one commit upon the head; its id. None where the key `free` is taken: nothing is changed."""
        put = {self._prefix + key: data for key, data in files.items()}
        for tried in range(TRIES):
            self._forget()
            head = self._at()
            if free is not None and self._repo.read(self._prefix + free, head.commit, MAX_OBJECT_BYTES) is not None:
                return None
            gone = [self._prefix + key for key in remove]
            gone = [path for path in gone if self._repo.read(path, head.commit, MAX_OBJECT_BYTES) is not None]
            if not put and not gone:
                return head.commit
            self._check_ignore(head)
            try:
                made = self._repo.commit(put, gone, head.commit, f"outliers: {message}"[:200])
            except Moved:
                wait = min(FIRST_WAIT_SECONDS * 2**tried, LONGEST_WAIT_SECONDS)
                time.sleep(wait * random.uniform(0.2, 1.0))
                continue
            except StoreUnavailable:
                # it may have been carried out and the answer lost: then it is there, as written
                if free is not None and self._is_there(free, files[free]):
                    return self._at().commit
                raise
            self._forget()
            return made
        self._forget()
        raise StoreUnavailable(
            f"could not write to {self.url}: the hub said {TRIES} times that another commit came first. Run the same again; if "
            "it stays so, the token may open pull requests there and not commit: give it the right to write"
        )

    def _is_there(self, key: str, data: bytes) -> bool:
        self._forget()
        return self.read(key) == data

    def _check_ignore(self, head: Head) -> None:
        """TargetError where the repository names files that the hub leaves out of a commit without an error."""
        rules = self._repo.read(IGNORE, head.commit, MAX_IGNORE_BYTES)
        lines = [] if rules is None else [line.strip() for line in rules.decode("utf-8", "replace").splitlines()]
        if any(line and not line.startswith("#") for line in lines):
            raise TargetError(
                f"the data set of {self.url} has a {IGNORE}, by which the hub leaves files out of commits: remove it there"
            )

    def _check_whole(self, files: Mapping[str, bytes], commit: str, key: str) -> None:
        """PublishRefused where the hub did not keep all of a commit; the key that names the rest is taken back."""
        folder = (self._prefix + key).rpartition("/")[0]
        found = self._repo.tree(folder, commit, LISTED_BELOW)
        lost = [name for name, data in files.items() if found.get(self._prefix + name) != len(data)]
        if lost:
            self.delete(key)
            raise PublishRefused(
                f"{self.url}/{lost[0]} was committed and is not there as it was written ({found.get(self._prefix + lost[0])} "
                f"bytes instead of {len(files[lost[0]]):,}); {key} was removed again. Look at the data set's settings"
            )
