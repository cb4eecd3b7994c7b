"""Downloads a model of the hub into the cache of this machine (`cache`).

It runs on the machine that computes, with the base dependencies alone, and needs a commit (`client.resolve`). A killed
download continues from the bytes that it has written, except the last 10 MB, which huggingface_hub holds in memory.
Tested against a server on loopback that speaks the hub's plain HTTP. Not tested: the real hub, and transfers through Xet
(`hf_xet`, with which the real hub serves large files): it keeps its own chunks below HF_HOME and resumes from these.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from outliers.errors import DiskFull, UnknownModel
from outliers.files.atomic import sha256_file
from outliers.hub.cache import CachedModel, cache_for
from outliers.hub.client import (
    MAY_PASS,
    HubFile,
    Patience,
    list_files,
    needed_files,
    plain,
    refusals,
    retry_after_seconds,
    use_patient_client,
)
from outliers.hub.files import WEIGHTS_SUFFIX
from outliers.hub.http import httpx, xet_errors

log = logging.getLogger(__name__)

WORKERS = 4
"""Files at a time: one connection seldom fills the line of a rented machine."""
PROGRESS_SECONDS = 0.5


def download_model(repo_id: str, commit: str, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """The folder with the config, the tokenizer and the safetensors weights of `repo_id` at `commit`.

    Files that are there are not requested again; a complete model needs no request. `progress(done_bytes, total_bytes)`
    is called in the caller's thread. Raises UnknownModel (gated, missing, no safetensors weights, or not here
    and offline), HubUnavailable, DiskFull before anything is written, and OSError if the disk fails.
    """
    from huggingface_hub import constants

    place = cache_for(repo_id, commit)
    missing = place.missing_file()
    if missing is None:
        _report_all(place, progress)
        return place.snapshot
    if constants.is_offline_mode():
        raise UnknownModel(
            f"{missing} of {repo_id} at {commit[:12]} is not in the cache here ({place.folder}), and the hub is switched off "
            "(HF_HUB_OFFLINE): unset it, or download the model first"
        )
    use_patient_client()
    files = needed_files(list_files(repo_id, commit, UnknownModel))
    if not any(file.name.endswith(WEIGHTS_SUFFIX) for file in files):
        raise UnknownModel(f"{repo_id} has no safetensors weights at {commit[:12]}")
    check_disk(place, files)
    fetch_files(place, files, progress)
    missing = place.missing_file()
    if missing is not None:
        raise UnknownModel(f"{repo_id} has no {missing} at {commit[:12]}: transformers can't load it")
    return place.snapshot


def fetch_files(place: CachedModel, files: tuple[HubFile, ...], progress: Callable[[int, int], None] | None) -> None:
    """Fetch files of a model into a cache, a few at a time; what is there is not requested again. Raises as `download_model`."""
    _Download(place, files, progress).run()


def _report_all(place: CachedModel, progress: Callable[[int, int], None] | None) -> None:
    if progress is not None:
        size = sum(path.stat().st_size for path in place.snapshot.iterdir() if path.is_file())
        progress(size, size)


def check_disk(place: CachedModel, files: tuple[HubFile, ...]) -> None:
    """Raises DiskFull if the missing bytes don't fit."""
    place.folder.mkdir(parents=True, exist_ok=True)
    rest = sum(max(0, file.size - place.have(file)) for file in files)
    free = shutil.disk_usage(place.folder).free
    if rest > free:
        raise DiskFull(
            f"{place.repo_id} needs {rest:,} bytes more, and the disk of {place.folder} has {free:,} free: make room, or set "
            "HF_HOME to a larger disk"
        )


@dataclass
class _Download:
    """Fetches one model's files in a few threads, while the caller's thread reports."""

    place: CachedModel
    files: tuple[HubFile, ...]
    progress: Callable[[int, int], None] | None
    failures: list[Exception] = field(default_factory=list)
    given_up: bool = False
    waiting: queue.SimpleQueue[HubFile] = field(default_factory=queue.SimpleQueue)

    def run(self) -> None:
        """Fetch all files; raises the first failure once no thread writes any more."""
        for file in self.files:
            self.waiting.put(file)
        # Daemons: an interrupt does not wait for the end of a file, which continues from its bytes next time.
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(self._work,), daemon=True)
            for _ in range(WORKERS)
        ]
        for thread in threads:
            thread.start()
        try:
            while alive := [thread for thread in threads if thread.is_alive()]:
                self._report()
                alive[0].join(PROGRESS_SECONDS)
        except BaseException:
            self.given_up = True
            raise
        if self.failures:
            raise self.failures[0]
        self._report()

    def _report(self) -> None:
        if self.progress is not None:
            total = sum(file.size for file in self.files)
            self.progress(min(total, sum(self.place.have(file) for file in self.files)), total)

    def _work(self) -> None:
        while not self.failures and not self.given_up:
            try:
                self._fetch(self.waiting.get_nowait())
            except queue.Empty:
                return
            except Exception as error:  # noqa: BLE001 - raised in the caller's thread
                self.failures.append(error)

    def _fetch(self, file: HubFile) -> None:
        """Fetch one file: repeat while bytes arrive, and a few times when none do."""
        patience = Patience(f"{file.name} of {self.place.repo_id}")
        had, parts = self.place.have(file), 0
        while True:
            parts += 0 < had < file.size
            reason = self._try(file)
            if reason is None and parts and not self._is_whole(file):
                reason = _Reason("other bytes than the hub's after going on from a part")
                self.place.discard(file)
            elif reason is None:
                return
            have = self.place.have(file)
            if have > file.size:
                self.place.discard(file)  # longer than the file: no range can continue it
            if have > had:
                patience.progress()
            had = self.place.have(file)
            check_disk(self.place, (file,))
            patience.wait(reason.words, reason.retry_after_seconds)

    def _is_whole(self, file: HubFile) -> bool:
        """Whether a file made of parts has the hub's sha256; if the hub gives none, its size was checked."""
        return file.sha256 is None or sha256_file(self.place.snapshot / file.name) == file.sha256

    def _try(self, file: HubFile) -> _Reason | None:
        """Try once: None if the file is here, else why it isn't yet. Raises what another try would not mend."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        place = self.place
        # cut in the middle of a body; hf_xet raises RuntimeError for every failure
        broken: tuple[type[Exception], ...] = (httpx.TransportError, RuntimeError, *xet_errors())
        with refusals("model", place.repo_id, place.commit, UnknownModel):
            try:
                hf_hub_download(place.repo_id, file.name, revision=place.commit, cache_dir=place.cache)
                return None
            except broken as error:
                return _Reason(plain(error))
            except (HfHubHTTPError, LocalEntryNotFoundError) as error:
                cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
                if not isinstance(cause, HfHubHTTPError):
                    return _Reason(plain(cause))
                if not _may_pass(cause.response):
                    raise cause from error
                return _Reason(str(cause.response.status_code), retry_after_seconds(cause.response.headers))
            except OSError as error:
                if error.errno is not None:
                    raise  # the disk's own
                return _Reason(plain(error))  # huggingface_hub found another size than the hub's


@dataclass(frozen=True)
class _Reason:
    """Why a file is not here yet, and the wait that its server asks for."""

    words: str
    retry_after_seconds: float | None = None


def _may_pass(answer: httpx.Response) -> bool:
    """Whether the next try may get another answer; also if a part was too long, or a signed URL has expired."""
    over = answer.status_code == 403 and "x-error-code" not in answer.headers
    return over or answer.status_code in (416, *MAY_PASS)
