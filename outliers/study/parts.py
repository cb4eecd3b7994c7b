"""A study spread over machines: which sequences each one reads, and where a part on this computer has its workspace.

Parts begin and end at the borders of batches, for a batch is computed whole or not at all. Only summaries are transferred.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from outliers.errors import BadInput
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

SHARDS = "shards"
"""Folder of a workspace with the workspaces of the parts that run on this computer."""
LOCKS = "locks"
"""Folder of a workspace with the locks that are held now."""


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences `first` to before `stop`; the `number`-th (from 1) of `of` parts."""

    number: int
    of: int
    first: int
    stop: int

    @property
    def title(self) -> str:
        """How a person tells it apart: `2 of 4`."""
        return f"{self.number} of {self.of}"

    @property
    def suffix(self) -> str:
        """What is appended to the name of its machine."""
        return f"-{self.number}of{self.of}"

    @property
    def span(self) -> str:
        """As --sequences takes it."""
        return f"{self.first}:{self.stop}"


def split(prepared: Prepared, shards: int) -> tuple[Part, ...]:
    """The parts of a study, as equal as whole batches allow. BadInput where there are fewer batches than parts."""
    cut = spans(prepared.corpus.num_sequences, prepared.spec.capture.batch_sequences, shards)
    return tuple(Part(number, shards, first, stop) for number, (first, stop) in enumerate(cut, 1))


def spans(total: int, batch: int, shards: int) -> tuple[tuple[int, int], ...]:
    """(first, stop) of each of `shards` parts of `total` sequences, in batches of `batch`. BadInput as `split`."""
    batches = -(-total // batch)
    if shards > batches:
        raise BadInput(
            f"--shards {shards} is more than the {batches} batches of {batch} sequence{'s' * (batch > 1)} there are to share: "
            f"at most {batches}"
        )
    edges = [min(total, batch * (batches * number // shards)) for number in range(shards + 1)]
    return tuple(itertools.pairwise(edges))


def part_workspace(workspace: Workspace, machine: str) -> Path:
    """The folder of the workspace that a part on this computer has for itself, named as its machine is."""
    return workspace.root / SHARDS / machine


def captures_of_parts(workspace: Workspace, capture_id: str | None = None) -> tuple[tuple[str, Workspace], ...]:
    """What the parts on this computer hold of captures, or of one: (`2of3`, its workspace) each, in order.

    They are kept as a whole study's capture is, for another study of the same activations; nothing but `outliers captures rm`
    frees them.
    """
    found = []
    for root in sorted(path for path in (workspace.root / SHARDS).glob("*") if path.is_dir()):
        own = Workspace(root)
        held = {path.name for path in own.captures.glob("*") if path.is_dir()}
        if held if capture_id is None else capture_id in held:
            found.append((root.name.rpartition("-")[2], own))
    return tuple(found)
