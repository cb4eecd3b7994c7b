"""A finished summary -> numbers, where it was counted; numbers -> the results folder, on the control side.

    <capture>/summaries/<study_id>/numbers/    what a machine gives: summary.json, tokens.json, features.parquet,
                                               provenance.json; with --formats quantization.parquet
    <capture>/summaries/<study_id>.json        results_digest of the study as it was first reported

A machine writes numbers and renders nothing. The page, the pictures and the manifest are made of checked numbers on the side
that places the results folder; `python -m outliers report` does both. A study that was reported before (its results
were damaged since, or its capture was repaired) must come to the digest that it had: other numbers are refused and
overwrite nothing.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from outliers.errors import DamagedResults, DigestConflict, DiskFull, JobFailed, PublishRefused
from outliers.events.stream import Reporter
from outliers.files.atomic import NO_ROOM, write_atomic
from outliers.files.sealed import check_folder, drop_folder, read_sealed, seal_folder, write_sealed
from outliers.locks import locked
from outliers.publish.allowlist import PICTURES, Numbers, numbers_in, read_numbers, read_regular
from outliers.publish.finished import read_finished
from outliers.publish.manifest import digest_of
from outliers.publish.own import show_own
from outliers.publish.publishable import Publishable, make_publishable, read_publishable, write_publishable
from outliers.store.repair import forget_repair
from outliers.study.parts import LOCKS
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

LIBRARIES = ("torch", "transformers", "numpy", "zarr", "pyarrow", "outlier-features")
DRAFT, MADE = "draft", "numbers"
"""Folders of the private summary: in which numbers are written first, and where they lie once they are whole."""
PROVENANCE = "provenance.json"
POLL_SECONDS = 0.1


def write_study(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    """Write the results folder of a study from its private summary; its digest and the number of its files.

    Raises DigestConflict where the study had other numbers, CorruptCapture where the summary is not what was written,
    CaptureError where it is not of the whole corpus. Another process that writes this study's results here is waited for.
    """
    with alone(prepared, workspace):
        reporter.progress("report", 0, 3, "parts")
        _write_numbers(prepared, workspace, reporter)
        reporter.progress("report", 1, 3, "parts")
        made = numbers_folder(prepared, workspace)
        known, numbers = json.loads((made / PROVENANCE).read_bytes()), read_numbers(made)
        found = render_here(prepared, workspace, numbers, known)
        reporter.progress("report", 2, 3, "parts")
        write_publishable(workspace.study(prepared.study_id), found)
        shutil.rmtree(made)
        reporter.progress("report", 3, 3, "parts")
        return _outline(found)


def write_numbers(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    """Write the numbers of a study from its private summary, to be placed elsewhere; their digest. Raises as `write_study`."""
    with alone(prepared, workspace):
        reporter.progress("report", 0, 1, "parts")
        digest = _write_numbers(prepared, workspace, reporter)
        reporter.progress("report", 1, 1, "parts")
        return {"results_digest": digest}


def place_study(
    prepared: Prepared, workspace: Workspace, numbers: Numbers, known: Mapping[str, Any], reporter: Reporter
) -> dict[str, Any]:
    """Render checked numbers and put them into the results folder; its digest and the number of its files.

    `known`: the provenance of the numbers. Raises DigestConflict where the study had other numbers, ForbiddenFile where no
    page can be made of these, DiskFull, JobFailed where the folder can't be written.
    """
    with alone(prepared, workspace), _explained(workspace):
        _compare(prepared, workspace, digest_of(numbers.files), reporter)
        found = render_here(prepared, workspace, numbers, known)
        write_publishable(workspace.study(prepared.study_id), found)
        return _outline(found)


def render_here(
    prepared: Prepared, workspace: Workspace, numbers: Numbers, known: Mapping[str, Any], log: bytes | None = None
) -> Publishable:
    """A study as its owner sees it on this machine, for its results folder alone (`own`). Raises as `make_publishable`."""
    return make_publishable(
        numbers,
        spec=prepared.public_spec(),
        provenance=known,
        log=log,
        beside=workspace.study(prepared.study_id),
        shown=show_own(prepared, workspace, numbers),
    )


def render_again(prepared: Prepared, workspace: Workspace) -> bool:
    """Mend a results folder whose numbers are those of its manifest: page and pictures are rendered. Whether they were."""
    folder = workspace.study(prepared.study_id)
    with alone(prepared, workspace):
        try:
            write_publishable(folder, read_publishable(folder, lambda numbers: show_own(prepared, workspace, numbers)))
            return True
        except (PublishRefused, OSError):
            return False


def numbers_folder(prepared: Prepared, workspace: Workspace) -> Path:
    """Where the numbers of a study are written on the machine that counted."""
    return workspace.summary(prepared.capture_id, prepared.study_id) / MADE


def has_numbers(prepared: Prepared, workspace: Workspace) -> bool:
    """Whether there are numbers, every file of them as it was written, with the digest that the study was reported with."""
    folder = numbers_folder(prepared, workspace)
    if not check_folder(folder):
        return False
    try:
        # numbers that an earlier version left here have no pictures: they are written again
        read_regular(folder, PICTURES)
        digest = digest_of({name: read_regular(folder, name) for name in numbers_in(folder)})
    except PublishRefused:
        return False
    return known_digest(prepared, workspace) == digest


def drop_numbers(prepared: Prepared, workspace: Workspace) -> None:
    """Forget the numbers here, once they are in the results folder of the same workspace."""
    drop_folder(numbers_folder(prepared, workspace))


def known_digest(prepared: Prepared, workspace: Workspace) -> str | None:
    """The results_digest with which the study was reported from this capture; None where it was not, or that is unknown."""
    found = read_sealed(_record(prepared, workspace))
    return None if found is None else str(found.get("results_digest"))


def _record(prepared: Prepared, workspace: Workspace) -> Path:
    summary = workspace.summary(prepared.capture_id, prepared.study_id)
    return summary.with_name(f"{summary.name}.json")


def alone(prepared: Prepared, workspace: Workspace) -> contextlib.AbstractContextManager[None]:
    """In the block no other process reads or writes the study's results folder. It can't be nested."""
    return locked(workspace.root / LOCKS / f"{prepared.study_id}-report", lambda: time.sleep(POLL_SECONDS))


@contextlib.contextmanager
def _explained(workspace: Workspace) -> Iterator[None]:
    """What the operating system refuses, as our error."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(
                f"report: the disk of {workspace.root} takes no more ({error}): free some, and run the same again"
            ) from error
        raise JobFailed(
            f"report: {error}. The operating system refused this; remove the cause, and run the same again: what is done is not "
            "done again"
        ) from error


def _outline(found: Publishable) -> dict[str, Any]:
    return {"results_digest": found.manifest["results_digest"], "files": len(found.manifest["files"])}


def _write_numbers(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> str:
    """The numbers from the summary, compared with earlier ones; their digest."""
    from outliers.results.write import write_results

    made = numbers_folder(prepared, workspace)
    draft = made.with_name(DRAFT)
    shutil.rmtree(draft, ignore_errors=True)
    write_results(prepared, workspace, draft)
    write_atomic(draft / PROVENANCE, json.dumps(provenance(prepared, workspace), sort_keys=True).encode())
    digest = digest_of({name: read_regular(draft, name) for name in numbers_in(draft)})
    _compare(prepared, workspace, digest, reporter)
    seal_folder(draft)
    drop_folder(made)
    draft.rename(made)
    write_sealed(_record(prepared, workspace), {"results_digest": digest})
    forget_repair(workspace, prepared.capture_id)
    return digest


def _compare(prepared: Prepared, workspace: Workspace, digest: str, reporter: Reporter) -> None:
    """Raise DigestConflict where the study was reported before, with other numbers; whole results count as a report."""
    folder = workspace.study(prepared.study_id)
    before = known_digest(prepared, workspace) or _digest_in(folder, prepared.study_id)
    if before is None:
        return
    if before != digest:
        raise DigestConflict(
            f"the study {prepared.study_id} had the results_digest {before}, computed again it has {digest}. Nothing was changed "
            f"in {folder}. To keep the first results, remove the capture that gives others: `outliers captures rm "
            f"{prepared.capture_id}`; to take the new ones, remove {folder} too"
        )
    reporter.log("info", f"the results are what they were: results_digest {digest[:12]}")


def _digest_in(folder: Path, study_id: str) -> str | None:
    try:
        found = read_finished(folder, study_id)
    except DamagedResults:
        return None
    return None if found is None else str(found.manifest["results_digest"])


def provenance(prepared: Prepared, workspace: Workspace) -> dict[str, Any]:
    """What made the results: versions, devices, timings. It stands in the manifest and the report, in no number."""
    capture = workspace.capture(prepared.capture_id)
    summary = workspace.summary(prepared.capture_id, prepared.study_id)
    return {
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES},
        "system": f"{platform.system()} {platform.machine()}",
        "model_revision": prepared.model.source.revision,
        "attention": prepared.model.attention_implementation,
        "experts": prepared.model.experts_implementation,
        "extraction": [_without(run, "process") for run in _lines(capture / "extractions.jsonl")],
        "analysis": read_sealed(summary / "analysis.json") or {},
    }


def _without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a record that a killed process may have left torn: what can't be read of it is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [line for line in found if isinstance(line, dict)]
