"""Publishing: a finished results folder becomes a study at a target, whole or not at all.

    <target>/<model slug>/<study_id>/<folder>/...       the files, named by their content
    <target>/<model slug>/<study_id>/manifest.json      put last, once, never replaced

The manifest makes a study visible. It is created only where there is none, so of several publishers one is first, and
what it names is there already. Folders that no manifest names are invisible, and removed by a later publisher.
It runs on the control side and knows nothing of models or activations.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliers.errors import AccessDenied, BadInput, DigestConflict, ForbiddenFile, PublishRefused, StoreUnavailable
from outliers.publish.allowlist import MANIFEST, NUMBERS, Numbers, allowed_name, check_numbers, number_names
from outliers.publish.manifest import MAX_MANIFEST_BYTES, dump_manifest, parse_manifest, slug_safe
from outliers.publish.publishable import (
    Publishable,
    is_written,
    make_publishable,
    read_publishable,
    write_publishable,
)
from outliers.publish.stores.base import Store
from outliers.publish.stores.open import opened

if TYPE_CHECKING:
    from outliers.report.shown import Shown

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
    """Publish the folder `results`, which has its manifest, and return the URL of the published manifest.

    Its page and pictures are rendered anew; where they, or the manifest that names them, are others than the folder has, they
    replace those: also the page of the study's owner, which `dispatch.steps.sync_study` leaves there. Raises ForbiddenFile or
    PublishRefused where the numbers are not what the manifest says or may not leave the machine, and as `publish_study`.
    """
    study = read_publishable(results)
    if not is_written(results, study):
        _log.warning(
            "what lies in %s next to the numbers is not what is rendered of them here: it is written again", results
        )
        write_publishable(results, study)
    return publish_study(study, target, model_slug)


def publish_study(study: Publishable, target: str, model_slug: str) -> str:
    """Publish a study and return the URL of its manifest.

    Published already with the same results_digest: nothing is changed. Raises DigestConflict where it is published with
    another one, AccessDenied or TargetError where the target refuses, StoreUnavailable where it does not answer.
    """
    manifest = study.manifest
    place = _place(model_slug, manifest["study_id"])
    with opened(target) as store:
        there = _manifest_at(store, place)
        if there is None:
            files = {f"{place}/{manifest['folder']}/{path}": data for path, data in study.files.items()}
            created = store.create_with(files, f"{place}/{MANIFEST}", dump_manifest(manifest))
            there = manifest if created else _manifest_at(store, place)
            if there is not None and there["folder"] != manifest["folder"]:
                _withdraw(store, f"{place}/{manifest['folder']}", study.files)
        url = f"{store.url}/{place}/{MANIFEST}"
        if there is None:
            raise StoreUnavailable(f"{url} was there and is gone: it was removed meanwhile; run the same again")
        if there["results_digest"] != manifest["results_digest"]:
            raise DigestConflict(
                f"{url} is published with other numbers: its results_digest is {there['results_digest']}, this one's "
                f"{manifest['results_digest']}. Nothing was changed; give --label NAME to publish this one as well"
            )
        _collect_orphans(store, place, there["folder"])
    return url


def fetch(
    target: str,
    model_slug: str,
    study_id: str,
    into: Path,
    show: Callable[[Numbers], Shown | None] = lambda numbers: None,
) -> dict[str, Any]:
    """Fetch a published study into the folder `into`, its manifest last; returns the published manifest.

    Only the numbers are fetched: others can write to a store, so they are checked as a machine's are, and the page and the
    pictures are rendered here. show: gives what the owner of the study sees of it. Raises PublishRefused where the study is not
    there, or not what its manifest says; then `into` has no manifest.
    """
    place = _place(model_slug, study_id)
    (into / MANIFEST).unlink(missing_ok=True)
    with opened(target) as store:
        manifest = _manifest_at(store, place)
        if manifest is None:
            raise PublishRefused(f"{store.url}/{place} is not published; publish the study first")
        named = {file["path"]: file for file in manifest["files"]}
        if missing := [name for name in NUMBERS if name not in named]:
            raise PublishRefused(
                f"the manifest of {store.url}/{place} names no {missing[0]}; remove it and publish again"
            )
        files = {name: _object(store, f"{place}/{manifest['folder']}", named[name]) for name in number_names(named)}
        try:
            told = {"spec": manifest["spec"], "provenance": manifest["provenance"]}
            numbers = check_numbers(files)
            study = make_publishable(numbers, **told, beside=into, shown=show(numbers))
        except ForbiddenFile as error:
            raise PublishRefused(
                f"{store.url}/{place} is not a study that this program reads: {error}. A newer one may have published it: update "
                "outlier-features"
            ) from error
        for name in ("study_id", "capture_id", "results_digest", "headline"):
            if study.manifest[name] != manifest[name]:
                raise PublishRefused(
                    f"the results at {store.url}/{place} are not whole: {MANIFEST} says {name} {manifest[name]}, its files give "
                    f"{study.manifest[name]}; remove it and publish again"
                )
    write_publishable(into, study)
    return manifest


def _place(slug: str, study_id: str) -> str:
    for name in (slug, study_id):
        if not slug_safe(name):
            raise BadInput(f"'{name}' is not a name for a published folder: use letters, digits, '.', '_' and '-' only")
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


def _withdraw(store: Store, folder: str, files: Mapping[str, bytes]) -> None:
    """Remove what was put just now, where another publisher was first: its manifest is never replaced, so no one names these."""
    try:
        for path in files:
            store.delete(f"{folder}/{path}")
    except (AccessDenied, PublishRefused, StoreUnavailable) as error:
        _log.warning("a folder that no manifest names stays at %s/%s: %s", store.url, folder, error)


def _collect_orphans(store: Store, place: str, folder: str) -> None:
    """Remove the folders of a published study that its manifest does not name, once nothing in them is recent.

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
