"""An empty database of Prefect's server, made once a checkout: a server that finds one starts with half the work.

A new server's home is made by all migrations of Prefect, one after the other: 6 seconds of a core, at each of some sixty servers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from flows.server.served import DATABASE, SEED

MAKE = """
import asyncio
from prefect.server.database import provide_database_interface
asyncio.run(provide_database_interface().create_db())
"""


def make_seed(folder: Path) -> None:
    """Make the database for this version of Prefect, if it is not there, and name it to all processes of the tests."""
    place = folder / f"prefect-{metadata.version('prefect')}"
    os.environ[SEED] = str(place / DATABASE)
    if (place / DATABASE).exists():
        return
    draft = folder / f".prefect-{os.getpid()}"
    known = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = known | {"PREFECT_HOME": str(draft), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    subprocess.run([sys.executable, "-c", MAKE], env=environment, check=True)
    draft.rename(place)
