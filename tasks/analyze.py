"""The steps `analyze` and `report` as one Prefect task."""

from __future__ import annotations

from typing import Any

from prefect import task

from outliers.dispatch.steps import analyze_study
from outliers.dispatch.study_run import StudyRun
from outliers.machines.base import Machine
from tasks.policies import RETRIES, RETRY_SECONDS, analyze_key, is_transient
from tasks.progress import TaskReporter


@task(
    name="analyze",
    task_run_name="analyze {run.prepared.title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=True,
    result_serializer="json",
    cache_key_fn=analyze_key,
)
def analyze(run: StudyRun, machine: Machine, extracted: dict[str, Any], finished: bool = False) -> dict[str, Any]:
    """As `outliers.dispatch.steps.analyze_study`. `extracted` only shows the order in the run's graph.

    `finished`: the machine has the numbers, and only Prefect has lost its result.
    """
    with TaskReporter(run.prepared.title, run.prepared.study_id) as reporter:
        return analyze_study(run, machine, reporter, finished=finished)
