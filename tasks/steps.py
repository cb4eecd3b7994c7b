"""The steps of a study as the Prefect tasks of this flow run, for `outliers.dispatch.study.dispatch_study`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from prefect.futures import PrefectFuture, wait

from outliers.dispatch.leases import MachineLease
from outliers.dispatch.steps import PendingShard
from outliers.dispatch.study_run import StudyRun
from outliers.machines.base import Machine
from outliers.study.parts import Shard
from tasks.analyze import analyze
from tasks.extract import extract
from tasks.limits import machine_slot
from tasks.probe import probe
from tasks.provision import provision
from tasks.shard import merge, shard
from tasks.sync import sync


class TaskSteps:
    """Calls each step as a task. All but shards are called, not submitted: the signal that cancels a run raises in the
    main thread, and so in the task."""

    def slot(self, run: StudyRun) -> AbstractContextManager[None]:
        return machine_slot(run, run.reporter)

    def provision(self, lease: MachineLease) -> Machine:
        return provision(lease)

    def extract(self, run: StudyRun, machine: Machine, *, again: bool) -> dict[str, Any]:
        return extract.with_options(refresh_cache=again)(run, machine)

    def analyze(self, run: StudyRun, machine: Machine, extracted: dict[str, Any], *, finished: bool) -> dict[str, Any]:
        return analyze.with_options(refresh_cache=not finished)(run, machine, extracted, finished)

    def probe(self, run: StudyRun, machine: Machine, analyzed: dict[str, Any]) -> dict[str, Any]:
        return probe.with_options(refresh_cache=True)(run, machine, analyzed)

    def start_shard(self, run: StudyRun, part: Shard, *, again: bool) -> PendingShard:
        return _TaskShard(shard.with_options(refresh_cache=again).submit(run, part))

    def merge(self, run: StudyRun, parts: tuple[Shard, ...]) -> dict[str, Any]:
        return merge.with_options(refresh_cache=True)(run, parts)

    def sync(self, run: StudyRun, made_on: dict[str, Any], analyzed: dict[str, Any]) -> str | None:
        return sync.with_options(refresh_cache=True)(run, made_on, analyzed)


class _TaskShard:
    """A shard that a task of this flow run makes."""

    def __init__(self, future: PrefectFuture[dict[str, Any]]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.state.is_final()

    def failure(self) -> str | None:
        state = self._future.state
        return None if state.is_completed() else str(state.message)

    def result(self) -> dict[str, Any]:
        return self._future.result()

    def wait(self, seconds: float) -> None:
        # a future's own `wait` raises what its task raised, StudyCancelled too
        wait([self._future], timeout=seconds)
