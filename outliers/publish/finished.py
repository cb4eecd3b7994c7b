"""Is a results folder what was written? Each file against the manifest, and the manifest against the files.

A manifest alone proves nothing: it may be edited, or be another run's. So its digest, file list and headline are computed
again from the bytes that it names, which are read once and handed on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliers.errors import DamagedResults, PublishRefused
from outliers.files.beneath import read_beneath
from outliers.publish.allowlist import LOG, MANIFEST, MAX_FILE_BYTES, SUMMARY, allowed_name
from outliers.publish.manifest import MAX_MANIFEST_BYTES, digest_of, folder_of, headline_of, parse_manifest
from outliers.untrusted.strict_json import strict_json

REMEDY = "run the same study again, which makes them anew"
"""The end of a message to a person who asked only to see them."""


@dataclass(frozen=True)
class Finished:
    """A results folder that was checked: its manifest, summary.json parsed, and the bytes of each file by its path."""

    folder: Path
    manifest: dict[str, Any]
    summary: dict[str, Any]
    files: dict[str, bytes]


def read_finished(folder: Path, study_id: str | None = None) -> Finished | None:
    """The finished study in a folder; None where there is no manifest. `study_id`: the study that it must be of.

    Every file of the manifest is compared with its sha256, and what the manifest says of them is computed anew. run.log
    grows after the manifest and is not one of the results. Raises DamagedResults, which names the first thing that differs.
    """
    try:
        manifest = parse_manifest(read_beneath(folder, MANIFEST, MAX_MANIFEST_BYTES), str(folder / MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, PublishRefused) as error:
        raise _damaged(folder, str(error)) from error
    files = {item["path"]: _read(folder, item) for item in manifest["files"] if item["path"] != LOG}
    summary = _check(folder, manifest, files)
    if study_id is not None and manifest["study_id"] != study_id:
        raise _damaged(folder, f"{MANIFEST} is of the study {manifest['study_id']}, not of {study_id}")
    return Finished(folder, manifest, summary, files)


def _read(folder: Path, named: dict[str, Any]) -> bytes:
    """One file of a folder, as its manifest describes it."""
    path = str(named["path"])
    if not allowed_name(path) or path == MANIFEST:
        raise _damaged(folder, f"{MANIFEST} names the file '{path}', which no study has")
    try:
        data = read_beneath(folder, path, MAX_FILE_BYTES)
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read: {error.strerror}"
        raise _damaged(folder, f"{path} {what}") from error
    if len(data) != named["size"]:
        raise _damaged(folder, f"{path} has {len(data):,} bytes, {MANIFEST} says {named['size']:,}")
    if (found := hashlib.sha256(data).hexdigest()) != named["sha256"]:
        raise _damaged(folder, f"{path} has sha256 {found[:12]}, {MANIFEST} says {named['sha256'][:12]}")
    return data


def _check(folder: Path, manifest: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    """summary.json, parsed, after what the manifest says of the files was computed again from them."""
    try:
        digest = digest_of(files)
        summary: dict[str, Any] = strict_json(files[SUMMARY])
        own: dict[str, Any] = {"study_id": summary["study_id"], "capture_id": summary["capture_id"]}
        own |= {"results_digest": digest, "folder": folder_of(manifest["files"]), "headline": headline_of(summary)}
        dtype = summary["model"]["dtype"]
    except (PublishRefused, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, f"they are not a study's ({error})") from error
    for name, value in own.items():
        if manifest[name] != value:
            raise _damaged(folder, f"{MANIFEST} says {name} {manifest[name]}, its files give {value}")
    model = manifest["spec"].get("model")
    if isinstance(model, dict) and model.get("dtype", dtype) != dtype:
        raise _damaged(folder, f"{MANIFEST} says dtype {model['dtype']}, its files give {dtype}")
    return summary


def _damaged(folder: Path, why: str) -> DamagedResults:
    return DamagedResults(f"the results in {folder} are not whole: {why}")
