"""Some of the files of a model's weights at a time, in a folder of our own: a disk smaller than the model is enough.

The folder is laid out as a cache of the hub, so that a killed download goes on from its bytes. The user's own cache is not
touched, and what is deleted here was fetched here. Before: `client.resolve` named the commit. After: the index says which file
holds which weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from outliers.errors import UnknownModel
from outliers.hub.cache import CachedModel
from outliers.hub.client import HubFile, list_files, needed_files, use_patient_client
from outliers.hub.download import check_disk, fetch_files
from outliers.hub.files import INDEX, WEIGHTS_SUFFIX, WHOLE, cache_folder_name
from outliers.hub.headers import read_header, read_weight_map


class Shards:
    """The weight files of a model at a commit. `places`: name of a weight -> its file."""

    def __init__(
        self, repo_id: str, commit: str, folder: Path, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """folder: for the files. progress: called with the bytes that were fetched so far, and all of them.

        Raises UnknownModel (no safetensors weights, or offline), HubUnavailable, DiskFull.
        """
        from huggingface_hub import constants

        self.repo_id = repo_id
        self._place = CachedModel(repo_id, commit, folder / cache_folder_name(repo_id))
        self._place.folder.mkdir(parents=True, exist_ok=True)
        if constants.is_offline_mode():
            raise UnknownModel(
                f"the weights of {repo_id} at {commit[:12]} are fetched file by file (--no-keep-weights), and the hub is "
                "switched off (HF_HUB_OFFLINE): unset it"
            )
        use_patient_client()
        needed = {file.name: file for file in needed_files(list_files(repo_id, commit, UnknownModel))}
        self._files = {name: file for name, file in needed.items() if name.endswith(WEIGHTS_SUFFIX)}
        if not self._files:
            raise UnknownModel(f"{repo_id} has no safetensors weights at {commit[:12]}")
        self._total = sum(file.size for file in self._files.values())
        self._fetched, self._progress = 0, progress
        self.places = self._find(needed)

    def path(self, name: str) -> Path:
        """Where a file is, once it was fetched."""
        return self._place.snapshot / name

    def fetch(self, names: Collection[str]) -> None:
        """Have these files here. Raises DiskFull before anything is written, HubUnavailable, UnknownModel, OSError."""
        missing = tuple(self._files[name] for name in sorted(names) if not self.path(name).exists())
        if not missing:
            return
        check_disk(self._place, missing)
        fetch_files(self._place, missing, self._report if self._progress is not None else None)
        self._fetched += sum(file.size for file in missing)

    def drop(self, name: str) -> None:
        """Delete a file, if it is here."""
        self._place.discard(self._files[name])

    def _find(self, needed: dict[str, HubFile]) -> dict[str, str]:
        """Name of each weight -> its file, by the index; of weights in one file by its header."""
        if WHOLE in self._files:
            self.fetch((WHOLE,))
            return dict.fromkeys(read_header(self.path(WHOLE)), WHOLE)
        if INDEX not in needed:
            raise UnknownModel(f"{self.repo_id} has several files of weights and no {INDEX}")
        fetch_files(self._place, (needed[INDEX],), None)
        places = read_weight_map(self.path(INDEX))
        absent = sorted(set(places.values()) - self._files.keys())
        if absent:
            raise UnknownModel(f"the index of {self.repo_id} names {absent[0]}, which the repository does not have")
        return places

    def _report(self, done: int, _: int) -> None:
        if self._progress is not None:
            self._progress(min(self._total, self._fetched + done), self._total)
