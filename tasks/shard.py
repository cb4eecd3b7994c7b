"""The shards of a study that is spread, and the joining of their summaries, as Prefect tasks."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from outliers.dispatch.shard import make_shard, merge_shards
from outliers.dispatch.study_run import StudyRun
from outliers.events.stream import Lines
from outliers.study.parts import Shard
from tasks.limits import machine_slot
from tasks.policies import RETRIES, RETRY_SECONDS, is_transient, merge_key, shard_key
from tasks.progress import TaskReporter


@task(
    name="shard",
    task_run_name="part {part.title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=True,
    result_serializer="json",
    cache_key_fn=shard_key,
)
def shard(run: StudyRun, part: Shard) -> dict[str, Any]:
    """As `outliers.dispatch.shard.make_shard`."""
    title, ident = run.prepared.title, run.prepared.study_id
    with TaskReporter(f"{title} {part.number}/{part.of}", f"{ident}-{part.number}of{part.of}") as reporter:
        return make_shard(run, part, reporter, lambda: machine_slot(run, reporter))


@task(
    name="merge",
    task_run_name="merge {run.prepared.title}",
    persist_result=True,
    result_serializer="json",
    cache_key_fn=merge_key,
)
def merge(run: StudyRun, parts: tuple[Shard, ...]) -> dict[str, Any]:
    """As `outliers.dispatch.shard.merge_shards`."""
    return merge_shards(run, parts, Lines(get_run_logger()))
