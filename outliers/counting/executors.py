"""Who counts: threads of this process, or the workers of a Dask cluster that mount the workspace's disk.

    threads          as many as the machine has cores (the default); threads=N for another number
    dask=ADDRESS     a scheduler's address, such as dask=tcp://10.0.0.5:8786

Anything with the interface of `concurrent.futures` can be handed to `analyze`; this knows the two that have a name. Dask
itself retries the part of a worker that died; the numbers do not depend on who counted.
Before it: the spec. After it: `analyze`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor

from outliers.errors import BadInput, MachineLost
from outliers.spec import EXECUTOR

WAIT_SECONDS = 30


@contextlib.contextmanager
def open_executor(name: str) -> Iterator[tuple[Executor | None, int | None]]:
    """The executor of that name, None for this process's own threads, and how many count at once, None for all cores.

    Raises BadInput for a name that is none or a library that is missing, MachineLost where no worker answers or one part
    after another killed the worker that had it.
    """
    kind, _, value = name.partition("=")
    if not EXECUTOR.fullmatch(name):
        raise BadInput(
            f"--executor {name} is none: threads, threads=N, or dask=ADDRESS such as dask=tcp://10.0.0.5:8786"
        )
    if kind == "threads":
        yield None, int(value) if value else None
        return
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise BadInput(f"--executor {name} needs Dask: pip install 'outlier-features[dask]'") from error
    try:
        client = Client(value, timeout=WAIT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise MachineLost(f"no Dask scheduler answers at {value}: {error}") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=WAIT_SECONDS)
        except TimeoutError as error:
            raise MachineLost(f"the Dask scheduler at {value} has no worker after {WAIT_SECONDS} s") from error
        threads = sum(client.nthreads().values())
        executor = client.get_executor()
        try:
            yield executor, threads
        except KilledWorker as error:
            raise MachineLost(
                f"several Dask workers of {value} died over the same part ({error}): look at their memory, then run the same "
                "again"
            ) from error
        finally:
            executor.shutdown(wait=False)
