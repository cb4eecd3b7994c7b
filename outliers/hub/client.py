"""Requests to the Hugging Face hub: which commit a name means, who may read it, and waiting when the hub asks for it.

`resolve` turns a branch or tag into a commit, so that a study names what can't move, and refuses on the control side what
could not be read later. `use_patient_client` makes the requests of huggingface_hub, and through it those of datasets and
transformers, wait as long as the hub asks. `files` has the names of files, `headers` and `download` their content.
"""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

from outliers.errors import BadInput, HubUnavailable
from outliers.hub.files import INDEX, SHARD, SMALL_SUFFIXES, WEIGHTS_SUFFIX, WHOLE, adapter_files
from outliers.hub.http import httpx

log = logging.getLogger(__name__)

SECONDS = 20
"""Until an answer begins."""
TRIES = 8
"""Failures in a row without progress; if the hub doesn't say how long to wait, they take two minutes."""
NAME_TRIES = 3
"""For the name of a model or data set, which a person waits for."""
LONGEST_WAIT_SECONDS = 300
"""The longest wait that the hub may ask for: its rate limits count windows of five minutes."""
LONGEST_GUESS_SECONDS = 60
"""The longest wait if the hub doesn't ask for one."""
MAY_PASS = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that may change by the next try."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_tries: ContextVar[int] = ContextVar("tries", default=TRIES)
_silent: ContextVar[list[str] | None] = ContextVar("silent", default=None)
"""Inside `waited_for_once`: the names for which there was no connection."""


@dataclass(frozen=True)
class Resolved:
    """What a name on the hub is now: its commit, whether everybody may read it, and how large its weights are."""

    commit: str
    public: bool
    weight_bytes: int | None = None
    """Of the safetensors files that a download fetches; None for a data set, and offline."""


_commits: dict[tuple[str, str, str], Resolved] = {}  # a commit doesn't move: one request a process


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit. `blob` is its name in the cache, `sha256` is known of large files."""

    name: str
    size: int
    blob: str | None = None
    sha256: str | None = None


def resolve(kind: Literal["model", "dataset"], name: str, revision: str | None, refuse: type[BadInput]) -> Resolved:
    """The commit of `revision` (None: main) of a model or data set; offline, what the cache holds.

    Raises `refuse` if it does not exist, this account may not read it, or a model has no safetensors weights;
    HubUnavailable if the hub does not answer.
    """
    from huggingface_hub import constants

    asked = revision or "main"
    if constants.is_offline_mode():
        return _offline(kind, name, asked, refuse)
    key = (kind, name, asked)
    if key in _commits:
        return _commits[key]
    found = _resolve(kind, name, asked, refuse)
    if found.commit == asked:
        _commits[key] = found
    return found


def _resolve(kind: str, name: str, asked: str, refuse: type[BadInput]) -> Resolved:
    from huggingface_hub import HfApi

    silent = _silent.get()
    if silent:
        raise HubUnavailable(
            f"'{name}' is not a folder, a file or a built-in, and the hub, which did not answer for {silent[0]}, was not "
            "asked again"
        )
    use_patient_client()
    api = HfApi()
    try:
        with tries_in_a_row(NAME_TRIES), _asking(kind, name, asked, refuse):
            if kind == "dataset":
                found: Any = api.dataset_info(name, revision=asked, timeout=SECONDS)
            else:
                found = api.model_info(name, revision=asked, timeout=SECONDS, files_metadata=True)
            if found.gated:
                # The description of a gated repository is public; only its files are gated.
                api.auth_check(name, repo_type=kind)
    except HubUnavailable as error:
        if silent is not None and isinstance(error.__context__, httpx.TransportError):
            silent.append(name)
        raise HubUnavailable(f"'{name}' is not a folder, a file or a built-in, and {error}") from error
    public = not found.private and not found.gated
    if kind == "dataset" or found.siblings is None:
        return Resolved(str(found.sha), public)
    _refuse_adapter(name, asked, [file.rfilename for file in found.siblings], refuse)
    weights = [file for file in needed_files(_files(found)) if file.name.endswith(WEIGHTS_SUFFIX)]
    if not weights:
        raise refuse(_no_weights(name, asked, [file.rfilename for file in found.siblings]))
    return Resolved(str(found.sha), public, sum(file.size for file in weights) or None)


def _offline(kind: str, name: str, asked: str, refuse: type[BadInput]) -> Resolved:
    # A streamed data set leaves nothing in the cache, but a corpus made of its commit may be in the workspace.
    pinned = kind == "dataset" and _COMMIT.fullmatch(asked)
    with refusals(kind, name, asked, refuse):  # the cache checks the form of a name first, too
        commit = asked if pinned else _cached_commit(kind, name, asked)
    if commit is None:
        raise refuse(
            f"'{name}' is not a folder, a file or a built-in, and the hub is switched off (HF_HUB_OFFLINE) with nothing cached "
            f"for '{asked}'"
        )
    return Resolved(commit, public=False)


def _cached_commit(kind: str, name: str, revision: str) -> str | None:
    """The commit of a model whose config is in the hub's cache here."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision) if kind == "model" else None
    return Path(found).parent.name if isinstance(found, str) else None


def _refuse_adapter(name: str, asked: str, files: list[str], refuse: type[BadInput]) -> None:
    """Refuse an adapter: transformers would apply it to the checkpoint next to it where peft is installed."""
    adapters = adapter_files(files)
    if adapters:
        place = "next to a checkpoint" if "config.json" in files else "and no model"
        raise refuse(
            f"{name} holds a LoRA adapter at '{asked}' ({', '.join(adapters)}) {place}: which of the two models is meant? Name "
            "the model that it was made for, or a merged one (peft's merge_and_unload)"
        )


def _no_weights(name: str, asked: str, files: list[str]) -> str:
    gguf = sorted(file for file in files if file.endswith(".gguf"))
    if gguf:
        return f"{name} holds GGUF files alone: download one of them, such as {gguf[0]}, and pass its path"
    return (
        f"{name} has no safetensors weights at '{asked}' ({WHOLE}, or shards and {INDEX}); pickled weights (.bin, .pt) are "
        "never loaded"
    )


def list_files(name: str, commit: str, refuse: type[BadInput]) -> tuple[HubFile, ...]:
    """The files of a model at a commit. Raises `refuse`, HubUnavailable."""
    from huggingface_hub import HfApi

    use_patient_client()
    with _asking("model", name, commit, refuse):
        return _files(HfApi().model_info(name, revision=commit, timeout=SECONDS, files_metadata=True))


def _files(found: Any) -> tuple[HubFile, ...]:
    return tuple(
        HubFile(
            name=file.rfilename,
            size=file.size or 0,
            blob=file.lfs.sha256 if file.lfs else file.blob_id,
            sha256=file.lfs.sha256 if file.lfs else None,
        )
        for file in found.siblings or ()
    )


def needed_files(files: tuple[HubFile, ...]) -> tuple[HubFile, ...]:
    """The files that loading a model reads: config, tokenizer, and one copy of the weights, which come last.

    That copy is what transformers looks for: `model.safetensors`, or shards and their index. Other copies are in a subfolder
    (`original/`) or have other names (`consolidated*.safetensors`, `model.fp16.safetensors`).
    """
    top = {file.name: file for file in files if "/" not in file.name}
    weights: list[HubFile] = []
    if WHOLE in top:
        weights = [top[WHOLE]]
    elif INDEX in top:
        found = [file for name, file in top.items() if name.endswith(WEIGHTS_SUFFIX) and "consolidated" not in name]
        weights = [file for file in found if SHARD.fullmatch(file.name)] or found
    small = [
        file for name, file in top.items() if name.endswith(SMALL_SUFFIXES) and not name.endswith(".bin.index.json")
    ]
    return (*small, *weights)


@contextmanager
def refusals(kind: str, name: str, asked: str, refuse: type[BadInput]) -> Iterator[None]:
    """Turn the hub's answers inside the block into errors of this project: `refuse` for good, HubUnavailable for now.

    The caller handles a connection that is cut.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise refuse(f"{name} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise refuse(f"{name} has no revision '{asked}'") from error
    except RepositoryNotFoundError as error:
        raise refuse(
            f"'{name}' is not a folder, a file or a built-in, and no {kind} of the hub that this account may see"
        ) from error
    except RemoteEntryNotFoundError as error:
        raise refuse(f"{name} lacks a file at '{asked}': {plain(error)}") from error
    except HFValidationError as error:
        raise refuse(f"'{name}' is not a folder, a file or a built-in, and no name that the hub could have") from error
    except (httpx.LocalProtocolError, UnicodeEncodeError):
        # the original error shows the header with the token
        raise refuse("HF_TOKEN holds characters that no token has: set it again") from None
    except HfHubHTTPError as error:
        raise _refusal(name, error, refuse) from error


@contextmanager
def _asking(kind: str, name: str, asked: str, refuse: type[BadInput]) -> Iterator[None]:
    """`refusals`, and HubUnavailable if there is no connection."""
    try:
        with refusals(kind, name, asked, refuse):
            yield
    except (httpx.HTTPError, ConnectionError) as error:
        raise HubUnavailable(f"the hub did not answer: {plain(error)}") from error


def _refusal(name: str, error: Any, refuse: type[BadInput]) -> Exception:
    status = error.response.status_code
    if status == 401:
        return refuse(f"the hub refuses the token it was given for {name} (401): set a valid HF_TOKEN, or none")
    if 400 <= status < 500 and status not in MAY_PASS:
        return refuse(f"the hub refuses {name} ({status}): {plain(error)}")
    return HubUnavailable(f"the hub did not answer: {plain(error)}")


def plain(error: BaseException, longest: int = 300) -> str:
    """An error in one line, without the signatures in the URLs of files."""
    words = re.sub(r"\?[\w%]+=[^\s'\")]+", "?...", " ".join(str(error).split()))
    return f"{type(error).__name__}: {words[:longest]}"


@contextmanager
def tries_in_a_row(tries: int) -> Iterator[None]:
    """Limit consecutive failures inside the block to `tries`."""
    token = _tries.set(min(tries, _tries.get()))
    try:
        yield
    finally:
        _tries.reset(token)


@contextmanager
def waited_for_once() -> Iterator[None]:
    """Once the hub could not be reached for one name inside the block, ask for no other."""
    token = _silent.set([])
    try:
        yield
    finally:
        _silent.reset(token)


class Patience:
    """Waits between tries of one request, until too many in a row have failed."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._tries = _tries.get()
        self._failed = 0
        self._began = 0.0

    def progress(self) -> None:
        """Bytes arrived: earlier failures no longer count."""
        self._failed = 0

    def wait(self, reason: str, retry_after_seconds: float | None = None) -> None:
        """Sleep before the next try, as long as the hub asks. Raises HubUnavailable after the last try."""
        self._began = time.monotonic() if self._failed == 0 else self._began
        self._failed += 1
        if self._failed >= self._tries:
            seconds = time.monotonic() - self._began
            raise HubUnavailable(
                f"the hub did not answer in {self._failed} tries over {seconds:.0f} s, the last time with {reason}, for "
                f"{self._what}: try again later" + (", or with an HF_TOKEN, which is allowed more" * ("429" in reason))
            )
        if retry_after_seconds:
            seconds = min(retry_after_seconds, LONGEST_WAIT_SECONDS)
            log.warning("the hub asks to wait %.0f s (%s), for %s", seconds, reason, self._what)
        else:
            seconds = min(2.0 ** (self._failed - 1), LONGEST_GUESS_SECONDS)
            log.warning("the hub did not answer (%s) for %s: trying again in %.0f s", reason, self._what, seconds)
        time.sleep(seconds)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: `Retry-After` in seconds or as a date, or `RateLimit`; None if it doesn't.

    `headers`: names in lower case, or a mapping that ignores case.
    """
    after = headers.get("retry-after", "").strip()
    if after.isdigit():
        return float(after)
    if after:
        try:
            # by the hub's own clock: this machine's may be wrong
            now = headers.get("date")
            then = parsedate_to_datetime(after).timestamp()
            return max(0.0, then - (parsedate_to_datetime(now).timestamp() if now else time.time()))
        except ValueError:
            pass  # not a date either: try the other header
    reset = re.search(r"\bt\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return float(reset[1]) if reset else None


class _PatientClient(httpx.Client):
    """Repeats requests that the hub didn't answer, and waits as it asks, so that no caller takes a failure for an absence.

    It leaves other hosts alone: services that datasets can do without, and storage of files, which `download` handles.
    """

    def __init__(self, endpoint: str) -> None:
        super().__init__(follow_redirects=True, timeout=SECONDS)
        self._hub = httpx.URL(endpoint).netloc

    def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        if request.url.netloc != self._hub:
            return super().send(request, stream=stream, **options)
        patience = Patience(f"{request.method} {request.url.path}")
        while True:
            try:
                response = super().send(request, stream=stream, **options)
            except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
                if request.method not in ("GET", "HEAD"):
                    raise
                patience.wait(type(error).__name__)
                continue
            # A request that changes something is repeated only if the hub says that it did nothing.
            if response.status_code not in (MAY_PASS if request.method in ("GET", "HEAD") else (429,)):
                return response
            response.close()
            patience.wait(str(response.status_code), retry_after_seconds(response.headers))


@functools.cache
def use_patient_client() -> None:
    """Make every request of huggingface_hub in this process wait as the hub asks, and raise HubUnavailable in the end.

    Its own repetitions know `RateLimit` but not `Retry-After`, give up after 25 s, and are not made for names and
    listings. datasets always waits a minute.
    """
    from huggingface_hub import constants, set_client_factory

    set_client_factory(lambda: _PatientClient(constants.ENDPOINT))
