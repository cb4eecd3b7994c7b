"""A finished summary -> the results folder: numbers, plots, report, and last the manifest; written aside, compared, then placed.

    <capture>/summaries/<study_id>.json    results_digest of the study as it was first reported

A study that was reported before (its results were damaged since, or its capture was repaired) must come to the digest that it
had: other numbers are refused and overwrite nothing. Before it: `analyze`, `merge`. After it: `outcome`, `publish`.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from outliers.allowlist import MANIFEST
from outliers.errors import DamagedResults, DigestConflict
from outliers.events import Reporter
from outliers.files import write_atomic
from outliers.finished import read_finished
from outliers.parts import LOCKS, locked
from outliers.prepare import Prepared
from outliers.repair import forget_repair
from outliers.sealed import read_sealed, write_sealed
from outliers.workspace import Workspace

LIBRARIES = ("torch", "transformers", "numpy", "zarr", "pyarrow", "outlier-features")
DRAFT = "draft"
"""Folder of the private summary in which results are written first."""
POLL_SECONDS = 0.1


def write_study(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    """Write the results folder of a study from its private summary; its digest and the number of its files.

    Raises DigestConflict where the study had other numbers, CorruptCapture where the summary is not what was written,
    CaptureError where it is not of the whole corpus. Whoever else writes this study's results here is waited for.
    """
    with locked(workspace.root / LOCKS / f"{prepared.study_id}-report", lambda: time.sleep(POLL_SECONDS)):
        return _write(prepared, workspace, reporter)


def known_digest(prepared: Prepared, workspace: Workspace) -> str | None:
    """The results_digest with which the study was reported from this capture; None where it was not, or nobody knows."""
    found = read_sealed(_record(prepared, workspace))
    return None if found is None else str(found.get("results_digest"))


def _record(prepared: Prepared, workspace: Workspace) -> Path:
    summary = workspace.summary(prepared.capture_id, prepared.study_id)
    return summary.with_name(f"{summary.name}.json")


def _write(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    from outliers.manifest import build_manifest, write_manifest
    from outliers.report import write_report
    from outliers.results import write_results

    reporter.progress("report", 0, 3, "parts")
    draft = workspace.summary(prepared.capture_id, prepared.study_id) / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    write_results(prepared, workspace, draft)
    reporter.progress("report", 1, 3, "parts")
    known = provenance(prepared, workspace)
    write_report(draft, known)
    reporter.progress("report", 2, 3, "parts")
    manifest = build_manifest(draft, spec=prepared.public_spec(), provenance=known)
    write_manifest(draft, manifest)
    _compare(prepared, workspace, manifest["results_digest"], reporter)
    _place(draft, workspace.study(prepared.study_id), manifest)
    write_sealed(_record(prepared, workspace), {"results_digest": manifest["results_digest"]})
    forget_repair(workspace, prepared.capture_id)
    shutil.rmtree(draft)
    reporter.progress("report", 3, 3, "parts")
    return {"results_digest": manifest["results_digest"], "files": len(manifest["files"])}


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


def _place(draft: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Copy a draft into the results folder, its manifest last; plots that it doesn't have go, what else lies there stays."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    named = {file["path"] for file in manifest["files"]}
    for path in (folder / "plots").glob("*.png"):
        if f"plots/{path.name}" not in named:
            path.unlink()
    for name in (*sorted(named), MANIFEST):
        write_atomic(folder / name, (draft / name).read_bytes())


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
