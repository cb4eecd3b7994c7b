"""What may leave the machine: an allow-list by name, by size and by content.

`check_results` looks at every file of a results folder and gives those that may be published, or names the first that
may not. An activation can't pass: not under its own name, not renamed, not inside one of the allowed kinds of file.
It knows nothing of targets. Before it: `results`, `report` wrote the folder. After it: `manifest`, `publish`.
The contents are judged in `contents`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from outliers import contents, runlog
from outliers.errors import ForbiddenFile, PublishRefused
from outliers.files import unfinished_name

MAX_FILE_BYTES = 8_000_000
MAX_STUDY_BYTES = 16_000_000
SUMMARY, TOKENS, FEATURES = "summary.json", "tokens.json", "features.parquet"
REPORT, LOG, MANIFEST = "report.html", "run.log", "manifest.json"
REQUIRED = (SUMMARY, TOKENS, FEATURES)

_NAMES = frozenset({SUMMARY, TOKENS, FEATURES, REPORT, LOG, MANIFEST})
_PLOT = re.compile(r"plots/[a-z0-9_-]{1,100}\.png")
_REMEDY = "take it out of the results folder, or write the study's results again"


@dataclass(frozen=True)
class AllowedFile:
    """A file that may be published: its path in the study, size in bytes, sha256 (hex), and the bytes judged."""

    path: str
    size: int
    sha256: str
    data: bytes = field(repr=False)


def allowed_name(path: str) -> bool:
    """Whether a published file may bear this path, relative to its study, with forward slashes."""
    return path in _NAMES or _PLOT.fullmatch(path) is not None


def check_results(results: Path, include_log: bool = False) -> tuple[AllowedFile, ...]:
    """The files of the folder `results` that may be published, sorted by path; manifest.json is not among them.

    run.log is one of them only with `include_log`, and of a long one its end (`runlog.publishable`). Leftovers of an
    interrupted write are passed over. Raises ForbiddenFile at the first file that is not allowed by name, kind, size or
    content, PublishRefused where one that a study must have is missing.
    """
    paths = [*_listed(results, ""), *(_listed(results, "plots/") if (results / "plots").exists() else ())]
    found = {path: _read(results, path) for path in sorted(paths) if path != MANIFEST and (include_log or path != LOG)}
    for path in REQUIRED:
        if path not in found:
            raise PublishRefused(f"{results} has no {path}: not a finished study; analyze the capture again")
    total = sum(len(data) for data in found.values())
    if total > MAX_STUDY_BYTES:
        largest = max(found, key=lambda path: len(found[path]))
        raise ForbiddenFile(
            f"{results} holds {total:,} bytes, a study publishes at most {MAX_STUDY_BYTES:,}; "
            f"the largest file is {largest} with {len(found[largest]):,}"
        )
    _judge(found)
    return tuple(AllowedFile(path, len(data), hashlib.sha256(data).hexdigest(), data) for path, data in found.items())


def _listed(results: Path, prefix: str) -> list[str]:
    """The paths of the files in one folder; ForbiddenFile for a name, a link or a folder that has no place there."""
    listed: list[str] = []
    try:
        entries = sorted(os.scandir(results / prefix), key=lambda entry: entry.name)
    except OSError as error:
        raise PublishRefused(f"{results / prefix} can't be read: {error.strerror or error}") from error
    for entry in entries:
        path = prefix + entry.name
        unfinished = unfinished_name(entry.name)
        if entry.is_symlink():
            raise _forbidden(path, "is a symbolic link; only files themselves are published")
        if entry.is_dir():
            if path != "plots":
                raise _forbidden(path, "is a folder; the only folder of a study is plots/")
        elif allowed_name(path):
            listed.append(path)
        elif unfinished is None or not allowed_name(prefix + unfinished):
            raise _forbidden(path, f"is not on the allow-list: {', '.join(sorted(_NAMES))}, plots/<a-z0-9_->.png")
    return listed


def _read(results: Path, path: str) -> bytes:
    """The bytes of one file, which must be a regular one within the limit; of a log, what is published of it."""
    try:
        # not followed, not waited for: what was a file when it was listed may be a link or a pipe now
        handle = os.open(results / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise _forbidden(path, "is not a regular file")
            if path == LOG:
                size = os.fstat(handle).st_size
                file.seek(max(0, size - 2 * contents.MAX_LOG_BYTES))
                return runlog.publishable(file.read(2 * contents.MAX_LOG_BYTES), size, contents.MAX_LOG_BYTES)
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PublishRefused(f"{results / path} can't be read: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        size = (results / path).lstat().st_size
        raise _forbidden(path, f"has {size:,} bytes, at most {MAX_FILE_BYTES:,} are published")
    return data


def _judge(found: Mapping[str, bytes]) -> None:
    """ForbiddenFile for the first file whose content is not what its name says; the summary is first."""
    path = SUMMARY
    try:
        summary = contents.check_summary(found[SUMMARY])
        for path, data in found.items():
            if path == TOKENS:
                contents.check_tokens(data, summary)
            elif path == FEATURES:
                contents.check_features(data, summary)
            elif path == REPORT:
                contents.check_report(data, [found[plot] for plot in found if plot.startswith("plots/")])
            elif path == LOG:
                contents.check_log(data)
            elif path != SUMMARY:
                contents.check_png(data)
    except contents.NotAllowedError as error:
        raise _forbidden(path, str(error)) from error


def _forbidden(path: str, why: str) -> ForbiddenFile:
    return ForbiddenFile(f"{path} {why}; {_REMEDY}")
