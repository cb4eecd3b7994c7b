"""Whether a container of `containers/` is healthy: `python -m flows.server.alive [--gpu]`, exit code 0 or 1 and a sentence.

A container with a Prefect worker is healthy while the worker polls (`prefect worker start --with-healthcheck` answers that on
its port). One that Prefect started for a single run has no worker, and ends with its run. It imports no Prefect: it runs twice
a minute.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import urllib.error
from urllib.request import ProxyHandler, build_opener

RUN = "PREFECT__FLOW_RUN_ID"
"""Set by Prefect in the container of a single run."""
PORT = "PREFECT_WORKER_WEBSERVER_PORT"
"""Prefect's setting of the worker's port; 8080 where it is not set."""
SECONDS = 5.0


def sick(gpu: bool) -> str | None:
    """What is wrong with this container; None where nothing is. `gpu`: it needs NVIDIA's driver."""
    return (_without_driver() if gpu else None) or (None if os.environ.get(RUN) else _without_worker())


def _without_driver() -> str | None:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"NVIDIA's driver does not answer ({error}): start the container with --gpus all"
    return None if done.returncode == 0 else f"nvidia-smi ended with {done.returncode}: {done.stderr or done.stdout}"


def _without_worker() -> str | None:
    url = f"http://127.0.0.1:{os.environ.get(PORT) or 8080}/health"
    try:
        # never by a proxy of the environment: the worker is in this container
        with build_opener(ProxyHandler({})).open(url, timeout=SECONDS):
            return None
    except (urllib.error.URLError, OSError) as error:
        return f"no worker answers at {url} ({error}); start it with --with-healthcheck"


def main(argv: list[str] | None = None) -> int:
    """`python -m flows.server.alive`."""
    parser = argparse.ArgumentParser(prog="python -m flows.server.alive", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="ask NVIDIA's driver too")
    wrong = sick(parser.parse_args(argv).gpu)
    print(wrong or "healthy")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
