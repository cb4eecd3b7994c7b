"""The process of a Prefect server that this project starts: the application of `prefect server start`, behind the `guard`.

`python -m flows.server.served DESCRIPTOR [pages]` serves on a listening socket until SIGTERM. Prefect's own command would
admit any page of the user's browser. `own` starts it without pages for a command, `ui` with them.

A new database is made by all migrations that Prefect ever had, which takes seconds. $OUTLIERS_PREFECT_SEED names one that was
made before, by this version of Prefect: a home without a database begins with a copy of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from flows.server.guard import HOSTS, Guard
from outliers.files.atomic import temporary_for

SEED = "OUTLIERS_PREFECT_SEED"
DATABASE = "prefect.db"

FAILED = 3
"""Exit code of a server that never answered, the same as that of uvicorn's command."""


def seed(home: Path) -> None:
    """Give a home without a database a copy of the one that $OUTLIERS_PREFECT_SEED names.

    Raises OSError where that can't be read. Of two servers that begin at once in one home, one makes the database.
    """
    known, target = os.environ.get(SEED), home / DATABASE
    if not known or target.exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    draft = temporary_for(target)
    try:
        shutil.copyfile(known, draft)
        with contextlib.suppress(FileExistsError):
            os.link(draft, target)  # never over a database that another server has opened meanwhile
    finally:
        draft.unlink(missing_ok=True)


def serve(descriptor: int, pages: bool) -> None:
    """Prefect's server on a bound socket; `pages`: with its UI and with all services, as `make ui` has it."""
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    home, settings = get_current_settings().home, get_current_settings().server
    address = settings.database.connection_url
    if address is None or address.get_secret_value().endswith(str(home / DATABASE)):  # no other database was named
        seed(home)
    app = create_app(ephemeral=not pages, final=True)
    if pages:
        names, origins = os.environ.get(HOSTS, "").split(","), settings.api.cors_allowed_origins.split(",")
        options: dict[str, Any] = {
            "log_level": settings.logging_level.lower(),
            "timeout_keep_alive": settings.api.keepalive_timeout,
            "ws_ping_interval": settings.api.websocket_ping_interval,
            "ws_ping_timeout": settings.api.websocket_ping_timeout,
        }
    else:
        names, origins, options = [], [], {"log_level": "error"}
    guard = Guard(app, names, origins, entrance=pages)
    server = uvicorn.Server(uvicorn.Config(guard, lifespan="on", **options))
    with socket.socket(fileno=descriptor) as held:
        server.run(sockets=[held])
    if not server.started:
        sys.exit(FAILED)


if __name__ == "__main__":
    serve(int(sys.argv[1]), "pages" in sys.argv[2:])
