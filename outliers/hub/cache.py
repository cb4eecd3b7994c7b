"""The hub's cache on this machine: where a model is or goes, what is there, and what is still to come.

The cache is the hub's own (HF_HOME), or a folder of ours on another disk (`cache_for`). Nothing is fetched here and no
cache is ever emptied.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from outliers.errors import UnknownModel
from outliers.files.atomic import size_of
from outliers.hub.client import HubFile
from outliers.hub.files import INDEX, WEIGHTS_SUFFIX, WHOLE, cache_folder_name
from outliers.hub.headers import read_json

FOLDER_VARIABLE = "OUTLIERS_HUB_FOLDER"
"""Set for jobs on other machines: a cache next to our files, on the disk whose size was requested and checked."""
CACHE_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
"""The hub's own variables; each of them moves its cache."""


@dataclass(frozen=True)
class CachedModel:
    """One commit of a model in a cache. `folder`: of all commits of this model."""

    repo_id: str
    commit: str
    folder: Path

    @property
    def snapshot(self) -> Path:
        """The folder with the files of this commit."""
        return self.folder / "snapshots" / self.commit

    @property
    def cache(self) -> Path:
        """The folder of all models."""
        return self.folder.parent

    def have(self, file: HubFile) -> int:
        """Bytes of a file that are here, finished or not.

        The places are read in the direction in which the bytes move: a file that another thread moves meanwhile is found
        at its next place.
        """
        return max(map(size_of, reversed(self.paths(file))))

    def discard(self, file: HubFile) -> None:
        """Remove what is here of one file, because it differs from what the hub has."""
        for path in self.paths(file):
            path.unlink(missing_ok=True)

    def paths(self, file: HubFile) -> tuple[Path, Path, Path]:
        """The name in the snapshot, the blob that it links to, and the unfinished download of the blob."""
        blob = self.folder / "blobs" / (file.blob or file.name)
        return self.snapshot / file.name, blob, blob.with_name(f"{blob.name}.incomplete")

    def missing_file(self) -> str | None:
        """A file without which the model can't be loaded; None if all are here. A commit's files never change.

        Raises UnknownModel for a damaged index.
        """
        if not (self.snapshot / "config.json").exists():
            return "config.json"
        return self._missing_weights()

    def _missing_weights(self) -> str | None:
        if (self.snapshot / WHOLE).exists():
            return None
        index = self.snapshot / INDEX
        if not index.exists():
            return WHOLE
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UnknownModel(f"{index} has no weight_map of names to files: delete it, and it is fetched again")
        shards = set(places.values())
        return next((shard for shard in sorted(shards) if not (self.snapshot / shard).exists()), None)

    def missing_weight_bytes(self, all_bytes: int) -> int:
        """Bytes of weights still to be fetched, of `all_bytes` of them; unfinished downloads count as here.

        Raises UnknownModel for a damaged index.
        """
        if self._missing_weights() is None:
            return 0
        # an unfinished file has another name than a finished one, so that none is counted twice
        parts = (*self.snapshot.glob(f"*{WEIGHTS_SUFFIX}"), *self.folder.glob("blobs/*.incomplete"))
        return max(0, all_bytes - sum(map(size_of, parts)))


def cached_model(repo_id: str, commit: str) -> Path | None:
    """The folder of a model whose files are all on this machine; None if one is missing. Raises UnknownModel."""
    place = cache_for(repo_id, commit)
    return place.snapshot if place.missing_file() is None else None


def cache_is_chosen() -> bool:
    """Whether the user has moved the hub's cache, likely to another disk than the workspace's."""
    return any(os.environ.get(name) for name in CACHE_VARIABLES)


def cache_for(repo_id: str, commit: str) -> CachedModel:
    """Where a model is, or where it is downloaded to.

    That is the hub's cache of this machine. It is $OUTLIERS_HUB_FOLDER if that is on another disk, the hub's cache does not
    hold the whole model, and the user has not moved the hub's cache. Raises UnknownModel for a damaged index.
    """
    from huggingface_hub import constants

    name = cache_folder_name(repo_id)
    own, ours = CachedModel(repo_id, commit, Path(constants.HF_HUB_CACHE) / name), os.environ.get(FOLDER_VARIABLE)
    if not ours or cache_is_chosen() or own.missing_file() is None or _disk(own.cache) == _disk(Path(ours)):
        return own
    os.environ.setdefault("HF_XET_CACHE", f"{ours}/xet")
    return CachedModel(repo_id, commit, Path(ours) / name)


def _disk(place: Path) -> int:
    """The device number of the disk on which a folder is, or would be."""
    return next(path.stat().st_dev for path in (place, *place.parents) if path.exists())
