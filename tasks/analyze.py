"""Count on the machine that has the capture, bring the numbers home, and render them here: kilobytes, never activations."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from outliers.dispatch.run import run_step
from outliers.events.stream import Lines
from outliers.machines.base import Machine
from outliers.publish.received import receive_study
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace
from tasks.policies import RETRIES, RETRY_SECONDS, analyze_key, is_transient


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

    `finished`: the machine has the numbers, and only Prefect has forgotten that: they are brought home, not made again.
    """
    reporter = Lines(get_run_logger())
    if finished:
        return receive_study(prepared, machine, workspace, reporter)
    counted = run_step(machine, prepared, "analyze", f"analyze-{prepared.study_id}", workspace)
    job = f"report-{prepared.study_id}"
    written = run_step(machine, prepared, "report", job, workspace, ("--numbers",))
    return counted | receive_study(prepared, machine, workspace, reporter, str(written.get("results_digest")))
