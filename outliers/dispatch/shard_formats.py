"""The errors of number formats of one shard, measured while its machine still holds its capture.

A scale of a static format, and which features are held out, depend on the whole corpus. So a shard that has counted waits for
the summaries of all, gets their sum, gives the ranges that no summary has, waits for those of all, and gives the errors of
its sequences. What is next is read from the files of the shards, each time: a run that was killed goes on from there.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliers.counting.shards import draft_of, folder_of, is_counted_here, place_beside, study_lock
from outliers.counting.summary_files import FORMATS, write_summary
from outliers.dispatch.study_run import StudyRun
from outliers.errors import JobFailed, SummaryMismatch
from outliers.events.stream import Reporter
from outliers.files.sealed import LISTING, drop_folder
from outliers.locks import locked
from outliers.machines.base import Machine
from outliers.quantization.joining import are_measured, join_ranges, joined_summary, plan_of, write_joined
from outliers.quantization.ranges import FOLDER, RANGES, FormatPlan, Ranges, read_ranges, write_ranges
from outliers.results.format_errors import ERRORS
from outliers.study.demand import demand_of
from outliers.study.parts import Shard, split

LOOK_SECONDS = 0.5
"""Between two looks at the files of the other shards."""

Step = Callable[[str, str, tuple[str, ...]], dict[str, Any]]
"""Runs (verb, what it makes, more options) on the shard's machine; the step's result."""


@dataclass(frozen=True)
class ShardAtWork:
    """A shard whose machine has counted. waiting: what is called while another run holds the study's lock.

    paused: entered while the shard waits for others; it gives the shard's slot back, which others may need.
    """

    run: StudyRun
    part: Shard
    machine: Machine
    reporter: Reporter
    step: Step
    waiting: Callable[[], None]
    paused: Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class _Round:
    """What a shard measures next. ranges: of the whole corpus; None where they are what is measured."""

    plan: FormatPlan
    ranges: Ranges | None

    @property
    def name(self) -> str:
        return "ranges" if self.ranges is None else "errors"

    @property
    def digest(self) -> str:
        return self.plan.digest if self.ranges is None else self.ranges.digest


def measure_shard(work: ShardAtWork) -> float:
    """Measure the formats of a shard, in rounds with the other shards of the study; the seconds that its machine took.

    Raises what the step raises; StudyCancelled and BudgetSpent as `StudyRun.check`; JobFailed where another shard failed.
    """
    seconds, told = 0.0, False
    while True:
        marks = _marks(work.run)
        with locked(study_lock(work.run.prepared, work.run.workspace), work.waiting):
            is_done, next_round = _next(work.run, work.part)
        if is_done:
            return seconds
        if next_round is not None:
            seconds += _measure(work, next_round)
        else:
            if not told:
                told = True
                text = f"part {work.part.title} waits for the other parts: scales of formats need the ranges of all"
                work.reporter.log("info", text)
            _wait(work, marks)


def _next(run: StudyRun, part: Shard) -> tuple[bool, _Round | None]:
    """(whether the shard has all, what it measures next); neither: others are waited for. Call it under the study's lock."""
    prepared, workspace = run.prepared, run.workspace
    parts = split(prepared, prepared.spec.compute.shards)
    if not all(is_counted_here(one, prepared, workspace) for one in parts):
        return False, None
    folders = [folder_of(one, prepared, workspace) for one in parts]
    plan, own = plan_of(prepared, workspace, joined_summary(folders)), folder_of(part, prepared, workspace)
    ranges = join_ranges(plan, folders)
    if ranges is not None:
        done = are_measured(own, ranges)
        return done, None if done else _Round(plan, ranges)
    return False, None if read_ranges(own, plan) is not None else _Round(plan, None)


def _measure(work: ShardAtWork, next_round: _Round) -> float:
    """One round on the shard's machine, and what it gives brought next to the shard's summary here; the seconds it took."""
    run, part, prepared = work.run, work.part, work.run.prepared
    place = f"captures/{prepared.capture_id}/whole/{prepared.study_id}"
    with tempfile.TemporaryDirectory() as made:
        write_summary(Path(made), next_round.plan.summary)
        if next_round.ranges is not None and next_round.plan.scanned:
            write_ranges(Path(made), next_round.ranges)
        work.machine.upload(Path(made), place)
    options = ("--summary", f"{work.machine.workspace}/{place}")
    told = work.step("formats", f"{prepared.study_id}-{next_round.digest[:12]}", options)
    draft, name = draft_of(part, prepared, run.workspace), FOLDER if next_round.ranges is None else FORMATS
    shutil.rmtree(draft, ignore_errors=True)
    summary = f"captures/{prepared.capture_id}/summaries/{prepared.study_id}"
    files = (RANGES if next_round.ranges is None else ERRORS, LISTING)
    most = demand_of(prepared.spec, prepared.model).summary_bytes + _errors_bytes(next_round.plan, part)
    work.machine.download(f"{summary}/{name}", draft / name, max_bytes=most, max_files=len(files), names=files)
    if not _is_asked(draft, part, next_round):
        raise JobFailed(
            f"{work.machine.name} gives other {next_round.name} of formats of part {part.title} than were asked for: run the "
            "same again"
        )
    with locked(study_lock(prepared, run.workspace), work.waiting):
        place_beside(part, prepared, run.workspace, draft / name, name)
    shutil.rmtree(draft, ignore_errors=True)
    seconds = told.get("seconds", 0.0)
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def _errors_bytes(plan: FormatPlan, part: Shard) -> int:
    """Bytes of the three sums of each row and sequence that a shard gives."""
    chosen = int(((plan.chosen >= part.first) & (plan.chosen < part.stop)).sum())
    return 3 * 8 * len(plan.rows()) * chosen


def _is_asked(folder: Path, part: Shard, asked: _Round) -> bool:
    if asked.ranges is not None:
        return are_measured(folder, asked.ranges)
    found = read_ranges(folder, asked.plan)
    return found is not None and found.sequences == tuple(range(part.first, part.stop))


def _wait(work: ShardAtWork, marks: tuple[bytes, ...]) -> None:
    """Wait until a file of another shard has changed. Raises as `StudyRun.check`; JobFailed where another shard failed."""
    run = work.run
    work.reporter.log(
        "info", f"part {work.part.title} waits for the other parts: scales of formats need the ranges of all"
    )
    with work.paused():
        while _marks(run) == marks:
            run.check()
            if run.failed_parts.is_set():
                run.gave_up.add(work.part.number)
                raise JobFailed(f"part {work.part.title} waited for another part, which failed")
            time.sleep(LOOK_SECONDS)


def _marks(run: StudyRun) -> tuple[bytes, ...]:
    """The checksums of what the shards have here: they change with every file."""
    prepared, workspace = run.prepared, run.workspace
    folders = [folder_of(part, prepared, workspace) for part in split(prepared, prepared.spec.compute.shards)]
    return tuple(_content(folder / name / LISTING) for folder in folders for name in (".", FOLDER, FORMATS))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def join_shard_formats(run: StudyRun, folders: list[Path], whole: Path) -> None:
    """Join what the shards measured into the folder of the merged summary. Call it under the study's lock.

    Raises SummaryMismatch where a shard was made again, with other numbers, after others had measured with the first: then
    each measures again.
    """
    missing = write_joined(plan_of(run.prepared, run.workspace, joined_summary(folders)), folders, whole)
    if missing is None:
        return
    for folder in folders:
        drop_folder(folder / FORMATS)
    raise SummaryMismatch(
        f"the {missing} of formats of some parts were measured with other counts than those that are here: a part was made "
        "again on other hardware. Run the same again: the parts measure again"
    )
