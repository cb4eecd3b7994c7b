"""The second net under every lease, and under Prefect: a scheduled flow. The deployment `reap`.

The first net is the machine's own timer, and needs nobody. This one looks at the records and the providers' lists; and at
runs that Prefect takes for alive and that have no process any more.
"""

from __future__ import annotations

from prefect import flow
from prefect.logging import get_run_logger

from flows.hooks.stale import end_stale_runs
from outliers.errors import JobFailed
from outliers.machines.reap import reap as end_overdue
from outliers.workspace import open_workspace


@flow(name="reap", flow_run_name="reap", result_serializer="json", retries=0)
def reap(workspace: str | None = None) -> list[str]:
    """End every machine whose lease is over, and every run of this computer that died with its worker.

    Args:
        workspace: folder with the records of what was rented (default: $OUTLIERS_WORKSPACE, else ~/.outliers)
    """
    # first the runs: no trouble with a provider may leave them as they are
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
