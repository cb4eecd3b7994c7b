"""Sweep -> SweepPlan: what each study takes and all of them together, before anything is spent.

Each study is planned as `outliers plan` plans it; the plan of one that can't be planned is its error. A study whose capture
an earlier one writes has none to write. Nothing is run, and no text is read: studies that are there already are not looked
for. `outliers sweep --dry-run` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from outliers.errors import OutliersError
from outliers.hub.client import waited_for_once
from outliers.machines.base import Provider
from outliers.machines.providers import provider
from outliers.planning.plan import Plan, make_plan
from outliers.spec import DEFAULT_PROVIDER, chosen
from outliers.study.prepare import model_info
from outliers.sweep.sweep import Sweep, SweepStudy, next_to_start
from outliers.units import amounts
from outliers.workspace import open_workspace


class StudyPlan(BaseModel):
    """The plan of one study, or why there is none. `seconds` and `price` are of the first, the cheapest offer."""

    model_config = ConfigDict(frozen=True)

    name: str
    model: str
    plan: Plan | None = None
    machine: str | None = None
    seconds: float | None = None
    price: float | None = None
    """Dollars; None where nothing fits, or a step's speed is not known."""
    left_out: tuple[str, ...] = ()
    """Steps that have no number: `seconds` is without them."""
    refused: str | None = None


class SweepPlan(BaseModel):
    """All studies, and their sums over those that can run. `wall_seconds`: as the flow runs them, `parallel` at once."""

    model_config = ConfigDict(frozen=True)

    name: str
    parallel: int
    studies: tuple[StudyPlan, ...]
    seconds: float
    wall_seconds: float
    price: float
    unpriced: tuple[str, ...]
    """Studies whose price is not known: `price` is without them."""
    capture_bytes: int
    download_bytes: int
    refusals: tuple[str, ...]
    """What does not fit for all studies together, though it fits for each alone."""
    remedy: str | None = None
    """What to do first, where models' paths do not exist."""


def plan_sweep(
    sweep: Sweep,
    find: Callable[[str, Path], Provider] = provider,
    tell: Callable[[SweepStudy], None] = lambda study: None,
) -> SweepPlan:
    """Plan every study of a sweep. Never raises for one of them: its error is its plan.

    `find`: the provider of a name, for a workspace. `tell`: called as each is begun. A hub that did not answer for one
    model is not waited for again.
    """
    seen: set[str] = set()
    studies = []
    with waited_for_once():
        for study in sweep.studies:
            tell(study)
            studies.append(_plan_study(study, find, shared=study.capture_key in seen))
            seen.add(study.capture_key)
    fits = [study for study in studies if study.refused is None and study.plan is not None]
    lasts = {study.name: study.seconds or 0.0 for study in fits}
    downloads = {study.plan.model: study.plan.download_bytes for study in fits if study.plan}
    return SweepPlan(
        name=sweep.name,
        parallel=sweep.parallel,
        studies=tuple(studies),
        seconds=round(sum(lasts.values()), 1),
        wall_seconds=round(wall_seconds(sweep, lasts), 1),
        price=round(sum(study.price or 0.0 for study in fits), 4),
        unpriced=tuple(study.name for study in fits if study.price is None),
        capture_bytes=sum(study.plan.capture_bytes_left for study in fits if study.plan),
        download_bytes=sum(downloads.values()),
        refusals=_together(sweep, fits),
        remedy=sweep.remedy,
    )


def wall_seconds(sweep: Sweep, lasts: Mapping[str, float]) -> float:
    """When the last study ends, in seconds, if the flow runs them. `lasts`: seconds of each study that runs, by name."""
    waiting = [study for study in sweep.studies if study.name in lasts]
    running: list[tuple[float, SweepStudy]] = []
    now, hub_again = 0.0, 0.0
    while waiting or running:
        # compared with a time: a difference of times, rounded, may stay below the stagger, and the loop would not end
        since_hub = sweep.stagger_seconds if now >= hub_again else 0.0
        study = next_to_start(sweep, waiting, [one for _, one in running], since_hub)
        if study is not None:
            waiting.remove(study)
            running.append((now + lasts[study.name], study))
            hub_again = now + sweep.stagger_seconds if study.from_hub else hub_again
            continue
        times = [end for end, _ in running]
        if waiting and now < hub_again:
            times.append(hub_again)
        now = min(times)
        running = [(end, one) for end, one in running if end > now]
    return now


def _plan_study(study: SweepStudy, find: Callable[[str, Path], Provider], shared: bool) -> StudyPlan:
    name, spec = study.name, study.spec
    try:
        workspace = open_workspace(spec.compute.workspace)
        source = find(spec.compute.provider, workspace.root)
        plan = make_plan(spec, model_info(spec, workspace, weights=False), source, 0 if shared else None)
    except OutliersError as error:
        return StudyPlan(name=name, model=spec.model.id, refused=str(error))
    if not plan.offers:
        return StudyPlan(name=name, model=spec.model.id, plan=plan, refused="; ".join(plan.refusals) or "no machine")
    offer = plan.offers[0]
    return StudyPlan(
        name=name,
        model=spec.model.id,
        plan=plan,
        machine=offer["name"],
        seconds=offer["total_seconds"],
        price=offer["total_price"] if offer["price_per_hour"] else 0.0,
        left_out=tuple(offer["left_out"]),
    )


def _together(sweep: Sweep, fits: list[StudyPlan]) -> tuple[str, ...]:
    """Why the studies on this computer don't fit together: captures share its disk, studies at once its memory."""
    here = {study.name for study in sweep.studies if chosen(study.spec.compute.provider) == DEFAULT_PROVIDER}
    plans = [study.plan for study in fits if study.name in here and study.plan]
    if not plans:
        return ()
    refusals = []
    free_disk = min(int(plan.offers[0]["disk_free_bytes"]) for plan in plans)
    disk = sum(plan.capture_bytes_left for plan in plans)
    if disk > free_disk:
        needed, there = amounts(disk, free_disk, unit="GB")
        refusals.append(
            f"the captures need {needed} of disk here in all, {there} is free: fewer sequences, or another --workspace"
        )
    free = min(int(plan.offers[0]["ram_available_bytes"]) for plan in plans)
    largest = sorted((_ram(plan) for plan in plans), reverse=True)[: sweep.parallel]
    if sum(largest) > free:
        needed, there = amounts(sum(largest), free, unit="GB")
        refusals.append(
            f"{len(largest)} studies at once may need {needed} of memory here, {there} is free: a smaller --parallel"
        )
    return tuple(refusals)


def _ram(plan: Plan) -> int:
    one = plan.host_ram_bytes if plan.offers[0]["shares"] else plan.ram_bytes
    return max(one, int(plan.offers[0]["needed_ram_bytes"]))
