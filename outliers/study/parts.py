"""The shards of a study: which sequences each machine reads, and the workspaces of shards that run on this computer.

A shard begins and ends at the edge of a batch, because a batch is computed whole or not at all. Only summaries are transferred.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from outliers.errors import BadInput
from outliers.spec import StudySpec
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

SHARDS = "shards"
"""Folder of a workspace with the workspaces of the shards that run on this computer."""
LOCKS = "locks"
"""Folder of a workspace with the locks that are held now."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Sequences `first` up to, and without, `stop`: the `number`-th (from 1) of `of` shards."""

    number: int
    of: int
    first: int
    stop: int

    @property
    def title(self) -> str:
        """`2 of 4`."""
        return f"{self.number} of {self.of}"

    @property
    def suffix(self) -> str:
        """The end of its machine's name: `-2of4`."""
        return f"-{self.number}of{self.of}"

    @property
    def span(self) -> str:
        """As --sequences takes it: `8:16`."""
        return f"{self.first}:{self.stop}"


def split(prepared: Prepared, shards: int) -> tuple[Shard, ...]:
    """The shards of a study, as equal as whole batches allow. BadInput where there are fewer batches than shards."""
    cut = spans(prepared.corpus.num_sequences, prepared.spec.capture.batch_sequences, shards)
    return tuple(Shard(number, shards, first, stop) for number, (first, stop) in enumerate(cut, 1))


def spans(total: int, batch: int, shards: int) -> tuple[tuple[int, int], ...]:
    """(first, stop) of each of `shards` shards of `total` sequences, in batches of `batch`. BadInput as `split`."""
    batches = -(-total // batch)
    if shards > batches:
        raise BadInput(
            f"--shards {shards} is more than the {batches} batches of {batch} sequence{'s' * (batch > 1)} there are to share: "
            f"at most {batches}"
        )
    edges = [min(total, batch * (batches * number // shards)) for number in range(shards + 1)]
    return tuple(itertools.pairwise(edges))


def longest_shard(spec: StudySpec) -> StudySpec:
    """A study with the sequences of the longest of its --shards shards. BadInput where there are more shards than batches."""
    cut = spans(spec.corpus.num_sequences, spec.capture.batch_sequences, spec.compute.shards)
    longest = max(stop - first for first, stop in cut)
    return spec.model_copy(update={"corpus": spec.corpus.model_copy(update={"num_sequences": longest})})


def machine_name(prepared: Prepared, shard: Shard | None = None) -> str:
    """The name of a study's machine, or of a shard's: --machine, or made from the capture's id, so that a retry finds it."""
    name = prepared.spec.compute.machine or f"outliers-{prepared.capture_id}"
    return name + (shard.suffix if shard else "")


def shard_workspace(workspace: Workspace, machine: str) -> Path:
    """The workspace of a shard on this computer, which has the name of its machine."""
    return workspace.root / SHARDS / machine


def captures_of_shards(workspace: Workspace, capture_id: str | None = None) -> tuple[tuple[str, Workspace], ...]:
    """The shards on this computer that hold captures, or hold one capture: (`2of3`, its workspace) each, in order.

    They are kept for another study of the same activations. Only `outliers captures rm` frees them.
    """
    found = []
    for root in sorted(path for path in (workspace.root / SHARDS).glob("*") if path.is_dir()):
        own = Workspace(root)
        held = {path.name for path in own.captures.glob("*") if path.is_dir()}
        if held if capture_id is None else capture_id in held:
            found.append((root.name.rpartition("-")[2], own))
    return tuple(found)
