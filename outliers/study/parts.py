"""A study spread over machines: which sequences each one reads, and where its part of the summary waits to be joined.

Parts begin and end at the borders of batches, for a batch is computed whole or not at all. Only summaries travel: they
come to `<workspace>/parts/<study_id>/<first>-<stop>/`, and `merge` joins them into exactly what one machine would have
counted. Any number of runs may be at one study: a part is made under a lock of its own, and what is done to all of them
under the study's (`locked`). Knows no machine. Before it: `prepare`. After it: the tasks.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliers.counting.summary_files import has_summary
from outliers.errors import BadInput, CorruptCapture
from outliers.files.sealed import read_sealed, write_sealed
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

RECORD = "part.json"
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


def folder_of(part: Part, prepared: Prepared, workspace: Workspace) -> Path:
    """Where a part's summary is on this side."""
    return parts_folder(prepared, workspace) / f"{part.first}-{part.stop}"


def parts_folder(prepared: Prepared, workspace: Workspace) -> Path:
    """The folder of all parts of a study."""
    return workspace.root / "parts" / prepared.study_id


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


def draft_of(part: Part, prepared: Prepared, workspace: Workspace) -> Path:
    """Where a part's summary comes to, before it is whole; not among the parts, which another run may remove."""
    return workspace.root / "parts" / f".{prepared.study_id}-{part.first}-{part.stop}"


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """What is told of a part's making, beside its summary and after it: then the part is whole."""
    write_sealed(folder / RECORD, record)


def read_record(part: Part, prepared: Prepared, workspace: Workspace) -> dict[str, Any]:
    """What is told of the making of a part that is here. Raises CorruptCapture."""
    path = folder_of(part, prepared, workspace) / RECORD
    found = read_sealed(path)
    if found is None:
        raise CorruptCapture(f"{path} is not what was written there: remove its folder, and the part is made again")
    return found


def place_part(part: Part, prepared: Prepared, workspace: Workspace) -> None:
    """A part's draft, which has its record, becomes the part: whole, in one step. Under the study's lock."""
    target = folder_of(part, prepared, workspace)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft_of(part, prepared, workspace).rename(target)


def remove_parts(prepared: Prepared, workspace: Workspace) -> None:
    """All that is here of a study's parts: they are in the whole. Under the study's lock."""
    shutil.rmtree(parts_folder(prepared, workspace), ignore_errors=True)


def study_lock(prepared: Prepared, workspace: Workspace) -> Path:
    """The lock of who joins, places or removes a study's parts."""
    return workspace.root / LOCKS / prepared.study_id


def part_lock(part: Part, prepared: Prepared, workspace: Workspace) -> Path:
    """The lock of who makes a part; it is taken before the study's."""
    return workspace.root / LOCKS / f"{prepared.study_id}-{part.first}-{part.stop}"


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock while the block runs. `wait` is called again and again while another thread or process has it, and ends
    that by raising. It is an flock, so it ends with its holder, and its file goes with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(path, wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _take(path: Path, wait: Callable[[], None]) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while not _has_taken(handle):
                wait()
            # who had it has removed the file: what was waited for is nobody's lock any more
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _has_taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_here(part: Part, prepared: Prepared, workspace: Workspace) -> bool:
    """Whether the summary of a part has come, whole and as it was written."""
    folder = folder_of(part, prepared, workspace)
    return read_sealed(folder / RECORD) is not None and has_summary(folder)
