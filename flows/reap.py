"""The second safeguard under every lease, and under Prefect: a scheduled flow, the deployment `reap`.

The first safeguard is each machine's own timer. This one compares the records with the providers' lists, and ends runs that
Prefect believes alive and that have no process any more.
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from flows.failures import failed_with, quiet_tracebacks
from flows.hooks.stale import end_stale_runs
from flows.run_names import reap_name
from outliers.errors import JobFailed, OutliersError
from outliers.machines.reap import reap as end_overdue
from outliers.workspace import open_workspace


@flow(name="reap", flow_run_name=reap_name, result_serializer="json", retries=0)
def reap(workspace: str | None = None) -> Any:
    """End every machine whose lease is over, and every run of this computer that died with its worker.

    Args:
        workspace: folder with the records of what was rented (default: $OUTLIERS_WORKSPACE, else ~/.outliers)
    """
    quiet_tracebacks()
    try:
        return end_all(workspace)
    except OutliersError as error:
        return failed_with(error)


def end_all(workspace: str | None) -> list[str]:
    """What the flow does: a sentence for each machine and run that was ended. Raises JobFailed where one could not be."""
    # the runs first: an error of a provider must not keep them from being ended
    records = open_workspace(workspace)
    ended, unended = end_stale_runs(records)
    released, unreleased = end_overdue(records)
    done, failed = [*ended, *released], [*unended, *unreleased]
    logger = get_run_logger()
    for text in done:
        logger.info("%s", text)
    for text in failed:
        logger.error("%s", text)
    if failed:
        raise JobFailed("; ".join(failed))
    return done
