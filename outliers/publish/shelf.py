"""Reading an artifact store as a whole: every study that is published there, and whatever else lies there.

    <target>/<model slug>/<study_id>/manifest.json      read for each study
    <target>/<model slug>/<study_id>/<folder>/summary.json      read only where it is asked for
    <target>/<model slug>/<study_id>/probes/<probe_id>/advice.json      the same, of MOST_PROBES at most

Slugs and study ids are listed by delimiter, the files below a study never are: a store of S models costs 1 + S listings
and one or two small reads a study; where summaries are asked for, one listing more a study, of its probes. It writes nothing
and judges no number.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outliers.errors import AccessDenied, BadInput, DamagedResults, OutliersError, PublishRefused, TargetError
from outliers.files.atomic import unfinished_name
from outliers.files.beneath import LISTED
from outliers.publish.allowlist import ADVICE, MANIFEST, SUMMARY
from outliers.publish.finished import REMEDY, read_finished
from outliers.publish.manifest import MAX_MANIFEST_BYTES, headline_of, parse_manifest, slug_safe
from outliers.publish.stores.base import Store
from outliers.publish.stores.open import opened
from outliers.untrusted.strict_json import strict_json
from outliers.untrusted.visible import visible_line, visible_values

WORKERS = 10
"""Reads under way at once: as many connections as botocore keeps open; one more would wait for one of them."""

LOOKED_INTO = 3
"""Most folders of each kind that are read to distinguish a store from a study."""
MOST_PROBES = 8
"""Probes of one study whose verdicts are read."""
MAX_PLACES = 50_000
"""Folders of studies that are read of one store."""
MAX_WHY = 600
"""Characters of a reason: a URL, and a sentence or two."""
ENTRY_ERRORS = (
    AccessDenied,
    PublishRefused,
    TargetError,
    ArithmeticError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What one study may raise without being in the way of the others. The checks refuse with the first three; the rest are what
content that they let through by mistake would raise."""


@dataclass(frozen=True)
class Published:
    """One study at a target: `url` is its folder, `files` the verified bytes of those of its files that were asked for.

    In the strings of `manifest` every character that acts on a terminal is an escape (`visible`).
    """

    url: str
    manifest: dict[str, Any]
    files: Mapping[str, bytes] = field(repr=False, default_factory=dict)
    verdicts: tuple[bytes, ...] = field(repr=False, default=())
    """advice.json of each of its probes, as it lies there; nothing of it is checked yet."""

    @property
    def summary(self) -> bytes | None:
        """The bytes of summary.json, which were read by `strict_json`; None where it was not asked for."""
        return self.files.get(SUMMARY)


@dataclass(frozen=True)
class Skipped:
    """Something in a store that can't be read as a study, and why; both are one line of visible characters."""

    url: str
    why: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", visible_line(self.url, MAX_WHY))
        object.__setattr__(self, "why", visible_line(self.why, MAX_WHY))


@dataclass(frozen=True)
class StoreListing:
    """What a store holds: its studies by URL, what was skipped, and how many studies were not wanted."""

    url: str
    studies: tuple[Published, ...]
    skipped: tuple[Skipped, ...]
    unwanted: int


def read_store(
    target: str, *, summaries: bool, wanted: Callable[[Mapping[str, Any]], bool] = lambda headline: True
) -> StoreListing:
    """Every study published at `target` whose manifest's headline is `wanted`; with `summaries`, their summary.json too.

    Torn, foreign, newer and half-published things are skipped and named, and so is what must not be read as it is: a link, a
    pipe, too large a file, a malformed one, a folder that can't be opened. Raises BadInput where there is no study at all,
    TargetError, AccessDenied, or StoreUnavailable where the store can't be read.
    """
    with opened(target) as store:
        # the first listing is alone: it opens the connection that the others share
        slugs, skipped = _folders(store, "")
        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                places: list[str] = []
                for slug, (ids, strange) in zip(
                    slugs, pool.map(functools.partial(_folders_of, store), (f"{slug}/" for slug in slugs)), strict=True
                ):
                    places += [f"{slug}/{study_id}" for study_id in ids]
                    skipped += strange
                if len(places) > MAX_PLACES:
                    many = f"{store.url} has {len(places):,} folders of studies; the first {MAX_PLACES:,} are read"
                    skipped.append(Skipped(store.url, many))
                read = functools.partial(_read, store, names=(SUMMARY,) if summaries else (), wanted=wanted)
                found = list(pool.map(read, places[:MAX_PLACES]))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # a store that is gone is not asked a thousand times more
                raise
        skipped += [item for item in found if isinstance(item, Skipped)]
        studies = [item for item in found if isinstance(item, Published)]
        if not studies and None not in found:
            raise BadInput(_nothing(store, skipped))
        return StoreListing(store.url, tuple(studies), tuple(skipped), sum(item is None for item in found))


def _nothing(store: Store, skipped: Sequence[Skipped]) -> str:
    """A message for a store without studies, and what to do: it may be the folder of one, or still empty."""
    above = store.url.rpartition("/")[0]
    for item in skipped:
        if item.url == f"{store.url}/{MANIFEST}":
            return f"{store.url} is one study; give the store it is in, {above.rpartition('/')[0]}"
        if item.url.endswith(f"/{MANIFEST}"):
            return f"{store.url} is the folder of one model; give the store it is in, {above}"
    if skipped:  # each says itself what to do about it
        what = "the one thing there" if len(skipped) == 1 else f"of the {len(skipped):,} things there the first"
        return f"{store.url} holds no study that can be read; {what}: {skipped[0].why}"
    return f"{store.url} holds no published study yet; publish one: outliers study --publish-to {store.url}"


def read_folders(results: Path) -> StoreListing:
    """The finished studies of a workspace's folder `results`, by model and id, without their summaries.

    Every file of them is checked; what is damaged is skipped and named. Raises BadInput where there is none.
    """
    studies: list[Published] = []
    folders, links = _results_folders(results)
    skipped = [Skipped(str(place), f"{place} is a symbolic link, which is not followed") for place in links]
    for folder in folders:
        try:
            found = read_finished(folder)
        except DamagedResults as error:
            skipped.append(Skipped(str(folder), f"{error}; {REMEDY}"))
            continue
        except ENTRY_ERRORS as error:
            skipped.append(Skipped(str(folder), f"{folder} can't be read ({format_error(error)}); {REMEDY}"))
            continue
        if found is not None:
            studies.append(Published(str(folder), visible_values(found.manifest)))
    if not studies and not skipped:
        raise BadInput(f"there is no finished study in {results}: run one with `outliers study`")
    studies.sort(key=lambda study: (study.manifest["headline"]["model"], study.manifest["study_id"]))
    return StoreListing(str(results), tuple(studies), tuple(skipped), 0)


def _results_folders(results: Path) -> tuple[list[Path], list[Path]]:
    """The folders in a results folder, and the links there, which are not followed; at most LISTED names are looked at."""
    folders, links = list[Path](), list[Path]()
    try:
        with os.scandir(results) as entries:
            for _, entry in zip(range(LISTED), entries, strict=False):
                if entry.is_symlink():
                    links.append(results / entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(results / entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    except OSError as error:
        raise BadInput(f"{results} can't be listed: {error.strerror or error}") from error
    return sorted(folders), sorted(links)


def format_error(error: BaseException) -> str:
    """An error of another library, in few words."""
    return f"{type(error).__name__}: {error}"[:200]


def read_study(url: str, names: Sequence[str] = (SUMMARY,)) -> Published:
    """The published study at `url` (its folder or manifest), with those of its files, which are verified.

    Raises BadInput where there is none or `url` is not that of a study, PublishRefused where it is damaged.
    """
    target, place = split_url(url)
    with opened(target) as store:
        found = _read(store, place, names=names, wanted=lambda headline: True)
        if isinstance(found, Published):
            return found
        why = found.why if found is not None else f"{url} is not a study"
        kind, shelf = _folder_of_studies(store, place) or (None, target)
        why = why if kind is None else f"{store.url}/{place} is not a study, it is {kind}"
        raise BadInput(f"{why}; `outliers runs list {shelf}` lists what is there")


def _folder_of_studies(store: Store, place: str) -> tuple[str, str] | None:
    """What a place without a manifest is, if studies are below it, and the URL of the store they are in."""
    try:
        folders, files, *_ = store.children(f"{place}/")
        for name in [] if MANIFEST in files else sorted(folders)[:LOOKED_INTO]:
            below, within, *_ = store.children(f"{place}/{name}/")
            if MANIFEST in within:
                return "the folder of one model", f"{store.url}/{place}".rpartition("/")[0]
            if any(MANIFEST in store.children(f"{place}/{name}/{own}/").files for own in sorted(below)[:LOOKED_INTO]):
                return "an artifact store", f"{store.url}/{place}"
    except OutliersError:  # who may read one study need not be allowed to list
        return None
    return None


def split_url(url: str) -> tuple[str, str]:
    """TARGET and `<model>/<study_id>` of a study's URL. Raises BadInput for another URL."""
    parts = url.rstrip("/").removesuffix(f"/{MANIFEST}").rsplit("/", 2)
    if len(parts) < 3 or not parts[0].rstrip("/").partition("://")[2]:
        raise BadInput(
            f"{url} is not TARGET/<model>/<study_id>, as `outliers study` prints it; `outliers runs list TARGET` lists all"
        )
    return parts[0], f"{parts[1]}/{parts[2]}"


def _read(
    store: Store, place: str, *, names: Sequence[str], wanted: Callable[[Mapping[str, Any]], bool]
) -> Published | Skipped | None:
    """The study in one folder; None where it is not wanted."""
    url = f"{store.url}/{place}"
    try:
        data = store.read(f"{place}/{MANIFEST}", MAX_MANIFEST_BYTES)
        if data is None:
            return Skipped(url, f"{url} has no {MANIFEST}: nothing is published there, or not yet")
        manifest = parse_manifest(data, f"{url}/{MANIFEST}")
        if manifest["study_id"] != place.rpartition("/")[2]:
            return Skipped(url, f"the manifest of {url} is of the study {manifest['study_id']}; remove it")
        if not wanted(manifest["headline"]):
            return None
        files = {name: _file(store, place, manifest, name) for name in names}
        if SUMMARY in files:
            _check_summary(url, manifest, files[SUMMARY])
        verdicts = _verdicts(store, place) if SUMMARY in files else ()
        return Published(url, visible_values(manifest), files, verdicts)
    except (AccessDenied, PublishRefused, TargetError) as error:
        return Skipped(url, str(error))
    except ENTRY_ERRORS as error:
        return Skipped(url, f"{url} can't be read ({format_error(error)}); remove it and publish again")


def _verdicts(store: Store, place: str) -> tuple[bytes, ...]:
    """advice.json of the published probes of a study; those that can't be read are left out, for the study stands without."""
    found = []
    try:
        names = sorted(name for name in store.children(f"{place}/probes/").folders if slug_safe(name))
        for name in names[:MOST_PROBES]:
            if store.read(f"{place}/probes/{name}/{MANIFEST}", MAX_MANIFEST_BYTES) is not None:
                data = store.read(f"{place}/probes/{name}/{ADVICE}")
                found += [] if data is None else [data]
    except (AccessDenied, PublishRefused, TargetError):
        return tuple(found)
    return tuple(found)


def _check_summary(url: str, manifest: Mapping[str, Any], summary: bytes) -> None:
    """PublishRefused where summary.json is not plain JSON, or its manifest has another headline."""
    try:
        found = strict_json(summary)
    except ValueError as error:
        raise PublishRefused(f"summary.json of {url} is malformed: {error}") from error
    try:
        headline = headline_of(found)
    except (ValueError, KeyError, TypeError):
        return  # of a newer format: the reader of its numbers says so
    own = manifest["headline"]
    for name in (name for name in headline if own[name] != headline[name]):
        raise PublishRefused(
            f"the manifest of {url} says {name} {own[name]}, its summary.json says {headline[name]}: one of them was changed; "
            "remove it and publish again"
        )


def _file(store: Store, place: str, manifest: Mapping[str, Any], name: str) -> bytes:
    """One file as the manifest describes it; PublishRefused where it is not."""
    origin = f"{store.url}/{place}/{manifest['folder']}/{name}"
    named = next((file for file in manifest["files"] if file["path"] == name), None)
    if named is None:
        raise PublishRefused(f"the manifest of {store.url}/{place} names no {name}; remove it and publish again")
    data = store.read(f"{place}/{manifest['folder']}/{name}", int(named["size"]))
    if data is None or (len(data), hashlib.sha256(data).hexdigest()) != (named["size"], named["sha256"]):
        found = "is missing" if data is None else f"has {len(data):,} bytes with another sha256"
        raise PublishRefused(f"{origin} {found}; its manifest says {named['size']:,} bytes, sha256 {named['sha256']}")
    return data


def _folders_of(store: Store, prefix: str) -> tuple[list[str], list[Skipped]]:
    """`_folders` of one model; where it can't be listed that is the reason why it is skipped."""
    try:
        return _folders(store, prefix)
    except (AccessDenied, PublishRefused, TargetError) as error:
        return [], [Skipped(f"{store.url}/{prefix}", str(error))]


def _folders(store: Store, prefix: str) -> tuple[list[str], list[Skipped]]:
    """The names of the folders right below `prefix` that may be a slug or study id, and what else is there."""
    found = store.children(prefix)
    strange = [f"{name}/" for name in found.folders if not slug_safe(name)]
    strange += [name for name in found.files if unfinished_name(name) is None]
    why = dict.fromkeys(strange, "does not belong to a published study")
    why |= dict.fromkeys(found.links, "is a symbolic link, which is not followed; remove it")
    skipped = [
        Skipped(f"{store.url}/{prefix}{name}", f"{store.url}/{prefix}{name} {why[name]}") for name in sorted(why)
    ]
    if not found.whole:
        url = f"{store.url}/{prefix}"
        skipped.append(Skipped(url, f"{url} has more than {LISTED:,} names; the others are not looked at"))
    return sorted(name for name in found.folders if slug_safe(name)), skipped
