"""When a task is run again, and what a result is remembered by."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.tasks import Task

from outliers.errors import MachineGone, TransientError
from outliers.spec import digest

RETRIES = 3
RETRY_SECONDS: list[float] = [2, 10, 30]
"""Backoff between tries; a machine or store that needs longer is a case for Retry in the UI."""


# a plain function: Prefect never retries, without a word, when this is a partial or a callable object
def is_transient(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed try may succeed later: see `outliers.errors`."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TransientError) and not isinstance(error, MachineGone)


def extract_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """A capture is on one disk: another instance of the machine has it no more."""
    return f"extract-{parameters['prepared'].capture_id}-{parameters['machine'].instance_id}"


def analyze_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The results of a study, in this workspace, from the summary on that machine."""
    prepared, workspace = parameters["prepared"], digest(str(parameters["workspace"].root))[:12]
    return f"analyze-{prepared.study_id}-{parameters['machine'].instance_id}-{workspace}"


def shard_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The summary of a part of a study, in this workspace: whatever machine it came from."""
    prepared, part, workspace = parameters["prepared"], parameters["part"], digest(str(parameters["workspace"].root))
    return f"shard-{prepared.study_id}-{part.first}-{part.stop}-{workspace[:12]}"


def merge_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The results of a study that was spread, in this workspace."""
    return f"merge-{parameters['prepared'].study_id}-{digest(str(parameters['workspace'].root))[:12]}"


def sync_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """A study at a target."""
    prepared = parameters["prepared"]
    return f"sync-{prepared.study_id}-{digest(prepared.spec.publish_to)[:12]}"
