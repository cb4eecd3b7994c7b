"""Find or rent the machine of a study. Never cached: a machine is found again by its name, not by a remembered answer."""

from __future__ import annotations

from prefect import task
from prefect.logging import get_run_logger

from outliers.machines import provider
from outliers.machines.base import Machine
from outliers.plan import bytes_left, check_plan
from outliers.prepare import Prepared
from outliers.workspace import Workspace
from tasks.policies import RETRIES, RETRY_SECONDS, is_transient


@task(
    name="provision",
    task_run_name="provision {prepared.title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=False,
)
def provision(prepared: Prepared, workspace: Workspace) -> Machine:
    """The machine on which the study runs; PlanRefused, with every reason, where none fits."""
    source = provider(prepared.spec.compute.provider, workspace.root)
    request = check_plan(prepared.spec, prepared.model, source, bytes_left(prepared, workspace))
    name = prepared.spec.compute.machine or f"outliers-{prepared.capture_id}"
    machine = source.ensure(name, request)
    get_run_logger().info("machine %s (%s), $%.2f an hour", machine.name, machine.provider, machine.price_per_hour)
    return machine
