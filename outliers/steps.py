"""The steps of a study as they run on the machine with the data: extract, analyze, report, verify.

Each takes a Prepared and a workspace, tells a Reporter, and returns a small dict; each can be run again at any time
and does only what is missing. `python -m outliers` and the jobs call these; none of them knows who asked.
"""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from outliers.errors import CaptureError, CorruptCapture
from outliers.events import Reporter
from outliers.files import write_atomic
from outliers.prepare import Prepared
from outliers.workspace import Workspace

LIBRARIES = ("torch", "transformers", "numpy", "zarr", "pyarrow", "outlier-features")


def run_extract(
    prepared: Prepared, workspace: Workspace, reporter: Reporter, *, sequences: range | None = None
) -> dict[str, Any]:
    """Make or finish the capture, or some sequences of it."""
    from outliers.capture import extract

    return extract(prepared, workspace, reporter, sequences=sequences)


def run_analyze(
    prepared: Prepared,
    workspace: Workspace,
    reporter: Reporter,
    *,
    sequences: range | None = None,
    executor: str | None = None,
) -> dict[str, Any]:
    """Summarize the capture, or some sequences of it; the private summary stays beside it."""
    from outliers.analyze import analyze
    from outliers.executors import open_executor

    began = time.monotonic()
    chosen = executor or prepared.spec.compute.executor
    with open_executor(chosen) as (who, workers):
        folder = analyze(prepared, workspace, reporter, sequences=sequences, executor=who, workers=workers)
    result = {
        "seconds": round(time.monotonic() - began, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "executor": chosen.partition("=")[0],
    }
    write_atomic(folder / "analysis.json", json.dumps(result).encode())
    return result


def peak_rss_bytes() -> int:
    """The most memory this process ever held: since it began, which ru_maxrss is not where a larger process started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def run_report(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    """Write the results folder: numbers, plots, report, and last the manifest."""
    from outliers.manifest import build_manifest, write_manifest
    from outliers.report import write_report
    from outliers.results import write_results

    reporter.progress("report", 0, 3, "parts")
    folder = write_results(prepared, workspace)
    reporter.progress("report", 1, 3, "parts")
    known = provenance(prepared, workspace)
    write_report(folder, known)
    reporter.progress("report", 2, 3, "parts")
    manifest = build_manifest(folder, spec=prepared.public_spec(), provenance=known)
    write_manifest(folder, manifest)
    reporter.progress("report", 3, 3, "parts")
    return {"results_digest": manifest["results_digest"], "files": len(manifest["files"])}


def run_verify(prepared: Prepared, workspace: Workspace, reporter: Reporter, *, repair: bool = False) -> dict[str, Any]:
    """Check the capture, every checksum of it; with `repair` what is damaged is marked, for `extract` to compute again.

    Raises CorruptCapture, which names the damage and the way out.
    """
    from outliers.verify import verify

    found = verify(workspace.capture(prepared.capture_id), reporter, repair=repair)
    if not found.sound:
        raise CorruptCapture(found.message())
    return found.model_dump(include={"chunks", "bytes", "done", "of_sequences"})


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
        "analysis": json.loads((summary / "analysis.json").read_text()) if (summary / "analysis.json").exists() else {},
    }


def _without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a record that a killed process may have left torn: what can't be read of it is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def run_state(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    """What of the study is here and finished."""
    from outliers.manifest import read_manifest

    return {
        "capture": capture_exists(prepared, workspace),
        "summary": (workspace.summary(prepared.capture_id, prepared.study_id) / "totals.npz").exists(),
        "results": read_manifest(workspace.study(prepared.study_id)) is not None,
    }


def capture_exists(prepared: Prepared, workspace: Workspace) -> bool:
    """Whether the study's capture is complete; a damaged one is not."""
    from outliers.store import is_complete

    try:
        return is_complete(workspace.capture(prepared.capture_id))
    except CaptureError:
        return False


STEPS: dict[str, Callable[[Prepared, Workspace, Reporter], dict[str, Any]]] = {
    "extract": run_extract,
    "analyze": run_analyze,
    "report": run_report,
    "verify": run_verify,
    "state": run_state,
}
