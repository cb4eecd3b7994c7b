"""What may leave: an allow-list of names, sizes and contents.

Numbers leave as they were checked (`contents`), a log where it is asked for; pages and pictures that lie in a folder never
do: they are rendered anew from the numbers (`publishable`). So a file of a results folder is read only where its bytes are
judged. It knows nothing of targets. Before it: `results` wrote the numbers. After it: `publishable`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outliers import contents, runlog
from outliers.errors import ForbiddenFile, PublishRefused
from outliers.files import unfinished_name

MAX_FILE_BYTES = 8_000_000
MAX_STUDY_BYTES = 16_000_000
SUMMARY, TOKENS, FEATURES = "summary.json", "tokens.json", "features.parquet"
REPORT, LOG, MANIFEST = "report.html", "run.log", "manifest.json"
NUMBERS = (SUMMARY, TOKENS, FEATURES)
"""The files that a machine makes and a study must have."""

_NAMES = frozenset({SUMMARY, TOKENS, FEATURES, REPORT, LOG, MANIFEST})
_PLOT = re.compile(r"plots/[a-z0-9_-]{1,100}\.png")
_REMEDY = "take it out of the results folder, or write the study's results again"


@dataclass(frozen=True)
class Numbers:
    """The three files of a study, checked: their bytes by name, and both JSON files parsed."""

    files: Mapping[str, bytes] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    tokens: dict[str, Any] = field(repr=False)


def allowed_name(path: str) -> bool:
    """Whether a published file may bear this path, relative to its study, with forward slashes."""
    return path in _NAMES or _PLOT.fullmatch(path) is not None


def check_numbers(files: Mapping[str, bytes]) -> Numbers:
    """The three files of a study from their bytes. ForbiddenFile for the first that is not what its name says."""
    path = SUMMARY
    try:
        for path in NUMBERS:
            if len(files[path]) > MAX_FILE_BYTES:
                raise _too_large(path, len(files[path]))
        path = SUMMARY
        summary = contents.check_summary(files[SUMMARY])
        path = TOKENS
        contents.check_tokens(files[TOKENS], summary)
        path = FEATURES
        contents.check_features(files[FEATURES], summary)
    except contents.NotAllowedError as error:
        raise _forbidden(path, str(error)) from error
    kept = {name: bytes(files[name]) for name in NUMBERS}
    return Numbers(kept, json.loads(kept[SUMMARY]), json.loads(kept[TOKENS]))


def read_numbers(folder: Path) -> Numbers:
    """The numbers in a folder, whatever else lies there. Raises ForbiddenFile, PublishRefused where one is missing."""
    for name in NUMBERS:
        if not os.path.lexists(folder / name):
            raise PublishRefused(f"{folder} has no {name}: not a finished study; analyze the capture again")
    return check_numbers({name: read_regular(folder, name) for name in NUMBERS})


def read_log(folder: Path) -> bytes | None:
    """What is published of run.log (`runlog.publishable`); None where there is none. ForbiddenFile where it is no text."""
    if not os.path.lexists(folder / LOG):
        return None
    try:
        with _opened(folder, LOG) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - 2 * contents.MAX_LOG_BYTES))
            data = runlog.publishable(file.read(2 * contents.MAX_LOG_BYTES), size, contents.MAX_LOG_BYTES)
        contents.check_log(data)
    except OSError as error:
        raise PublishRefused(f"{folder / LOG} can't be read: {error.strerror or error}") from error
    except contents.NotAllowedError as error:
        raise _forbidden(LOG, str(error)) from error
    return data


def check_listing(folder: Path) -> None:
    """ForbiddenFile for the first thing in a results folder that no study has: another name, a link, a folder.

    Nothing of it would leave; it is refused because whoever put it there may think so. Leftovers of an interrupted write
    are passed over. Raises PublishRefused where the folder can't be read.
    """
    for prefix in ("", "plots/") if (folder / "plots").exists() else ("",):
        try:
            entries = sorted(os.scandir(folder / prefix), key=lambda entry: entry.name)
        except OSError as error:
            raise PublishRefused(f"{folder / prefix} can't be read: {error.strerror or error}") from error
        for entry in entries:
            _check_entry(prefix, entry)


def _check_entry(prefix: str, entry: os.DirEntry[str]) -> None:
    path, unfinished = prefix + entry.name, unfinished_name(entry.name)
    if entry.is_symlink():
        raise _forbidden(path, "is a symbolic link; only files themselves are published")
    if entry.is_dir():
        if path != "plots":
            raise _forbidden(path, "is a folder; the only folder of a study is plots/")
    elif not allowed_name(path) and (unfinished is None or not allowed_name(prefix + unfinished)):
        raise _forbidden(path, f"is not on the allow-list: {', '.join(sorted(_NAMES))}, plots/<a-z0-9_->.png")


def read_regular(folder: Path, path: str, most_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file of a folder, within the limit. ForbiddenFile for anything else, PublishRefused, OSError's."""
    try:
        with _opened(folder, path) as file:
            data: bytes = file.read(most_bytes + 1)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise PublishRefused(f"{folder / path} can't be read: {error.strerror or error}") from error
    if len(data) > most_bytes:
        raise _too_large(path, max(size, len(data)), most_bytes)
    return data


def _opened(folder: Path, path: str) -> Any:
    # not followed, not waited for: what was a file when it was listed may be a link or a pipe now
    handle = os.open(folder / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(handle, "rb", closefd=True) if stat.S_ISREG(os.fstat(handle).st_mode) else None
    if file is None:
        os.close(handle)
        raise _forbidden(path, "is not a regular file")
    return file


def _too_large(path: str, size: int, most_bytes: int = MAX_FILE_BYTES) -> ForbiddenFile:
    return _forbidden(path, f"has {size:,} bytes, at most {most_bytes:,} are published")


def _forbidden(path: str, why: str) -> ForbiddenFile:
    return ForbiddenFile(f"{path} {why}; {_REMEDY}")
