"""The step `probe` as a Prefect task."""

from __future__ import annotations

from typing import Any

from prefect import task

from outliers.dispatch.steps import probe_study
from outliers.dispatch.study_run import StudyRun
from outliers.machines.base import Machine
from tasks.policies import RETRIES, RETRY_SECONDS, is_transient, probe_key
from tasks.progress import TaskReporter


@task(
    name="probe",
    task_run_name="probe {run.prepared.title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=True,
    result_serializer="json",
    cache_key_fn=probe_key,
)
def probe(run: StudyRun, machine: Machine, analyzed: dict[str, Any]) -> dict[str, Any]:
    """As `outliers.dispatch.steps.probe_study`. `analyzed` only shows the order in the run's graph."""
    with TaskReporter(run.prepared.title, run.prepared.study_id) as reporter:
        return probe_study(run, machine, reporter)
