"""When a task is run again, and the keys of cached results. A key is made of ids, never of a task's whole parameters."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.tasks import Task

from outliers.dispatch.study_run import StudyRun
from outliers.errors import MachineGone, TransientError
from outliers.spec import digest
from outliers.study.probes import probe_id

RETRIES = 3
RETRY_SECONDS: list[float] = [2, 10, 30]
"""Between two tries; a machine or store that needs longer is a case for Retry in the UI."""


# a plain function: where this is a partial or a callable object, Prefect silently never retries
def is_transient(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed try may succeed later: see `outliers.errors`."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TransientError) and not isinstance(error, MachineGone)


def extract_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """A capture, or what a study counts of it, is on one disk: another instance of the machine does not have it."""
    return f"extract-{parameters['run'].prepared.extraction}-{parameters['machine'].instance_id}"


def analyze_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The results of a study, in this workspace, from the summary on that machine."""
    run = parameters["run"]
    return f"analyze-{run.prepared.study_id}-{parameters['machine'].instance_id}-{_workspace(run)}"


def probe_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The results of a probe, in this workspace."""
    run = parameters["run"]
    return f"probe-{probe_id(run.prepared)}-{parameters['machine'].instance_id}-{_workspace(run)}"


def shard_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The summary of a shard of a study, in this workspace, whichever machine made it."""
    run, part = parameters["run"], parameters["part"]
    return f"shard-{run.prepared.study_id}-{part.first}-{part.stop}-{_workspace(run)}"


def merge_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The results of a study that was spread, in this workspace."""
    run = parameters["run"]
    return f"merge-{run.prepared.study_id}-{_workspace(run)}"


def sync_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """A study at a target."""
    prepared = parameters["run"].prepared
    return f"sync-{prepared.study_id}-{digest(prepared.spec.publish_to)[:12]}"


def _workspace(run: StudyRun) -> str:
    return digest(str(run.workspace.root))[:12]
