"""Read the activations of every layer on the machine, in one pass; goes on from the journal."""

from __future__ import annotations

from typing import Any

from prefect import task

from outliers.dispatch.run import run_step
from outliers.machines.base import Machine
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace
from tasks.policies import RETRIES, RETRY_SECONDS, extract_key, is_transient


@task(
    name="extract",
    task_run_name="extract {prepared.title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=True,
    result_serializer="json",
    cache_key_fn=extract_key,
)
def extract(prepared: Prepared, machine: Machine, workspace: Workspace) -> dict[str, Any]:
    """What was read: sequences, tokens, bytes, seconds, device."""
    return run_step(machine, prepared, "extract", f"extract-{prepared.capture_id}", workspace)
