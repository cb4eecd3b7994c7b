"""The step `provision` as a Prefect task. Never cached: a machine is found again by its name, not by a stored result."""

from __future__ import annotations

from prefect import task

from outliers.dispatch.leases import MachineLease
from outliers.dispatch.steps import provision_machine
from outliers.machines.base import Machine
from tasks.policies import RETRIES, RETRY_SECONDS, is_transient
from tasks.progress import TaskReporter


@task(
    name="provision",
    task_run_name="provision {lease.run.prepared.title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=False,
)
def provision(lease: MachineLease) -> Machine:
    """As `outliers.dispatch.steps.provision_machine`."""
    with TaskReporter(lease.run.prepared.title, lease.run.prepared.study_id) as reporter:
        return provision_machine(lease, reporter)
