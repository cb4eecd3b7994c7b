"""What of a study is still to be done on this computer, and which machine fits that: a second run, or Retry, needs less.

A job that is running already has its memory, and the run joins it. A complete capture needs no model, and sequences that are
written need no disk. Other machines are found by their names (`Provider.list`); nothing is known here of their disks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliers.counting.shards import is_here
from outliers.errors import CaptureError, PlanRefused
from outliers.jobs import jobs
from outliers.machines.base import MachineRequest, Provider
from outliers.planning.offers import check_plan, request_for, rolling_hint, too_many
from outliers.publish.outcome import find_finished
from outliers.store.chunks import Journal
from outliers.store.journal import DONE
from outliers.study.counting_memory import counting_bytes
from outliers.study.demand import PROCESS_BYTES, Demand, demand_of
from outliers.study.layout import Layout
from outliers.study.parts import Shard, machine_name, shard_workspace, split
from outliers.study.prepare import Prepared
from outliers.study.schedule import by_layers, check_schedule
from outliers.units import amounts
from outliers.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Rest:
    """What is still to be done: bytes of the capture to write, and memory that must be free for it. `ram_bytes` is None where the
    model is still to be loaded: it takes the memory of a whole study."""

    capture_bytes: int
    ram_bytes: int | None


JOINED = Rest(0, 0)
"""Nothing is left, or a job that is running does it and has its memory already."""


def rest_of(prepared: Prepared, demand: Demand, workspace: Workspace) -> Rest:
    """What is left of a study on one machine. On another machine than this that is not known, and all of it counts as left."""
    if not prepared.spec.compute.runs_here:
        return Rest(demand.layout.total_bytes, None)
    names = (
        f"extract-{prepared.extraction}",
        f"analyze-{prepared.study_id}",
        f"report-{prepared.study_id}",
    )
    if find_finished(prepared, workspace) is not None or _runs(workspace.root, names):
        return JOINED
    return _to_capture(prepared, demand, workspace, range(prepared.corpus.num_sequences))


def rest_of_shard(shard: Shard, prepared: Prepared, demand: Demand, workspace: Workspace) -> Rest:
    """What is left of one shard of a study whose shards are processes of this computer."""
    own = Workspace(shard_workspace(workspace, machine_name(prepared, shard)))
    span = f"{shard.first}-{shard.stop}"
    names = (f"extract-{prepared.extraction}-{span}", f"analyze-{prepared.study_id}-{span}")
    if is_here(shard, prepared, workspace) or _runs(own.root, names):
        return JOINED
    return _to_capture(prepared, demand, own, range(shard.first, shard.stop))


def check_rest(prepared: Prepared, workspace: Workspace, source: Provider) -> MachineRequest:
    """The request for what is left of a study, limited to the offers that hold it; with --shards, the request of each shard.
    PlanRefused, with every reason, where nothing fits."""
    check_schedule(prepared.spec, prepared.model)
    demand, compute = demand_of(prepared.spec, prepared.model), prepared.spec.compute
    if compute.shards == 1:
        rest = rest_of(prepared, demand, workspace)
        return check_plan(demand, source, rest.capture_bytes, rest.ram_bytes)
    request = check_plan(demand, source, demand.shard_layout.total_bytes)
    here = source.find(machine_name(prepared)) if compute.runs_here else None
    if here is not None:
        facts = here.facts()
        gpus = demand.uses_gpus(facts.gpus)
        if why := refused_together(prepared, demand, workspace, facts.ram_available_bytes, gpus=gpus):
            raise PlanRefused(why)
    return request


def refused_together(
    prepared: Prepared,
    demand: Demand,
    workspace: Workspace,
    free_ram_bytes: int,
    of: int | None = None,
    *,
    gpus: bool = False,
) -> str | None:
    """Why the shards that are left don't fit on this computer together, with both numbers; None where they do.

    `of`: the number of shards (default: --shards). `gpus`: whether they compute on GPUs.
    """
    shards = split(prepared, prepared.spec.compute.shards if of is None else of)
    rests = [rest_of_shard(shard, prepared, demand, workspace) for shard in shards]
    taken = _taken(rests, demand.memory_bytes(gpus=gpus))
    if sum(taken) > free_ram_bytes:
        layered = by_layers(demand)
        if layered is None or sum(_taken(rests, layered.memory_bytes(gpus=gpus))) > free_ram_bytes:
            return too_many(len(taken), sum(taken), free_ram_bytes)
    left = sum(rest.capture_bytes for rest in rests)
    needed, free = request_for(demand, left).needed_disk_bytes, shutil.disk_usage(workspace.root).free
    if needed > free:
        wanted, there = amounts(needed, free, unit="GB")
        return f"the study needs {wanted} of disk, {there} is free: make room, or give another --workspace{rolling_hint(demand)}"
    return None


def _taken(rests: list[Rest], each: int) -> list[int]:
    """Memory of each process that has something left to do; `each`: of one that loads the model."""
    return [ram for ram in (each if rest.ram_bytes is None else rest.ram_bytes for rest in rests) if ram]


def analysis_bytes(prepared: Prepared, layout: Layout) -> int:
    """Bytes of memory for counting and reporting, an upper bound."""
    return PROCESS_BYTES + counting_bytes(prepared.spec, layout)


def _to_capture(prepared: Prepared, demand: Demand, workspace: Workspace, wanted: range) -> Rest:
    """What is left of the sequences `wanted`, by the journal in a workspace; those that were counted are not left."""
    journal = _journaled(workspace.capture(prepared.capture_id))
    if prepared.spec.capture.store != "full" and (
        line := journal.counted.get((prepared.study_id, wanted.start, wanted.stop))
    ):
        wanted = range(line.stop if line.phase == DONE else line.upto, line.stop)
    done = {sequence: bool(entry["nll"]) for sequence, entry in journal.done.items()}
    missing = sum(sequence not in done for sequence in wanted)
    # a capture of another study may be whole and have no perplexity, which needs the model too
    loads = missing > 0 or (prepared.spec.capture.perplexity and not all(done[sequence] for sequence in wanted))
    layout = demand.layout
    left = layout.total_bytes // layout.num_sequences * missing
    return Rest(left, None if loads else analysis_bytes(prepared, layout) + demand.counting_bytes)


def _journaled(folder: Path) -> Journal:
    """The journal of a capture, of each sequence whether with its perplexity; empty where it can't be read: the step says why."""
    try:
        return Journal.open(folder / "journal.jsonl", keep=_lean)
    except CaptureError:
        return Journal(folder / "journal.jsonl")


def _runs(root: Path, names: Iterable[str]) -> bool:
    """Whether one of these jobs runs in a workspace and is not being cancelled."""
    found = [handle for name in names if (handle := jobs.newest(root, name)) is not None]
    return any(
        jobs.status(handle.folder) == "running" and not (handle.folder / "cancel.json").exists() for handle in found
    )


def _lean(entry: dict[str, Any]) -> dict[str, Any]:
    return {"sequence": entry["sequence"], "nll": "nll" in entry}
