"""A study as it may leave: numbers that were checked, the page and pictures that are rendered of them here, a manifest.

Whatever page or picture lies in a folder, a store or on a machine is never read: equal numbers and provenance give equal
bytes under the same versions of matplotlib and Pillow, so that what is published is what this side renders. The page has a
section about the newest probe that lies in the results folder when it is rendered, from that probe's own checked numbers; a
study's numbers, its ids and its results_digest don't depend on it.

With `shown` it is the page of the study's owner, which names his files and shows his text (`own`): it stays in his results
folder, whose manifest names it, and no function that publishes is given one.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliers.errors import BadInput, DamagedResults, ForbiddenFile, PublishRefused
from outliers.files.atomic import write_atomic
from outliers.publish.allowlist import (
    LOG,
    MANIFEST,
    MAX_FILE_BYTES,
    MAX_STUDY_BYTES,
    NUMBERS,
    OPTIONAL,
    REPORT,
    Numbers,
    check_listing,
    read_log,
    read_numbers,
    read_regular,
)
from outliers.publish.manifest import build_manifest, dump_manifest, read_manifest
from outliers.publish.probes import Probed, count_probes, newest_probe

if TYPE_CHECKING:
    from outliers.report.figures import Plot
    from outliers.report.shown import Shown

_log = logging.getLogger(__name__)

KEPT_PLOTS = 2
"""Studies whose pictures this process keeps: a study is rendered where its numbers arrive, and again where it is published."""
_BAD_NUMBERS = (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, MemoryError, BadInput)
"""What matplotlib and our own arithmetic raise at numbers that no model gives."""


@dataclass(frozen=True)
class Publishable:
    """A manifest, and the bytes of each file that it names, by path."""

    manifest: dict[str, Any]
    files: Mapping[str, bytes] = field(repr=False)


def make_publishable(
    numbers: Numbers,
    *,
    spec: Mapping[str, Any],
    provenance: Mapping[str, Any],
    log: bytes | None = None,
    beside: Path | None = None,
    shown: Shown | None = None,
) -> Publishable:
    """A study from its checked numbers; `spec` and `provenance` stand in the manifest, `provenance` on the page too.

    beside: the results folder, whose newest probe has a section on the page; a probe that is damaged has none. shown: makes it
    the page of the study's owner, which is not to be published.

    Raises ForbiddenFile where it is too large or its numbers can't be drawn, PublishRefused where `spec` or `provenance` are
    more than metadata.
    """
    files = dict(numbers.files) | render_files(numbers, provenance, beside, shown, spec)
    if log is not None:
        files[LOG] = log
    for path, data in files.items():
        if len(data) > MAX_FILE_BYTES:
            raise ForbiddenFile(f"{path} has {len(data):,} bytes, at most {MAX_FILE_BYTES:,} are published")
    if (total := sum(len(data) for data in files.values())) > MAX_STUDY_BYTES:
        largest = max(files, key=lambda path: len(files[path]))
        raise ForbiddenFile(
            f"the study has {total:,} bytes, a study publishes at most {MAX_STUDY_BYTES:,}; the largest file is {largest} "
            f"with {len(files[largest]):,}"
        )
    return Publishable(build_manifest(files, spec=dict(spec), provenance=dict(provenance)), files)


def render_files(
    numbers: Numbers,
    provenance: Mapping[str, Any],
    beside: Path | None = None,
    shown: Shown | None = None,
    spec: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """`report.html` and `plots/*.png` by path. ForbiddenFile where no page can be made of the numbers."""
    from outliers.advice.advise import verdict_words
    from outliers.report.probe_page import probe_section
    from outliers.report.report import make_page
    from outliers.report.shown import shown_probes
    from outliers.results.schema import StudySummary

    probe = None if beside is None else _probe_of(numbers, beside)
    try:
        plots = _plots(shown, *(numbers.files.get(name) for name in (*NUMBERS, *OPTIONAL)))
        section = None
        if probe is not None:
            summary = StudySummary.model_validate(numbers.summary, extra="ignore")
            probes = shown_probes(probe.probes, shown, (summary.model.called, summary.corpus.called))
            words = verdict_words(probes, probe.advice, (probes.model, probes.corpus))
            advice = probe.advice.model_copy(update={"paragraph": words})
            section = probe_section(probes, advice, count_probes(probe.folder) - 1)
        page = make_page(numbers.files, plots, provenance, section, shown, spec)
    except _BAD_NUMBERS as error:
        raise ForbiddenFile(
            f"no report can be made of these numbers ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    return {f"plots/{plot.name}": plot.png for plot in plots} | {REPORT: page}


def _probe_of(numbers: Numbers, folder: Path) -> Probed | None:
    """The newest probe in a results folder, where it is of the study with these numbers."""
    try:
        found = newest_probe(folder)
    except DamagedResults as error:
        _log.warning("the report says nothing of a probe: %s", error)
        return None
    return found if found is not None and found.probes.study_id == numbers.summary["study_id"] else None


@functools.lru_cache(maxsize=KEPT_PLOTS)
def _plots(shown: Shown | None, *files: bytes | None) -> tuple[Plot, ...]:
    from outliers.report.report import make_plots

    named = zip((*NUMBERS, *OPTIONAL), files, strict=True)
    return make_plots({name: data for name, data in named if data is not None}, shown)


def read_publishable(folder: Path, show: Callable[[Numbers], Shown | None] | None = None) -> Publishable:
    """The study in a results folder: its numbers, which must be those of its manifest, and the rest rendered anew.

    show: gives what its owner sees of it, for a page that stays here. Raises ForbiddenFile or PublishRefused where there is no
    manifest, the numbers are not what it says or may not leave, or something lies there that no study has.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise PublishRefused(f"{folder} has no {MANIFEST}: not a finished study; analyze the capture again")
    check_listing(folder)
    numbers = read_numbers(folder)
    named = {file["path"]: (file["size"], file["sha256"]) for file in manifest["files"]}
    if missing := [name for name in OPTIONAL if name in named and name not in numbers.files]:
        raise PublishRefused(f"{folder} has no {missing[0]}, which its manifest names; write the study's results again")
    for path, data in numbers.files.items():
        found = (len(data), hashlib.sha256(data).hexdigest())
        if named.get(path) != found:
            raise ForbiddenFile(
                f"{path} in {folder} is not what the manifest says: {found} (bytes, sha256) instead of "
                f"{named.get(path, 'absent')}; write the study's results and manifest again"
            )
    log = read_log(folder) if LOG in named else None
    told = {"spec": manifest["spec"], "provenance": manifest["provenance"]}
    made = make_publishable(numbers, **told, log=log, beside=folder, shown=show(numbers) if show else None)
    for name in ("study_id", "capture_id", "results_digest", "headline"):
        if made.manifest[name] != manifest[name]:
            raise PublishRefused(
                f"{folder / MANIFEST} does not belong to its files: it says {name} {manifest[name]}, they give "
                f"{made.manifest[name]}; write the manifest again"
            )
    return made


def write_publishable(folder: Path, study: Publishable) -> None:
    """Write a study into a results folder, its manifest last; plots that it doesn't have go, what else lies there stays.

    run.log grows with every step and is left as it is. Raises OSError.
    """
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in (folder / "plots").glob("*.png"):
        if f"plots/{path.name}" not in study.files:
            path.unlink()
    for name in sorted(study.files.keys() - {LOG}):
        if not _holds(folder, name, study.files[name]):
            write_atomic(folder / name, study.files[name])
    write_atomic(folder / MANIFEST, dump_manifest(study.manifest))


def is_written(folder: Path, study: Publishable) -> bool:
    """Whether a folder holds a study, byte for byte, and no other plot."""
    wanted = {name: data for name, data in study.files.items() if name != LOG}
    wanted[MANIFEST] = dump_manifest(study.manifest)
    found = {f"plots/{path.name}" for path in (folder / "plots").glob("*.png")}
    return found <= wanted.keys() and all(_holds(folder, name, data) for name, data in wanted.items())


def _holds(folder: Path, name: str, data: bytes) -> bool:
    try:
        return read_regular(folder, name) == data
    except PublishRefused:
        return False
