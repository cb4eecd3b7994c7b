"""A study that is not finished yet, from its machine to its publication: the steps, in order.

What was done before is not done again: `publish.outcome` says what is finished, the machine what it has, the journal where a
capture goes on.
"""

from __future__ import annotations

import time
from typing import Any

from outliers.counting.shards import is_here
from outliers.dispatch.leases import MachineLease
from outliers.dispatch.shard import shard_provenance
from outliers.dispatch.state import machine_state
from outliers.dispatch.steps import DirectSteps, PendingShard, Steps
from outliers.dispatch.study_run import StudyRun
from outliers.dispatch.transfer import check_transfer
from outliers.files.sealed import write_sealed
from outliers.machines.providers import provider
from outliers.probe.checks import check_before
from outliers.publish.outcome import Outcome, find_finished, make_outcome
from outliers.publish.own import keep_names
from outliers.publish.probes import is_probed
from outliers.publish.publish import check_target
from outliers.study.parts import split

POLL_SECONDS = 0.2
CANCEL_SECONDS = 25.0
"""How long a cancelled run waits for its shards to end. Prefect kills a cancelled run 30 s after its signal."""


def dispatch_study(run: StudyRun, steps: Steps | None = None) -> Outcome:
    """Run the steps of a study that is not finished yet; its outcome.

    Results that are in the workspace already are published, and nothing else is done: they need no machine, unless a probe of
    them is still to be made, which goes to the machine that has their capture. `steps`: how
    each one is called (default: directly, in this process). Raises the errors of the steps; PlanRefused, with every reason,
    where no machine fits; StudyCancelled once `run.cancel` was called.
    """
    steps = steps or DirectSteps()
    prepared, workspace = run.prepared, run.workspace
    run.reporter.log("info", f"study {prepared.study_id}, capture {prepared.capture_id}")
    if prepared.spec.publish_to is not None:
        check_target(prepared.spec.publish_to)
    if prepared.spec.probe.asked:
        check_before(prepared)
    keep_asked(run)
    spread = prepared.spec.compute.shards > 1
    found = find_finished(prepared, workspace)
    if found is not None and is_probed(prepared, workspace):
        run.reporter.log("info", "the results are in the workspace: they are published, no machine is asked for")
        made_on = shard_provenance(run) if spread else {}
        counted = {"results_digest": found["results_digest"], "files": len(found["files"])}
    else:
        check_transfer(prepared)
        made_on, counted = run_shards(run, steps) if spread else run_whole(run, steps, found)
    published = steps.sync(run, made_on, counted)
    return make_outcome(prepared, workspace, published=published, cached=False)


def keep_asked(run: StudyRun) -> None:
    """Keep the study as it was asked for: the next probe of it asks for the same machine and target. Its names are kept too."""
    place = run.workspace.asked(run.prepared.study_id)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(place, run.prepared.model_dump(mode="json"))
    keep_names(run.prepared, run.workspace)


def run_whole(
    run: StudyRun, steps: Steps, found: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A study on one machine, to its results in the workspace: (what made them, what the analysis says).

    found: the manifest of results that are in the workspace; then a probe is left, and a machine that still has the capture
    reads nothing again. The machine is given back with the results: no machine that is paid for waits while a store is away.
    """
    source = provider(run.prepared.spec.compute.provider, run.workspace.root)
    # the slot first: it is given back after the machine
    with steps.slot(run), MachineLease(run, source) as lease:
        machine = steps.provision(lease)
        lease.opened(machine)
        state = machine_state(run, machine)
        lease.kept_work |= state["capture"]
        if found is not None and state["capture"] and state["summary"]:
            made_on: dict[str, Any] = {}
            analyzed: dict[str, Any] = {"results_digest": found["results_digest"], "files": len(found["files"])}
        else:
            made_on = {"machine": dict(machine.provenance)}
            extracted = steps.extract(run, machine, again=not state["capture"])
            analyzed = steps.analyze(run, machine, extracted, finished=state["results"])
        if not is_probed(run.prepared, run.workspace):
            steps.probe(run, machine, analyzed)
        return made_on, analyzed


def run_shards(run: StudyRun, steps: Steps) -> tuple[dict[str, Any], dict[str, Any]]:
    """A study that is spread: each shard on a machine of its own, all at once; then their summaries are joined here.

    A run that is cancelled ends its shards, waits for them, and only then ends.
    """
    parts = split(run.prepared, run.prepared.spec.compute.shards)
    pending: list[PendingShard] = []
    try:
        for part in parts:
            again = not is_here(part, run.prepared, run.workspace)
            pending.append(steps.start_shard(run, part, again=again))
        while not all(shard.done() for shard in pending):
            run.check()
            if any(shard.done() and shard.failure() is not None for shard in pending):
                run.failed_parts.set()
            time.sleep(POLL_SECONDS)
    except BaseException:
        run.reporter.log("warning", f"cancelled: ending {len(parts)} parts")
        run.cancel()
        until = time.monotonic() + CANCEL_SECONDS
        for shard in pending:
            shard.wait(max(0.0, until - time.monotonic()))
        raise
    ended = zip(parts, pending, strict=True)
    failed = [(part.number in run.gave_up, shard) for part, shard in ended if shard.failure() is not None]
    for part, shard in zip(parts, pending, strict=True):
        if (why := shard.failure()) is not None:
            run.reporter.log("error", f"part {part.title} (sequences {part.span}) failed: {why}")
    if failed:
        # the first error is the run's, not that of a shard which waited for it; what the other shards made is kept, and Retry
        # makes the failed ones alone
        min(failed, key=lambda one: one[0])[1].result()
    return shard_provenance(run), steps.merge(run, parts)
