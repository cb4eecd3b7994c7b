"""Opens the executor of an analysis by its name: threads of this process, or the workers of a Dask cluster.

    threads          as many as the machine has cores (the default); threads=N for another number
    dask=ADDRESS     a scheduler's address, such as dask=tcp://10.0.0.5:8786

`analyze` takes any executor with the interface of `concurrent.futures`; this module knows the two that have a name. The
workers mount the disk of the workspace. Dask repeats the work item of a worker that died; the numbers do not depend on the
executor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor

from outliers.errors import BadInput, MachineLost
from outliers.spec import EXECUTOR

WAIT_SECONDS = 30


def threads_of(name: str) -> int | None:
    """How many threads of this process an executor of that name means; None for as many as the machine has cores."""
    kind, _, value = name.partition("=")
    return int(value) if kind == "threads" and value else None


@contextlib.contextmanager
def open_executor(name: str, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[tuple[Executor | None, int | None]]:
    """The executor of that name, None for threads of this process, and its number of workers, None for all cores.

    wait_seconds: for the scheduler and for its first worker. Raises BadInput for an invalid name or a missing library,
    MachineLost if no worker answers or if several workers died over the same work item.
    """
    kind, _, value = name.partition("=")
    if not EXECUTOR.fullmatch(name):
        raise BadInput(
            f"--executor {name} is not a valid executor: give threads, threads=N, or dask=ADDRESS, such as dask=tcp://10.0.0.5:8786"
        )
    if kind == "threads":
        yield None, threads_of(name)
        return
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise BadInput(f"--executor {name} needs Dask: pip install 'outlier-features[dask]'") from error
    try:
        client = Client(value, timeout=wait_seconds, set_as_default=False)
    except (OSError, ValueError) as error:
        raise MachineLost(f"no Dask scheduler answers at {value}: {error}") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=wait_seconds)
        except TimeoutError as error:
            raise MachineLost(f"the Dask scheduler at {value} has no worker after {wait_seconds:g} s") from error
        threads = sum(client.nthreads().values())
        executor = client.get_executor()
        try:
            yield executor, threads
        except KilledWorker as error:
            raise MachineLost(
                f"several Dask workers of {value} died over the same work item ({error}): check their memory, then run the "
                "same command again"
            ) from error
        finally:
            executor.shutdown(wait=False)
