"""The step `sync` as a Prefect task."""

from __future__ import annotations

from typing import Any

from prefect import task

from outliers.dispatch.steps import sync_study
from outliers.dispatch.study_run import StudyRun
from tasks.policies import RETRIES, RETRY_SECONDS, is_transient, sync_key


@task(
    name="sync",
    task_run_name="sync {run.prepared.title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=True,
    result_serializer="json",
    cache_key_fn=sync_key,
)
def sync(run: StudyRun, made_on: dict[str, Any], analyzed: dict[str, Any]) -> str | None:
    """As `outliers.dispatch.steps.sync_study`; `analyzed` also shows the order in the run's graph."""
    return sync_study(run, made_on, analyzed)
