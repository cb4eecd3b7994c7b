"""The step `extract` as a Prefect task."""

from __future__ import annotations

from typing import Any

from prefect import task

from outliers.dispatch.steps import extract_study
from outliers.dispatch.study_run import StudyRun
from outliers.machines.base import Machine
from tasks.policies import RETRIES, RETRY_SECONDS, extract_key, is_transient
from tasks.progress import TaskReporter


@task(
    name="extract",
    task_run_name="extract {run.prepared.title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=True,
    result_serializer="json",
    cache_key_fn=extract_key,
)
def extract(run: StudyRun, machine: Machine) -> dict[str, Any]:
    """As `outliers.dispatch.steps.extract_study`."""
    with TaskReporter(run.prepared.title, run.prepared.study_id) as reporter:
        return extract_study(run, machine, reporter)
