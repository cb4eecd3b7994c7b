"""What may leave: an allow-list of names, sizes and contents.

Numbers leave as they were checked (`contents`), a log where it is asked for; pages and pictures that lie in a folder never
do: they are rendered anew from the numbers (`publishable`). So a file of a results folder is read only where its bytes are
judged. It knows nothing of targets.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outliers.errors import ForbiddenFile, PublishRefused
from outliers.files.atomic import unfinished_name
from outliers.files.beneath import REFUSED, open_beneath, read_beneath
from outliers.publish import contents, runlog

MAX_FILE_BYTES = 8_000_000
MAX_STUDY_BYTES = 16_000_000
SUMMARY, TOKENS, FEATURES = "summary.json", "tokens.json", "features.parquet"
QUANTIZATION = "quantization.parquet"
EXPERTS, ROUTER = "experts.parquet", "router.parquet"
PICTURES = "pictures.json"
REPORT, LOG, MANIFEST = "report.html", "run.log", "manifest.json"
ADVICE = "advice.json"
"""Of a probe, next to its own manifest (`publish.probes`)."""
NUMBERS = (SUMMARY, TOKENS, FEATURES)
"""The files that a machine makes and a study must have."""
OPTIONAL = (QUANTIZATION, EXPERTS, ROUTER, PICTURES)
"""Numbers of some studies: the errors of number formats where they are asked for, what the experts of a mixture do, and what the
pictures need besides, which studies made before it lack."""

_NAMES = frozenset({*NUMBERS, *OPTIONAL, REPORT, LOG, MANIFEST})
_PLOT = re.compile(r"plots/[a-z0-9_-]{1,100}\.png")
_REMEDY = "take it out of the results folder, or write the study's results again"


@dataclass(frozen=True)
class Numbers:
    """The numbers of a study, checked: their bytes by name, and both JSON files parsed."""

    files: Mapping[str, bytes] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    tokens: dict[str, Any] = field(repr=False)


def allowed_name(path: str) -> bool:
    """Whether a published file may bear this path, relative to its study, with forward slashes."""
    return path in _NAMES or _PLOT.fullmatch(path) is not None


def number_names(present: Collection[str]) -> tuple[str, ...]:
    """Names of a study's numbers: those that each has, and of the optional ones those among `present`."""
    return (*NUMBERS, *(name for name in OPTIONAL if name in present))


def numbers_in(folder: Path) -> tuple[str, ...]:
    """`number_names` of the files in a folder."""
    return number_names([name for name in OPTIONAL if os.path.lexists(folder / name)])


def check_numbers(files: Mapping[str, bytes]) -> Numbers:
    """The numbers of a study from their bytes. ForbiddenFile for the first that is not what its name says."""
    path, names = SUMMARY, number_names(files)
    try:
        for path in names:
            if len(files[path]) > MAX_FILE_BYTES:
                raise _forbidden(path, f"has {len(files[path]):,} bytes, at most {MAX_FILE_BYTES:,} are published")
        path = SUMMARY
        summary = contents.check_summary(files[SUMMARY])
        path = TOKENS
        contents.check_tokens(files[TOKENS], summary)
        path = FEATURES
        contents.check_features(files[FEATURES], summary)
        path = QUANTIZATION
        contents.check_quantization(files.get(QUANTIZATION), summary)
        path = EXPERTS
        contents.check_experts(files.get(EXPERTS), summary)
        path = ROUTER
        contents.check_router(files.get(ROUTER), summary)
        contents.check_agreement(files.get(EXPERTS), files.get(ROUTER))
        path = PICTURES
        contents.check_pictures(files.get(PICTURES), summary)
    except contents.NotAllowedError as error:
        raise _forbidden(path, str(error)) from error
    kept = {name: bytes(files[name]) for name in names}
    return Numbers(kept, json.loads(kept[SUMMARY]), json.loads(kept[TOKENS]))


def read_numbers(folder: Path) -> Numbers:
    """The numbers in a folder, whatever else lies there. Raises ForbiddenFile, PublishRefused where one is missing."""
    for name in NUMBERS:
        if not os.path.lexists(folder / name):
            raise PublishRefused(f"{folder} has no {name}: not a finished study; analyze the capture again")
    return check_numbers({name: read_regular(folder, name) for name in numbers_in(folder)})


def read_log(folder: Path, words: Mapping[str, str] | None = None) -> bytes | None:
    """What is published of run.log (`runlog.publishable`); None without a run.log. ForbiddenFile where it is not text.

    words: names that are not published, each with what stands for it.
    """
    if not os.path.lexists(folder / LOG):
        return None
    try:
        with open_beneath(folder, LOG) as handle, os.fdopen(os.dup(handle), "rb") as file:
            size = os.fstat(handle).st_size
            file.seek(max(0, size - 2 * contents.MAX_LOG_BYTES))
            data = runlog.publishable(file.read(2 * contents.MAX_LOG_BYTES), size, contents.MAX_LOG_BYTES)
        contents.check_log(data)
        data = runlog.rename(data.decode(), words or {}).encode()
    except OSError as error:
        raise _unread(folder, LOG, error) from error
    except contents.NotAllowedError as error:
        raise _forbidden(LOG, str(error)) from error
    return data


def check_listing(folder: Path) -> None:
    """ForbiddenFile for the first thing in a results folder that no study has: another name, a link, a folder.

    Nothing of it would leave; it is refused because the person who put it there may expect that it does. Leftovers of an
    interrupted write are passed over. Raises PublishRefused where the folder can't be read.
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
        # probes/ has manifests of its own (`publish.probes`)
        if path not in ("plots", "probes"):
            raise _forbidden(path, "is a folder; the only folders of a study are plots/ and probes/")
    elif not allowed_name(path) and (unfinished is None or not allowed_name(prefix + unfinished)):
        raise _forbidden(path, f"is not on the allow-list: {', '.join(sorted(_NAMES))}, plots/<a-z0-9_->.png")


def read_regular(folder: Path, path: str, most_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file of a folder, within the limit. ForbiddenFile for anything else, PublishRefused where it can't
    be read."""
    try:
        return read_beneath(folder, path, most_bytes)
    except OSError as error:
        raise _unread(folder, path, error) from error


def _unread(folder: Path, path: str, error: OSError) -> PublishRefused:
    """A ForbiddenFile, which is a PublishRefused, for a file that may not be read as it is."""
    if error.errno in REFUSED:
        return _forbidden(path, f"can't be read: {error.strerror}")
    return PublishRefused(f"{folder / path} can't be read: {error.strerror or error}")


def _forbidden(path: str, why: str) -> ForbiddenFile:
    return ForbiddenFile(f"{path} {why}; {_REMEDY}")
