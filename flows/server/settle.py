"""Sets a Prefect server up for this project: work pool, limit on rented machines, deployments. `python -m flows.server.settle`.

The server is the one that PREFECT_API_URL names. A second run changes nothing: a pool or a limit that exists stays as the
user made it, and the deployments are those of prefect.yaml. A worker is needed then; `flows.server.ui` starts one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.exceptions import ObjectNotFound

from outliers.errors import BadInput, JobFailed
from tasks.limits import LIMIT

POOL = "outliers"
MACHINES = 4
"""The default limit on rented machines at once: enough for a sweep, and few enough that a mistake stays cheap."""
ROOT = Path(__file__).resolve().parents[2]
DEPLOY_SECONDS = 300


def settle(machines: int | None = None) -> list[str]:
    """Make what is missing; returns a sentence for each thing. `machines`: sets the limit, also where there is one."""
    with get_client(sync_client=True) as client:
        made = [_pool(client), _limit(client, machines)]
    return [*made, _deploy()]


def _pool(client: SyncPrefectClient) -> str:
    try:
        found = client.read_work_pool(POOL)
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(name=POOL, type="process", description="studies of the outliers project")
        )
        return f"work pool {POOL} made"
    return f"work pool {POOL} is there ({found.type})"


def _limit(client: SyncPrefectClient, machines: int | None) -> str:
    try:
        found = client.read_global_concurrency_limit_by_name(LIMIT)
    except ObjectNotFound:
        limit = MACHINES if machines is None else machines
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=limit, active=True))
        return f"concurrency limit {LIMIT} made: {limit} rented machines at once"
    if machines is None or machines == found.limit:
        return f"concurrency limit {LIMIT} is there: {found.limit} rented machines at once"
    client.upsert_global_concurrency_limit_by_name(LIMIT, machines)
    return f"concurrency limit {LIMIT} is {machines} now, it was {found.limit}"


def _deploy() -> str:
    """Deploy with Prefect's own command: prefect.yaml is the only description of the deployments."""
    if not (ROOT / "prefect.yaml").exists():
        raise BadInput(f"{ROOT} has no prefect.yaml: deployments are made from a checkout of the project")
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=DEPLOY_SECONDS, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise JobFailed(f"prefect deploy --all ended with {done.returncode}: {done.stdout}{done.stderr}")
    return "deployments of prefect.yaml made"


def main(argv: list[str] | None = None) -> int:
    """`python -m flows.server.settle`."""
    parser = argparse.ArgumentParser(prog="python -m flows.server.settle", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--machines", type=int, metavar="N", help=f"rented machines at once (default: as it is, else {MACHINES})"
    )
    for text in settle(parser.parse_args(argv).machines):
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
