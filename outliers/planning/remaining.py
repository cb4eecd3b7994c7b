"""What of a study is still to be done on this computer, and which machine fits that: a second run, or Retry, asks for less.

A job that runs already has its memory and is joined; a complete capture needs no model; what is written needs no room.
Other machines are found again by their names (`Provider.list`), and nothing is known here of their disks. Before it:
`plan`, which knows what the whole study takes. After it: the command and the tasks, which ask before anything heavy starts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliers.counting.bits import PATTERNS
from outliers.counting.shards import is_here
from outliers.errors import CaptureError, PlanRefused
from outliers.jobs import jobs
from outliers.machines.base import MachineRequest, Provider
from outliers.planning.estimate import longest_part
from outliers.planning.plan import check_plan, needs, planned_layout, request_for, runs_here, too_many
from outliers.publish.outcome import find_finished
from outliers.store.chunks import Journal
from outliers.study.memory import PROCESS_BYTES
from outliers.study.parts import Part, part_workspace, split
from outliers.study.prepare import Prepared
from outliers.units import amounts
from outliers.workspace import Workspace

KEY_BYTES = 8
"""Of a token's feature, while the layers of its span are read; the same of its counters."""
COUNTERS = 8
"""Arrays of layers and features that are kept of a site beside its hits: extremes, moments, finite values."""


@dataclass(frozen=True, slots=True)
class Rest:
    """What is still to be done: bytes of the capture to write, and memory that must be free for it; None: a whole study's,
    for the model is to be loaded."""

    capture_bytes: int
    ram_bytes: int | None


JOINED = Rest(0, 0)
"""Of what is done, or being done: a job that runs has its memory, and nobody else is needed."""


def rest_of(prepared: Prepared, workspace: Workspace) -> Rest:
    """What is left of a study on one machine; of another machine than this it is not known, and taken to be all."""
    if not runs_here(prepared.spec):
        return Rest(planned_layout(prepared.spec, prepared.model).total_bytes, None)
    names = (
        f"extract-{prepared.capture_id}",
        f"analyze-{prepared.study_id}",
        f"report-{prepared.study_id}",
    )
    if find_finished(prepared, workspace) is not None or _runs(workspace.root, names):
        return JOINED
    return _to_capture(prepared, workspace, range(prepared.corpus.num_sequences))


def rest_of_part(part: Part, prepared: Prepared, workspace: Workspace) -> Rest:
    """What is left of a part of a study that is spread over processes of this computer."""
    own = Workspace(part_workspace(workspace, machine_name(prepared) + part.suffix))
    span = f"{part.first}-{part.stop}"
    names = (f"extract-{prepared.capture_id}-{span}", f"analyze-{prepared.study_id}-{span}")
    if is_here(part, prepared, workspace) or _runs(own.root, names):
        return JOINED
    return _to_capture(prepared, own, range(part.first, part.stop))


def machine_name(prepared: Prepared) -> str:
    """The name of a study's machine; `Part.suffix` is appended to it."""
    return prepared.spec.compute.machine or f"outliers-{prepared.capture_id}"


def check_rest(prepared: Prepared, workspace: Workspace, source: Provider) -> MachineRequest:
    """The request for what is left of a study, among the offers that hold it; of a machine of its own for each part where
    it is spread. PlanRefused, with every reason, where nothing fits."""
    spec, info = prepared.spec, prepared.model
    if spec.compute.shards == 1:
        rest = rest_of(prepared, workspace)
        return check_plan(spec, info, source, rest.capture_bytes, rest.ram_bytes)
    request = check_plan(spec, info, source, planned_layout(longest_part(spec), info).total_bytes)
    here = source.find(machine_name(prepared)) if runs_here(spec) else None
    if here is not None:
        facts = here.facts()
        gpus = bool(facts.gpus) and spec.compute.gpu_count != 0
        if why := refused_together(prepared, workspace, facts.ram_available_bytes, gpus=gpus):
            raise PlanRefused(why)
    return request


def refused_together(
    prepared: Prepared, workspace: Workspace, free_ram_bytes: int, of: int | None = None, *, gpus: bool = False
) -> str | None:
    """Why the parts that are left don't fit on this computer beside each other, with both numbers; None where they do.

    `of`: how many parts (default: --shards). `gpus`: whether they compute on them.
    """
    spec, info = prepared.spec, prepared.model
    parts = split(prepared, spec.compute.shards if of is None else of)
    rests = [rest_of_part(part, prepared, workspace) for part in parts]
    whole = needs(spec, info)["host_ram_bytes" if gpus else "ram_bytes"]
    taken = [ram for ram in (whole if rest.ram_bytes is None else rest.ram_bytes for rest in rests) if ram]
    if sum(taken) > free_ram_bytes:
        return too_many(len(taken), sum(taken), free_ram_bytes)
    left = sum(rest.capture_bytes for rest in rests)
    needed, free = request_for(spec, info, left).needed_disk_bytes, shutil.disk_usage(workspace.root).free
    if needed > free:
        wanted, there = amounts(needed, free, unit="GB")
        return f"the study needs {wanted} of disk, {there} is free: make room, or give another --workspace"
    return None


def analysis_bytes(prepared: Prepared) -> int:
    """Memory of counting and reporting, an upper bound: the process, one set of totals, and what is kept of the spans that
    are read at once. SmolLM2's took 0.24 GB in all, 48 layers of 2,048 features 0.38 (docs/performance.md)."""
    layout = planned_layout(prepared.spec, prepared.model)
    layers, widths = len(layout.layers), sum(layout.widths.values()) + max(layout.widths.values())  # block beside
    cells = layers * widths * (2 * len(prepared.spec.criteria.magnitudes) + COUNTERS)
    histograms = layers * len(layout.widths) * PATTERNS
    spans = 2 * (os.cpu_count() or 1) * widths * layout.chunk_positions
    return PROCESS_BYTES + KEY_BYTES * (cells + histograms + spans)


def _to_capture(prepared: Prepared, workspace: Workspace, wanted: range) -> Rest:
    """What is left of some sequences, as the journal in a workspace says."""
    done = _journaled(workspace.capture(prepared.capture_id))
    missing = sum(sequence not in done for sequence in wanted)
    # a capture of another study may be whole and have no perplexity, which needs the model too
    loads = missing > 0 or (prepared.spec.capture.perplexity and not all(done[sequence] for sequence in wanted))
    layout = planned_layout(prepared.spec, prepared.model)
    left = layout.total_bytes // layout.num_sequences * missing
    return Rest(left, None if loads else analysis_bytes(prepared))


def _journaled(folder: Path) -> dict[int, bool]:
    """Sequences that a capture has, and whether with their perplexity; none where it can't be read: the step says why."""
    try:
        lines = Journal.open(folder / "journal.jsonl", keep=_lean).done
    except CaptureError:
        return {}
    return {sequence: line["nll"] for sequence, line in lines.items()}


def _runs(root: Path, names: Iterable[str]) -> bool:
    """Whether one of these jobs runs in a workspace, and is not on its way to its end by a cancel."""
    found = [handle for name in names if (handle := jobs.newest(root, name)) is not None]
    return any(
        jobs.status(handle.folder) == "running" and not (handle.folder / "cancel.json").exists() for handle in found
    )


def _lean(entry: dict[str, Any]) -> dict[str, Any]:
    return {"sequence": entry["sequence"], "nll": "nll" in entry}
