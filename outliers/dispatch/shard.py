"""One shard of a study that is spread: a machine of its own reads and counts its sequences, and the summary comes home.

A lost shard is made again alone; of several runs of one study, one makes it and the others wait. On provider `local` a
shard is a process with a workspace of its own, and with a GPU of its own where there are any.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from outliers.counting.merge import merge_summaries
from outliers.counting.shards import (
    draft_of,
    folder_of,
    is_here,
    parts_folder,
    place_shard,
    read_record,
    remove_shards,
    shard_lock,
    study_lock,
    write_record,
)
from outliers.dispatch.leases import MachineLease
from outliers.dispatch.run import run_step
from outliers.dispatch.shard_formats import ShardAtWork, Step, join_shard_formats, measure_shard
from outliers.dispatch.study_run import StudyRun
from outliers.dispatch.transfer import HERE
from outliers.errors import PlanRefused
from outliers.events.stream import Reporter
from outliers.hardware import cuda_names
from outliers.locks import locked
from outliers.machines.base import Machine
from outliers.machines.local import LocalMachine
from outliers.machines.providers import provider
from outliers.planning.offers import check_plan, request_again
from outliers.planning.remaining import refused_together
from outliers.publish.outcome import find_finished
from outliers.publish.reporting import write_study
from outliers.study.demand import demand_of
from outliers.study.parts import Shard, shard_workspace, split
from outliers.study.prepare import Prepared
from outliers.workspace import open_workspace

SHARED = ("models", "corpora")
"""Folders of a workspace that the shards on this computer read and do not make again."""

LOCK_SECONDS = 0.2
"""Between two tries at a lock that another run has."""

_JOINING = "the joining of the parts"

Slot = Callable[[], AbstractContextManager[None]]
"""What a shard enters before it asks for a machine, for instance a limit on how many are at work."""


def make_shard(run: StudyRun, part: Shard, reporter: Reporter, slot: Slot) -> dict[str, Any]:
    """Make a shard's summary, and place it in `counting.shards.folder_of`; the record of what was done.

    The record has the shard's sequences, tokens, seconds and machine. A shard that is here already is not made again,
    whichever run made it: no machine is asked for. Raises what the steps raise; StudyCancelled and BudgetSpent as
    `StudyRun.check`; PlanRefused where no machine fits.
    """
    prepared, workspace = run.prepared, run.workspace
    with locked(shard_lock(part, prepared, workspace), _waiting(run, reporter, f"part {part.title}")):
        if is_here(part, prepared, workspace):
            return read_record(part, prepared, workspace)
        if find_finished(prepared, workspace) is not None:
            # another run has joined it with the others meanwhile
            return {"sequences": part.span}
        return _make(run, part, reporter, slot)


def _make(run: StudyRun, part: Shard, reporter: Reporter, slot: Slot) -> dict[str, Any]:
    """Read and count a shard on its machine, and bring its summary home; with --formats then measure them, in rounds with the
    other shards. The caller holds the shard's lock."""
    prepared, workspace = run.prepared, run.workspace
    source = provider(prepared.spec.compute.provider, workspace.root)
    # the slot first: it is given back after the machine
    with contextlib.ExitStack() as held:
        held.enter_context(slot())
        with MachineLease(run, source, part) as lease:
            machine, env, readable = shard_machine(lease, part, reporter)
            lease.opened(machine)

            def step(verb: str, made: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
                job, name = f"{verb}-{made}-{part.first}-{part.stop}", f" {part.number}/{part.of}"
                options = ("--sequences", part.span, *more)
                return run_step(
                    run, machine, verb, job, reporter, options=options, shard=name, env=env, prepared=readable
                )

            record = _count(run, part, machine, step, _waiting(run, reporter, _JOINING))
            if prepared.spec.formats.formats:
                # another shard may fail while this one waits for it: its capture is worth keeping
                lease.kept_work = True
                waiting = _waiting(run, reporter, _JOINING)
                work = ShardAtWork(run, part, machine, reporter, step, waiting, lambda: _paused(held, slot))
                record |= {"formats": {"seconds": round(measure_shard(work), 3)}}
                write_record(folder_of(part, prepared, workspace), record)
    return record


def _count(run: StudyRun, part: Shard, machine: Machine, step: Step, waiting: Callable[[], None]) -> dict[str, Any]:
    """Read and count a shard on its machine, and place its summary here; the record of it."""
    prepared, workspace = run.prepared, run.workspace
    read = step("extract", prepared.extraction, ())
    counted = step("analyze", prepared.study_id, ())
    draft = draft_of(part, prepared, workspace)
    shutil.rmtree(draft, ignore_errors=True)
    most = demand_of(prepared.spec, prepared.model).summary_bytes
    machine.download(f"captures/{prepared.capture_id}/summaries/{prepared.study_id}", draft, max_bytes=most)
    record = {"sequences": part.span, "extraction": read, "analysis": counted, "machine": dict(machine.provenance)}
    write_record(draft, record)
    with locked(study_lock(prepared, workspace), waiting):
        place_shard(part, prepared, workspace)
    return record


@contextlib.contextmanager
def _paused(held: contextlib.ExitStack, slot: Slot) -> Iterator[None]:
    """Give a slot back in the block, and take one after it: shards that are waited for may need it."""
    held.close()
    yield
    held.enter_context(slot())


def merge_shards(run: StudyRun, parts: tuple[Shard, ...], reporter: Reporter) -> dict[str, Any]:
    """Join the summaries of all shards and write the results; their digest. The shards stay until `forget_shards`.

    Where another run has written the results meanwhile, those are the answer.
    """
    prepared, workspace = run.prepared, run.workspace
    with locked(study_lock(prepared, workspace), _waiting(run, reporter, _JOINING)):
        if (found := find_finished(prepared, workspace)) is not None:
            return {"results_digest": found["results_digest"], "files": len(found["files"])}
        folders = [folder_of(part, prepared, workspace) for part in parts]
        merged = merge_summaries(folders, workspace)
        if prepared.spec.formats.formats:
            join_shard_formats(run, folders, merged.folder)
        return write_study(prepared, workspace, reporter)


def shard_provenance(run: StudyRun) -> dict[str, Any]:
    """What the manifest says of how a spread study was made; empty where another run has published it and removed the
    shards."""
    prepared, workspace = run.prepared, run.workspace
    parts = split(prepared, prepared.spec.compute.shards)
    with locked(study_lock(prepared, workspace), _waiting(run, run.reporter, _JOINING)):
        if not all(is_here(part, prepared, workspace) for part in parts):
            return {}
        return {"parts": [read_record(part, prepared, workspace) for part in parts]}


def forget_shards(run: StudyRun) -> None:
    """Remove a study's shards. To be called once the study is published, or is not to be: a retry needs them until then."""
    prepared, workspace = run.prepared, run.workspace
    if parts_folder(prepared, workspace).exists():
        with locked(study_lock(prepared, workspace), _waiting(run, run.reporter, _JOINING)):
            remove_shards(prepared, workspace)


def _waiting(run: StudyRun, reporter: Reporter, what: str) -> Callable[[], None]:
    """What is called between two tries at a lock: says once what is waited for, and ends as a step does."""
    said = False

    def wait() -> None:
        nonlocal said
        if not said:
            said = True
            reporter.log("info", f"{what} is being done by another run, which is waited for")
        run.check()
        time.sleep(LOCK_SECONDS)

    return wait


def shard_machine(lease: MachineLease, part: Shard, reporter: Reporter) -> tuple[Machine, Mapping[str, str], Prepared]:
    """A shard's machine, variables for its jobs, and the study as that machine reads it. Raises PlanRefused."""
    run, source, prepared = lease.run, lease.source, lease.run.prepared
    demand = demand_of(prepared.spec, prepared.model)
    left = demand.layout.total_bytes * (part.stop - part.first) // prepared.corpus.num_sequences
    if any(rental.name == lease.name and rental.state == "up" for rental in source.list()):
        request = request_again(demand)
    else:
        request = check_plan(demand, source, left)
    request = replace(request, max_total_price=lease.budget_dollars)
    machine = source.ensure(lease.name, request, lease.holder, f"{prepared.title} part {part.title}")
    reporter.log("info", f"part {part.title}: machine {machine.name} ({machine.provider})")
    if machine.provider != HERE:
        return machine, {}, prepared
    return _local_shard(run, part, machine)


def check_together(run: StudyRun, of: int, free_ram_bytes: int) -> None:
    """Refuse all shards of a run if together they don't fit on this computer. Raises PlanRefused.

    `of`: how many shards. `free_ram_bytes`: what is free before the first one begins; what later ones find is not asked.
    """
    demand = demand_of(run.prepared.spec, run.prepared.model)
    why = run.refusal(lambda: refused_together(run.prepared, demand, run.workspace, free_ram_bytes, of))
    if why is not None:
        raise PlanRefused(why)


def _local_shard(run: StudyRun, part: Shard, here: Machine) -> tuple[Machine, Mapping[str, str], Prepared]:
    """A shard on this computer: a workspace of its own, which reads the model and the corpus of the study's."""
    prepared, workspace = run.prepared, run.workspace
    own = open_workspace(shard_workspace(workspace, here.name))
    for name in SHARED:
        (workspace.root / name).mkdir(exist_ok=True)
        link = own.root / name
        if not link.is_symlink():
            link.symlink_to(workspace.root / name, target_is_directory=True)
    machine, facts = LocalMachine(own.root, here.name), here.facts()
    if not facts.gpus or prepared.spec.compute.gpu_count == 0:
        check_together(run, part.of, facts.ram_available_bytes)
        return machine, {}, prepared
    # a GPU each; CUDA numbers what it shows from 0 in each process, so the GPU is named as this process names it
    names = cuda_names(len(facts.gpus))
    compute = prepared.spec.compute.model_copy(update={"gpu_count": 1})
    alone = prepared.model_copy(update={"spec": prepared.spec.model_copy(update={"compute": compute})})
    return machine, {"CUDA_VISIBLE_DEVICES": names[(part.number - 1) % len(facts.gpus)]}, alone
