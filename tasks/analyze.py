"""Count on the machine that has the capture, and bring the results home: kilobytes, never activations."""

from __future__ import annotations

from typing import Any

from prefect import task

from outliers.machines.base import Machine
from outliers.manifest import read_manifest
from outliers.prepare import Prepared
from outliers.workspace import Workspace
from tasks.policies import RETRIES, RETRY_SECONDS, analyze_key, is_transient
from tasks.watch import run_step


@task(
    name="analyze",
    task_run_name="analyze {prepared.title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=True,
    result_serializer="json",
    cache_key_fn=analyze_key,
)
def analyze(
    prepared: Prepared, machine: Machine, workspace: Workspace, extracted: dict[str, Any], finished: bool = False
) -> dict[str, Any]:
    """What was found: the digest of the results, seconds, files. `extracted` only shows the order in the run's graph.

    `finished`: the machine has the results, and only Prefect has forgotten that: they are brought home, not made again.
    """
    if finished:
        machine.download(f"results/{prepared.study_id}", workspace.study(prepared.study_id))
        found = read_manifest(workspace.study(prepared.study_id)) or {}
        return {"results_digest": found.get("results_digest"), "files": len(found.get("files", ()))}
    counted = run_step(machine, prepared, "analyze", f"analyze-{prepared.study_id}", workspace)
    written = run_step(machine, prepared, "report", f"report-{prepared.study_id}", workspace)
    machine.download(f"results/{prepared.study_id}", workspace.study(prepared.study_id))
    return counted | written
