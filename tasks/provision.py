"""Find or rent the machine of a study. Never cached: a machine is found again by its name, not by a remembered answer."""

from __future__ import annotations

from prefect import task
from prefect.logging import get_run_logger

from outliers.dispatch.leases import Tenancy
from outliers.machines.base import Machine
from outliers.plan.plan import request_for
from outliers.plan.remaining import check_rest
from outliers.study.prepare import Prepared
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
def provision(prepared: Prepared, workspace: Workspace, tenancy: Tenancy) -> Machine:
    """The machine on which the study runs, held from now on; PlanRefused, with every reason, where none fits."""
    source = tenancy.source
    if any(rental.name == tenancy.name and rental.state == "up" for rental in source.list()):
        # it was chosen before, and what is on its disk already needs no room; one whose launch failed is chosen anew
        request = request_for(prepared.spec, prepared.model, 0)
    else:
        request = check_rest(prepared, workspace, source)
    machine = source.ensure(tenancy.name, request, tenancy.holder, prepared.title)
    get_run_logger().info("machine %s (%s), $%.2f an hour", machine.name, machine.provider, machine.price_per_hour)
    return machine
