"""One part of a study that is spread: a machine of its own reads and counts its sequences, and the summary comes home.

Each part is a task, so a lost one is redone alone; of several runs of one study, one makes it and the others wait. On
provider `local` a part is a process of its own with a workspace of its own, and a GPU of its own where there are any.
Before it: the flow. After it: `merge`.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from outliers.counting.merge import merge_summaries
from outliers.counting.shards import (
    draft_of,
    folder_of,
    is_here,
    part_lock,
    parts_folder,
    place_part,
    read_record,
    remove_parts,
    study_lock,
    write_record,
)
from outliers.dispatch.leases import Tenancy
from outliers.dispatch.run import heed_guards, run_step
from outliers.dispatch.transfer import HERE
from outliers.errors import PlanRefused
from outliers.events.stream import Lines
from outliers.locks import locked
from outliers.machines.base import Machine
from outliers.machines.local import LocalMachine
from outliers.machines.providers import provider
from outliers.plan.plan import check_plan, planned_layout, request_for
from outliers.plan.remaining import refused_together
from outliers.publish.outcome import find_finished
from outliers.steps import run_report
from outliers.study.parts import Part, part_workspace, split
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace, open_workspace
from tasks.limits import machine_slot
from tasks.policies import RETRIES, RETRY_SECONDS, is_transient, merge_key, shard_key

SHARED = ("models", "corpora")
"""Of a workspace, what its parts on this computer read and do not make again."""

LOCK_SECONDS = 0.2
"""Between two tries at a lock that another run has."""

_REFUSED: dict[str, str | None] = {}
"""Why the parts of a run don't fit in this computer's memory together, by the run; None where they do."""
_CHECKING = threading.Lock()

STOP = threading.Event()
"""Set when the flow is cancelled: its parts run in threads, which no signal reaches."""


class PartCancelled(BaseException):
    """The flow of this part was cancelled. Not an Exception: nothing may take it for a failure of the part."""


def stop_if_cancelled() -> None:
    """A guard of `watch`: ends the part whose event was just seen."""
    if STOP.is_set():
        raise PartCancelled


@task(
    name="shard",
    task_run_name="part {part.title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=True,
    result_serializer="json",
    cache_key_fn=shard_key,
)
def shard(prepared: Prepared, part: Part, workspace: Workspace, holder: str) -> dict[str, Any]:
    """What a part did: its sequences, tokens, seconds, machine. Its summary is in `parts.folder_of` then.

    A part that is here is not made again, whoever made it: no machine is asked for.
    """
    with locked(part_lock(part, prepared, workspace), _waiting(f"part {part.title}")):
        if is_here(part, prepared, workspace):
            return read_record(part, prepared, workspace)
        if find_finished(prepared, workspace) is not None:
            # another run has joined it with the others meanwhile
            return {"sequences": part.span}
        return _make(prepared, part, workspace, holder)


def _make(prepared: Prepared, part: Part, workspace: Workspace, holder: str) -> dict[str, Any]:
    """Read and count a part on its machine, and bring its summary home. Under the part's lock."""
    source = provider(prepared.spec.compute.provider, workspace.root)
    with (
        machine_slot(prepared.spec.compute.provider),
        Tenancy(source, prepared, workspace, holder, part) as tenancy,
    ):
        machine, env, told = _machine(prepared, part, workspace, tenancy)
        tenancy.opened(machine)
        options, label = ("--sequences", part.span), f" {part.number}/{part.of}"
        job = f"{prepared.capture_id}-{part.first}-{part.stop}"
        read = run_step(machine, told, "extract", f"extract-{job}", workspace, options, label, env)
        job = f"{prepared.study_id}-{part.first}-{part.stop}"
        counted = run_step(machine, told, "analyze", f"analyze-{job}", workspace, options, label, env)
        draft = draft_of(part, prepared, workspace)
        shutil.rmtree(draft, ignore_errors=True)
        machine.download(f"captures/{prepared.capture_id}/summaries/{prepared.study_id}", draft)
        record = {"sequences": part.span, "extraction": read, "analysis": counted, "machine": dict(machine.provenance)}
        write_record(draft, record)
        with locked(study_lock(prepared, workspace), _waiting("the joining of the parts")):
            place_part(part, prepared, workspace)
    return record


@task(
    name="merge",
    task_run_name="merge {prepared.title}",
    persist_result=True,
    result_serializer="json",
    cache_key_fn=merge_key,
)
def merge(prepared: Prepared, parts: tuple[Part, ...], workspace: Workspace) -> dict[str, Any]:
    """Join the summaries of all parts and write the results; the digest of these. The parts stay until `forget_parts`.

    Where another run has written the results meanwhile, those are the answer.
    """
    with locked(study_lock(prepared, workspace), _waiting("the joining of the parts")):
        if (found := find_finished(prepared, workspace)) is not None:
            return {"results_digest": found["results_digest"], "files": len(found["files"])}
        merge_summaries([folder_of(part, prepared, workspace) for part in parts], workspace)
        return run_report(prepared, workspace, Lines(get_run_logger()))


def told_of_parts(prepared: Prepared, workspace: Workspace) -> dict[str, Any]:
    """What the manifest tells of the making of a study that was spread; nothing where another run has removed its parts,
    and told it before."""
    parts = split(prepared, prepared.spec.compute.shards)
    with locked(study_lock(prepared, workspace), _waiting("the joining of the parts")):
        if not all(is_here(part, prepared, workspace) for part in parts):
            return {}
        return {"parts": [read_record(part, prepared, workspace) for part in parts]}


def forget_parts(prepared: Prepared, workspace: Workspace) -> None:
    """Remove a study's parts, once it is published or was not to be: until then they would have to be made again."""
    if parts_folder(prepared, workspace).exists():
        with locked(study_lock(prepared, workspace), _waiting("the joining of the parts")):
            remove_parts(prepared, workspace)


def _waiting(what: str) -> Callable[[], None]:
    """How a lock is waited for: told once, and ended as a step is."""
    told: list[str] = []

    def wait() -> None:
        if not told:
            told.append(what)
            get_run_logger().info("%s is being done by another run, which is waited for", what)
        heed_guards()
        time.sleep(LOCK_SECONDS)

    return wait


def _machine(
    prepared: Prepared, part: Part, workspace: Workspace, tenancy: Tenancy
) -> tuple[Machine, Mapping[str, str], Prepared]:
    """The part's machine, what its jobs' environment has beside, and the study as it is told there."""
    spec = prepared.spec
    left = planned_layout(spec, prepared.model).total_bytes * (part.stop - part.first) // prepared.corpus.num_sequences
    if any(rental.name == tenancy.name and rental.state == "up" for rental in tenancy.source.list()):
        request = request_for(spec, prepared.model, 0)
    else:
        request = check_plan(spec, prepared.model, tenancy.source, left)
    request = replace(request, max_total_price=tenancy.budget_dollars)
    machine = tenancy.source.ensure(tenancy.name, request, tenancy.holder, f"{prepared.title} part {part.title}")
    get_run_logger().info("part %s: machine %s (%s)", part.title, machine.name, machine.provider)
    if machine.provider != HERE:
        return machine, {}, prepared
    return _process(prepared, part, workspace, machine, tenancy.holder)


def check_together(prepared: Prepared, of: int, workspace: Workspace, free_ram_bytes: int, holder: str) -> None:
    """Refuse the parts of a run that would not fit here together, every one of them. Raises PlanRefused.

    It is decided once a run, by the part that comes first: what the others then find free is less by what it took.
    """
    with _CHECKING:
        if holder not in _REFUSED:
            _REFUSED[holder] = refused_together(prepared, workspace, free_ram_bytes, of)
        if (why := _REFUSED[holder]) is not None:
            raise PlanRefused(why)


def _process(
    prepared: Prepared, part: Part, workspace: Workspace, here: Machine, holder: str
) -> tuple[Machine, Mapping[str, str], Prepared]:
    """A part on this computer: a workspace of its own, which reads the model and the corpus of the study's."""
    own = open_workspace(part_workspace(workspace, here.name))
    for name in SHARED:
        (workspace.root / name).mkdir(exist_ok=True)
        link = own.root / name
        if not link.is_symlink():
            link.symlink_to(workspace.root / name, target_is_directory=True)
    machine, facts = LocalMachine(own.root, here.name), here.facts()
    if not facts.gpus or prepared.spec.compute.gpu_count == 0:
        check_together(prepared, part.of, workspace, facts.ram_available_bytes, holder)
        return machine, {}, prepared
    # a GPU each; what CUDA shows is numbered anew in the process, so it is named as this one names it
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = known.split(",") if known else [str(number) for number in range(len(facts.gpus))]
    compute = prepared.spec.compute.model_copy(update={"gpu_count": 1})
    alone = prepared.model_copy(update={"spec": prepared.spec.model_copy(update={"compute": compute})})
    return machine, {"CUDA_VISIBLE_DEVICES": names[(part.number - 1) % len(facts.gpus)].strip()}, alone
