"""Where the weights of a model lie while its layers are loaded one by one: on this machine, or on the hub, file by file.

A file of the hub is here from the first group of weights that needs it to the last. Knows names and files, nothing of layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from outliers.capture.load import fetch_weights
from outliers.errors import UnknownModel
from outliers.hub.cache import cached_model
from outliers.hub.headers import Tensor, read_checkpoint, read_header
from outliers.hub.shards import Shards
from outliers.model.complete import check_checkpoint
from outliers.model.describe import ModelInfo
from outliers.workspace import Workspace


class Checkpoint(Protocol):
    """Where the weights of a model lie: names, and what is on this machine when a group of them is needed."""

    @property
    def names(self) -> Collection[str]:
        """Every tensor of the checkpoint."""

    def expect(self, groups: Sequence[Collection[str]]) -> None:
        """Told once: the groups of names that will be opened and closed, in this order."""

    def open(self, names: Collection[str]) -> Mapping[str, Tensor]:
        """Those tensors, on this machine; may download. Raises UnknownModel, HubUnavailable, DiskFull."""

    def close(self, names: Collection[str]) -> None:
        """Told once for each group: its weights were read."""


class FolderCheckpoint:
    """A checkpoint whose files are all in one folder of this machine."""

    def __init__(self, folder: Path) -> None:
        """Raises UnknownModel for anything that is not whole."""
        self._tensors = read_checkpoint(folder)

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def expect(self, groups: Sequence[Collection[str]]) -> None:
        pass

    def open(self, names: Collection[str]) -> Mapping[str, Tensor]:
        return {name: self._tensors[name] for name in names}

    def close(self, names: Collection[str]) -> None:
        pass


class HubCheckpoint:
    """A checkpoint of the hub of which a few files at a time are on this machine."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._uses: Counter[str] = Counter()
        self._headers: dict[str, Mapping[str, Tensor]] = {}

    @property
    def names(self) -> Collection[str]:
        return self._shards.places.keys()

    def expect(self, groups: Sequence[Collection[str]]) -> None:
        self._uses = Counter(file for names in groups for file in self._files(names))
        for file in set(self._shards.places.values()) - self._uses.keys():
            self._shards.drop(file)  # of a former call

    def open(self, names: Collection[str]) -> Mapping[str, Tensor]:
        files = self._files(names)
        self._shards.fetch(files)
        for file in files - self._headers.keys():
            self._headers[file] = read_header(self._shards.path(file))
        return {name: self._tensor(name) for name in names}

    def close(self, names: Collection[str]) -> None:
        files = self._files(names)
        self._uses.subtract(files)
        for file in files:
            if self._uses[file] <= 0:
                self._shards.drop(file)
                self._headers.pop(file, None)

    def _files(self, names: Collection[str]) -> set[str]:
        return {self._shards.places[name] for name in names}

    def _tensor(self, name: str) -> Tensor:
        file = self._shards.places[name]
        if name not in self._headers[file]:
            raise UnknownModel(
                f"the index of {self._shards.repo_id} names {name} in {file}, which does not hold it: the files are of another "
                "checkpoint than the index"
            )
        return self._headers[file][name]


def open_checkpoint(
    info: ModelInfo, workspace: Workspace, progress: Callable[[int, int], None], *, keep: bool, head: bool
) -> Checkpoint:
    """The weights of a model; with `keep` all of them on this machine first, else a model of the hub file by file.

    head: whether the model's head is used. A model that the cache of this machine holds is read there, and nothing of it is
    deleted. Raises what `fetch_weights` and `check_checkpoint` raise.
    """
    source = info.source
    if not keep and source.kind == "hub" and cached_model(source.path, source.revision) is None:
        return HubCheckpoint(Shards(source.path, source.revision, workspace.models / source.key / "shards", progress))
    folder = Path(fetch_weights(info, workspace, progress))
    check_checkpoint(info, workspace, head=head)
    return FolderCheckpoint(folder)
