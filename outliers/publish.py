"""Publishing: a finished results folder becomes a study at a target, whole or not at all.

    <target>/<model slug>/<study_id>/<folder>/...       the files, named by their content
    <target>/<model slug>/<study_id>/manifest.json      put last, once, never replaced

The manifest makes a study visible. It is created only where there is none, so of several publishers one is first, and
what it names is there already. Folders that no manifest names are invisible, and removed by a later publisher.
It runs on the control side and knows nothing of models or activations. Before it: `manifest`. After it: readers.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from pathlib import Path
from typing import Any

from outliers.allowlist import LOG, MANIFEST, AllowedFile, allowed_name, check_results
from outliers.errors import AccessDenied, BadInput, DigestConflict, ForbiddenFile, PublishRefused, StoreUnavailable
from outliers.files import write_atomic
from outliers.manifest import (
    MAX_MANIFEST_BYTES,
    digest_of,
    dump_manifest,
    file_list,
    folder_of,
    parse_manifest,
    read_manifest,
    slug_safe,
    write_manifest,
)
from outliers.targets import Store, opened

ORPHAN_SECONDS = 3600.0
"""A folder without a manifest is left alone that long: its publisher may be at work."""

_FOLDER = re.compile(r"[0-9a-f]{12}")
_log = logging.getLogger(__name__)


def model_slug(model_id: str) -> str:
    """`model_id` as one step of a path or URL: Qwen/Qwen3-30B-A3B is Qwen--Qwen3-30B-A3B, local:abc is local-abc.

    Raises BadInput where nothing readable is left of it.
    """
    slug = re.sub(r"[^A-Za-z0-9._-]", "-", model_id.replace("/", "--")).lstrip("._-")
    if len(slug) > 100:
        slug = f"{slug[:87]}-{hashlib.sha256(model_id.encode()).hexdigest()[:12]}"
    if not slug_safe(slug):
        raise BadInput(f"'{model_id}' gives no name for a published folder; it needs a letter or digit")
    return slug


def check_target(target: str) -> None:
    """Whether `target` can be published to, before anything heavy starts; it leaves nothing there.

    A folder is made if absent. A bucket must exist, and the keys be allowed to list and to write. Raises TargetError,
    AccessDenied, or StoreUnavailable where nothing answers (after about 15 s at most).
    """
    with opened(target) as store:
        store.check()


def published_manifest(target: str, model_slug: str, study_id: str) -> dict[str, Any] | None:
    """The manifest of a study at `target`, None where it is not published. One small read.

    Raises PublishRefused for a malformed manifest, and the errors of `check_target`.
    """
    place = _place(model_slug, study_id)
    with opened(target) as store:
        return _manifest_at(store, place)


def publish(results: Path, target: str, model_slug: str) -> str:
    """Publishes the folder `results`, which has its manifest, and returns the URL of the published manifest.

    Published already with the same results_digest: nothing is changed. Raises DigestConflict where it is published with
    another one, ForbiddenFile or PublishRefused where the folder is not what its manifest says or may not leave the
    machine, AccessDenied or TargetError where the target refuses, StoreUnavailable where it does not answer.
    """
    manifest, files = _verified(results)
    place = _place(model_slug, manifest["study_id"])
    with opened(target) as store:
        there = _manifest_at(store, place)
        if there is None:
            _upload(store, f"{place}/{manifest['folder']}", files)
            created = store.create(f"{place}/{MANIFEST}", dump_manifest(manifest))
            there = manifest if created else _manifest_at(store, place)
        url = f"{store.url}/{place}/{MANIFEST}"
        if there is None:
            raise StoreUnavailable(f"{url} was there and is gone: somebody removes it; run the same again")
        if there["results_digest"] != manifest["results_digest"]:
            raise DigestConflict(
                f"{url} is published with other numbers: its results_digest is {there['results_digest']}, this one's "
                f"{manifest['results_digest']}. Nothing was changed; give --label NAME to publish this one beside it"
            )
        _sweep(store, place, there["folder"])
    return url


def fetch(target: str, model_slug: str, study_id: str, into: Path) -> dict[str, Any]:
    """Downloads a published study into the folder `into`, its manifest last; returns the manifest.

    Every file is verified. Raises PublishRefused where the study is not there, or not what its manifest says; then
    `into` has no manifest.
    """
    place = _place(model_slug, study_id)
    with opened(target) as store:
        manifest = _manifest_at(store, place)
        if manifest is None:
            raise PublishRefused(f"{store.url}/{place} is not published; publish the study first")
        (into / "plots").mkdir(parents=True, exist_ok=True)
        (into / MANIFEST).unlink(missing_ok=True)
        for file in manifest["files"]:
            write_atomic(into / file["path"], _object(store, f"{place}/{manifest['folder']}", file))
    write_manifest(into, manifest)
    return manifest


def _place(slug: str, study_id: str) -> str:
    for name in (slug, study_id):
        if not slug_safe(name):
            raise BadInput(f"'{name}' is no name for a published folder: letters, digits, '.', '_' and '-' only")
    return f"{slug}/{study_id}"


def _manifest_at(store: Store, place: str) -> dict[str, Any] | None:
    data = store.read(f"{place}/{MANIFEST}", MAX_MANIFEST_BYTES)
    if data is None:
        return None
    origin = f"{store.url}/{place}/{MANIFEST}"
    manifest = parse_manifest(data, origin)
    strange = [file["path"] for file in manifest["files"] if not allowed_name(file["path"]) or file["path"] == MANIFEST]
    if strange or manifest["study_id"] != place.rpartition("/")[2]:
        what = f"names the file '{strange[0]}'" if strange else f"is of the study {manifest['study_id']}"
        raise PublishRefused(f"{origin} {what}, which has no place there; remove it and publish again")
    return manifest


def _object(store: Store, folder: str, file: dict[str, Any]) -> bytes:
    """One published file, as its manifest describes it; PublishRefused where it is not."""
    data = store.read(f"{folder}/{file['path']}", int(file["size"]))
    if data is not None and (len(data), hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"]):
        return data
    found = "is missing" if data is None else f"has {len(data):,} bytes with another sha256"
    raise PublishRefused(
        f"{store.url}/{folder}/{file['path']} {found}; its manifest says {file['size']:,} bytes, "
        f"sha256 {file['sha256']}. The publication is damaged: remove its manifest and publish again"
    )


def _verified(results: Path) -> tuple[dict[str, Any], tuple[AllowedFile, ...]]:
    """The manifest in `results` and its files, which are exactly those it names; their bytes are read once."""
    manifest = read_manifest(results)
    if manifest is None:
        raise PublishRefused(f"{results} has no {MANIFEST}: not a finished study; analyze the capture again")
    files = check_results(results, any(file["path"] == LOG for file in manifest["files"]))
    named = {file["path"]: (file["size"], file["sha256"]) for file in manifest["files"]}
    found = {file.path: (file.size, file.sha256) for file in files}
    for path in sorted(named.keys() | found.keys()):
        if named.get(path) != found.get(path):
            raise ForbiddenFile(
                f"{path} in {results} is not what the manifest says: {found.get(path, 'absent')} (bytes, sha256) "
                f"instead of {named.get(path, 'absent')}; write the study's results and manifest again"
            )
    rebuilt = (folder_of(file_list(files)), digest_of({file.path: file.data for file in files}))
    if rebuilt != (manifest["folder"], manifest["results_digest"]):
        raise PublishRefused(f"{results / MANIFEST} does not belong to its files; write the manifest again")
    return manifest, files


def _upload(store: Store, folder: str, files: tuple[AllowedFile, ...]) -> None:
    """Puts the files, and sees that they are there: the manifest must not name what a store has lost."""
    for file in files:
        store.put(f"{folder}/{file.path}", file.data)
    stored = store.list(f"{folder}/")
    for file in files:
        found = stored.get(f"{folder}/{file.path}")
        if found is None or found.size_bytes != file.size:
            size = "absent" if found is None else f"{found.size_bytes:,} bytes"
            raise StoreUnavailable(
                f"{store.url}/{folder}/{file.path} was written with {file.size:,} bytes and is {size}; run it again"
            )


def _sweep(store: Store, place: str, folder: str) -> None:
    """Removes the folders of a published study that its manifest does not name, once nothing in them is recent.

    Only after the manifest is there, which is never replaced: so no publisher can be about to name one of them.
    """
    try:
        groups: dict[str, dict[str, float]] = {}
        for key, stored in store.list(f"{place}/").items():
            group, _, path = key.removeprefix(f"{place}/").partition("/")
            if path and group != folder and _FOLDER.fullmatch(group):
                groups.setdefault(group, {})[key] = stored.modified
        for objects in groups.values():
            if max(objects.values()) < time.time() - ORPHAN_SECONDS:
                for key in objects:
                    store.delete(key)
    except (AccessDenied, PublishRefused, StoreUnavailable) as error:
        _log.warning("folders that no manifest names stay at %s/%s: %s", store.url, place, error)
