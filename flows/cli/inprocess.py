"""The flow in the process of the command: the one that the deployment runs, with a Prefect server of its own or another.

Prefect is imported only when a study has to run; the command has refused before what can't work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli import interrupt
from flows.cli.console import LineHandler, Steps, busy
from flows.server import password as server_password
from flows.server.own import OwnServer, door, is_decided, settle_home
from flows.server.reach import check_server, check_settings
from outliers.errors import JobFailed
from outliers.names import LOCAL as HERE
from outliers.spec import StudySpec, chosen

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.dispatch.study_run import StudyRun
    from outliers.publish.outcome import Outcome
    from outliers.workspace import Workspace

STARTING = "starting Prefect (about 10 seconds)"


def run_flow(spec: StudySpec, workspace: Workspace, console: Console) -> Outcome:
    """Run the flow of the deployment in this process, with a Prefect server of its own where none is configured."""
    server = settle_prefect(workspace.root)
    steps = Steps(console)
    if chosen(spec.compute.provider) != HERE:
        interrupt.allow(interrupt.REMOTE_SECONDS)
    with busy(console, STARTING):
        if not console.is_terminal:
            console.print(f"  {STARTING}")
        (check_server if server is None else check_settings)()
        from flows.observers import observed, on_study
        from flows.study import study
        from outliers.publish.outcome import Outcome

        if server is not None:
            server.wait()

    parameters: dict[str, Any] = {name: getattr(spec, name) for name in StudySpec.model_fields}
    parameters["compute"] = spec.compute.model_copy(update={"workspace": str(workspace.root)})

    def observe(run: StudyRun) -> None:
        run.listen(steps.listen)
        interrupt.before_end(run.end_local_jobs)

    # Prefect hands a SIGTERM on when the run has seen it: as Ctrl-C, so that the server of this process ends too
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # what a library prints (SkyPilot does) must not get into the JSON object of --json
    with (
        steps.shown(),
        _library_lines(console),
        contextlib.redirect_stdout(sys.stderr),
        observed(on_study, observe),
    ):
        return Outcome.model_validate(_through(lambda: study(**parameters)))


def _through(run: Callable[[], Any]) -> Any:
    """Call the flow. Raises JobFailed where its Prefect server stops answering, in the place of a traceback."""
    import httpx

    try:
        return run()
    except (httpx.HTTPError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        raise JobFailed(
            f"the Prefect server at {os.environ.get('PREFECT_API_URL') or 'the configured address'} did not answer any more "
            f"({str(error) or type(error).__name__}). What is done is kept: once it is back, the same command goes on where "
            "this one stopped"
        ) from error


@contextlib.contextmanager
def _library_lines(console: Console) -> Iterator[None]:
    """Show the library's own log lines: a machine that is found, deployed to, lost, answers again, is released."""
    import logging

    handler = LineHandler(console)
    names = ("outliers.machines", "outliers.leases", "outliers.own_server", "outliers.progress")
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def settle_prefect(root: Path) -> OwnServer | None:
    """Where the user has configured no Prefect, keep one in the workspace, without telemetry.

    Returns its server, which starts while Prefect is imported; None where Prefect is configured to use or start another.
    """
    settle_home(root)
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    server_password.adopt((home, root / "prefect"))
    if not is_decided(home):
        return OwnServer(home, give_up=interrupt.fail)
    # where Prefect starts a server itself, no page of another origin may use that
    for name, value in door(f"http://{server_password.HOST}/api").items():
        os.environ.setdefault(name, value)
    return None
