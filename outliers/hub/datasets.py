"""A data set repository of the hub as something to read and commit to, at commits that are named.

In: a repository, a commit, paths and bytes. Out: bytes, names and sizes, the id of a new commit; errors of `outliers.errors`.
A commit names its parent, and the hub takes it only while that is the head: `Moved` says that it no longer is. Every call
ends within CALL_SECONDS, however the hub fails. The token is the hub's own login (HF_TOKEN, or `hf auth login`), read by
huggingface_hub; it stands in no URL and no message. Knows nothing of studies.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import quote

from outliers.deadline import within
from outliers.errors import AccessDenied, OutliersError, PublishRefused, StoreUnavailable, TargetError
from outliers.hub.client import MAY_PASS, NAME_TRIES, SECONDS, plain, tries_in_a_row, use_patient_client
from outliers.hub.http import httpx, xet_errors

CALL_SECONDS = 90.0
"""One call: three tries of SECONDS each, with what the hub may ask to wait between them, as far as there is room."""
SLOWEST_BYTES_PER_SECOND = 200_000
"""A commit gets the time of its bytes at this rate in addition."""
LISTING_SECONDS = 300.0
"""The names of a whole repository: a page a thousand."""
BRANCH = "main"
NO_TOKEN = "set HF_TOKEN to a token that may write to it, or log in with `hf auth login`"

_Answer = TypeVar("_Answer")


class Moved(PublishRefused):
    """Another commit came first: the one that was named as the parent is no longer the head."""


@dataclass(frozen=True)
class Head:
    """The newest commit of a repository, and when it was made, in seconds since 1970 by the hub's clock; inf: not known."""

    commit: str
    modified: float


class DatasetRepo:
    """The data set `repo` (ORG/NAME) of the hub. Threads may share it; nothing is remembered between two calls."""

    def __init__(self, repo: str, call_seconds: float = CALL_SECONDS) -> None:
        self.repo = repo
        self._seconds = call_seconds

    def head(self) -> Head:
        """The newest commit. Raises TargetError where there is no such data set for this account, AccessDenied."""

        def ask(api: Any) -> Head:
            found = api.dataset_info(self.repo, revision=BRANCH, timeout=SECONDS, expand=["sha", "lastModified"])
            if not found.sha:
                raise TargetError(f"the data set {self.repo} has no commit yet: add a README.md to it on the hub")
            # where the hub does not say when, nothing counts as old
            return Head(str(found.sha), found.last_modified.timestamp() if found.last_modified else math.inf)

        return self._call("read", "", ask)

    def check_write(self) -> None:
        """Raises AccessDenied unless this account may commit; nothing is left there. It needs a token."""
        from huggingface_hub import get_token

        if get_token() is None:
            raise AccessDenied(f"the hub takes no commit to the data set {self.repo} without a token: {NO_TOKEN}")

        def ask(api: Any) -> None:
            # a version without this asks for the right to read; the commit itself then says what is missing
            more = {"write": True} if "write" in inspect.signature(api.auth_check).parameters else {}
            api.auth_check(self.repo, repo_type="dataset", **more)

        self._call("write", "", ask)

    def read(self, path: str, commit: str, max_bytes: int) -> bytes | None:
        """The bytes of the file `path` at `commit`; None if it has no such file. Raises PublishRefused for more bytes."""
        from huggingface_hub.errors import EntryNotFoundError

        # documented there, and not marked as exported for a type checker
        tools = import_module("huggingface_hub.utils")

        def ask(api: Any) -> bytes | None:
            url = f"{api.endpoint}/datasets/{self.repo}/resolve/{commit}/{quote(path)}"
            data = bytearray()
            with tools.get_session().stream("GET", url, headers=tools.build_hf_headers(), timeout=SECONDS) as answer:
                try:
                    tools.hf_raise_for_status(answer)
                except EntryNotFoundError:
                    return None
                for piece in answer.iter_bytes():
                    data += piece
                    if len(data) > max_bytes:
                        return bytes(data)
            return bytes(data)

        found = self._call("read", path, ask)
        if found is not None and len(found) > max_bytes:
            raise PublishRefused(
                f"could not read {path} of the data set {self.repo}: it has more than the {max_bytes:,} bytes that are read; "
                "remove it there, or give another target"
            )
        return found

    def tree(self, folder: str, commit: str, most: int) -> dict[str, int]:
        """Every file below a folder (empty: the whole repository) at a commit: its path and size in bytes.

        An absent folder has none. Raises PublishRefused for more than `most`.
        """
        from huggingface_hub.errors import EntryNotFoundError

        def ask(api: Any) -> dict[str, int]:
            found: dict[str, int] = {}
            options = {"recursive": True, "revision": commit, "repo_type": "dataset"}
            try:
                for entry in api.list_repo_tree(self.repo, folder or None, **options):
                    if (size := getattr(entry, "size", None)) is not None:
                        found[str(entry.path)] = int(size)
                    if len(found) > most:
                        break
            except EntryNotFoundError:
                return {}
            return found

        files = self._call("list", folder, ask, LISTING_SECONDS)
        if len(files) > most:
            place = f"{folder} of the data set {self.repo}" if folder else f"the data set {self.repo}"
            raise PublishRefused(f"there are more than {most:,} files below {place}; give another data set or prefix")
        return files

    def commit(self, files: Mapping[str, bytes], remove: Sequence[str], parent: str, message: str) -> str:
        """Add or replace `files` and remove others in one commit; its id. All of it is there afterwards, or nothing.

        Raises Moved where `parent` is not the head. A call that the hub does not answer may still have been carried out.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def ask(api: Any) -> str:
            adds = [CommitOperationAdd(path, data) for path, data in files.items()]
            options = {"commit_message": message, "repo_type": "dataset", "revision": BRANCH, "parent_commit": parent}
            made = api.create_commit(self.repo, [*adds, *(CommitOperationDelete(path) for path in remove)], **options)
            return str(made.oid)

        size = sum(map(len, files.values()))
        return self._call("write", "", ask, self._seconds + size / SLOWEST_BYTES_PER_SECOND)

    def _call(self, doing: str, path: str, ask: Callable[[Any], _Answer], seconds: float = 0) -> _Answer:
        """Return what `ask` returns within `seconds` (0: the limit of every call). Its errors become errors of `outliers.errors`.

        What huggingface_hub and Xet's client do can't be interrupted: a call that is late goes on in its own thread.
        """
        from huggingface_hub import HfApi, constants

        if constants.is_offline_mode():
            raise TargetError(f"the data set {self.repo} can't be reached: the hub is switched off (HF_HUB_OFFLINE)")
        use_patient_client()
        limit = seconds or self._seconds
        what = f"could not {doing} {f'{path} of ' if path else ''}the data set {self.repo}"

        def work() -> _Answer:
            with tries_in_a_row(NAME_TRIES), _translated(what, self.repo):
                return ask(HfApi())

        try:
            return within(limit, work)
        except TimeoutError as error:
            raise StoreUnavailable(
                f"{what}: the hub did not answer within {limit:.0f} s; run the same again"
            ) from error


@contextmanager
def _translated(what: str, repo: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub and of its HTTP library into those of this project."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    silent: tuple[type[Exception], ...] = (httpx.HTTPError, ConnectionError, *xet_errors())
    try:
        yield
    except OutliersError as error:
        if isinstance(error, StoreUnavailable | PublishRefused | TargetError):
            raise
        raise StoreUnavailable(f"{what}: {error}") from error  # the patient client's HubUnavailable
    except RepositoryNotFoundError as error:
        raise TargetError(
            f"{what}: there is no such data set that this account may see. Make it first (`hf repo create {repo} --repo-type "
            f"dataset`), and {NO_TOKEN}"
        ) from error
    except HFValidationError as error:
        raise TargetError(f"{what}: that is no name that the hub could have; give hf://datasets/ORG/NAME") from error
    except (httpx.LocalProtocolError, UnicodeEncodeError):
        # the original error shows the header with the token
        raise AccessDenied(f"{what}: HF_TOKEN holds characters that no token has; set it again") from None
    except HfHubHTTPError as error:
        raise _refusal(what, error) from error
    except silent as error:
        raise StoreUnavailable(f"{what}: the hub did not answer ({plain(error)}); run the same again") from error
    # a malformed answer, a refusal of the storage of large files, Xet's client, a token file that can't be read
    except (ValueError, RuntimeError, OSError) as error:
        raise StoreUnavailable(f"{what}: {plain(error)}; run the same again") from error


def _refusal(what: str, error: Any) -> OutliersError:
    status = error.response.status_code
    if status in (409, 412):
        return Moved(f"{what}: another commit came first (HTTP {status})")
    if status in (401, 403):
        return AccessDenied(f"{what}: this account may not (HTTP {status}); {NO_TOKEN}")
    if status >= 500 or status in MAY_PASS:
        return StoreUnavailable(f"{what}: HTTP {status} ({plain(error)}); run the same again later")
    return PublishRefused(f"{what}: HTTP {status} ({plain(error)})")
