"""The steps of a study as they run on the machine with the data: extract, analyze, formats, report, probe, verify.

Each takes a Prepared, a workspace and a Reporter, and returns a small dict. Each can be run again at any time and does only
what is missing. `python -m outliers` and the jobs call these.
"""

from __future__ import annotations

import logging
import platform
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from outliers.errors import BadInput, CaptureError, CorruptCapture, DamagedResults
from outliers.events.stream import Reporter
from outliers.files.sealed import write_sealed
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

log = logging.getLogger(__name__)


def run_extract(
    prepared: Prepared,
    workspace: Workspace,
    reporter: Reporter,
    *,
    sequences: range | None = None,
    pause: Callable[[str], None] = lambda point: None,
) -> dict[str, Any]:
    """Make or finish the capture, or some sequences of it; with --store rolling they are counted too, window by window.

    pause: see `counting.rolling.Pause`.
    """
    from outliers.capture.extract import extract

    if prepared.spec.capture.store == "full":
        return extract(prepared, workspace, reporter, sequences=sequences)
    from outliers.counting.pass_counts import PassCounts
    from outliers.counting.rolling import open_windows

    kind = PassCounts if prepared.spec.capture.store == "none" else None
    workers = int(prepared.spec.compute.executor.partition("=")[2] or 0) or None
    windows = partial(open_windows, prepared, workspace, reporter, workers=workers, pause=pause, kind=kind)
    return extract(prepared, workspace, reporter, sequences=sequences, open_windows=windows)


def run_analyze(
    prepared: Prepared,
    workspace: Workspace,
    reporter: Reporter,
    *,
    sequences: range | None = None,
    executor: str | None = None,
) -> dict[str, Any]:
    """Summarize the capture, or some sequences of it, and measure the errors of the study's number formats.

    The private summary stays next to the capture. Formats of some sequences alone are left to `run_formats`: they need the
    ranges of the whole corpus.
    """
    from outliers.counting.analyze import analyze
    from outliers.counting.executors import open_executor

    formats = prepared.spec.formats.formats
    if is_rolled(prepared, workspace, sequences):
        return _place_counts(prepared, workspace, reporter, sequences)
    began = time.monotonic()
    chosen = executor or prepared.spec.compute.executor
    folder = workspace.summary(prepared.capture_id, prepared.study_id)
    with open_executor(chosen) as (who, workers):
        if not (formats and _is_counted(prepared, workspace, sequences)):
            folder = analyze(prepared, workspace, reporter, sequences=sequences, executor=who, workers=workers)
    if formats and sequences is None:
        from outliers.quantization.measure import measure_formats

        measure_formats(prepared, workspace, reporter, workers=workers if who is None else None)
    result = {
        "seconds": round(time.monotonic() - began, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "executor": chosen.partition("=")[0],
    }
    write_sealed(folder / "analysis.json", result)
    return result


def is_rolled(prepared: Prepared, workspace: Workspace, sequences: range | None = None) -> bool:
    """Whether the study has counted its capture, or some sequences of it, window by window, and freed it."""
    from outliers.counting.rolling import is_counted
    from outliers.store.chunks import Journal

    if prepared.spec.capture.store == "full":
        return False
    folder = workspace.capture(prepared.capture_id)
    journal = Journal.open(folder / "journal.jsonl", keep=lambda line: {})
    wanted = range(prepared.corpus.num_sequences) if sequences is None else sequences
    return is_counted(prepared, journal, wanted, folder)


def _is_rolling(prepared: Prepared, workspace: Workspace) -> bool:
    """Whether the study has begun to count its capture window by window: what is captured is not all that is to be done."""
    from outliers.counting.rolling import line_of
    from outliers.store.chunks import Journal

    if prepared.spec.capture.store == "full":
        return False
    journal = Journal.open(workspace.capture(prepared.capture_id) / "journal.jsonl", keep=lambda line: {})
    return line_of(prepared, journal, range(prepared.corpus.num_sequences)) is not None


def _place_counts(
    prepared: Prepared, workspace: Workspace, reporter: Reporter, sequences: range | None
) -> dict[str, Any]:
    """The private summary of counts that were made window by window."""
    from outliers.counting.analyze import layout_of_capture
    from outliers.counting.rolling import place_summary

    began = time.monotonic()
    layout = layout_of_capture(workspace.capture(prepared.capture_id))
    wanted = range(layout.num_sequences) if sequences is None else sequences
    target = place_summary(prepared, workspace, layout, wanted)
    steps = len(wanted) * len(layout.layers)
    reporter.progress("analyze", steps, steps, "layers")
    result = {
        "seconds": round(time.monotonic() - began, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "executor": prepared.spec.compute.executor.partition("=")[0],
    }
    write_sealed(target / "analysis.json", result)
    return result


def _is_counted(prepared: Prepared, workspace: Workspace, sequences: range | None) -> bool:
    """Whether a run was ended between counting and the errors of formats: the counts are whole, the errors are missing.

    Of some `sequences`: whether they are counted, and nothing else; their ranges and errors may be there.
    """
    from outliers.counting.summary_files import has_summary, read_summary
    from outliers.results.format_errors import has_errors
    from outliers.store.repair import is_repaired

    folder = workspace.summary(prepared.capture_id, prepared.study_id)
    if not has_summary(folder) or is_repaired(workspace, prepared.capture_id):
        return False
    if sequences is None and has_errors(folder):
        return False
    wanted = range(prepared.corpus.num_sequences) if sequences is None else sequences
    return tuple(read_summary(folder).sequences.tolist()) == tuple(wanted)


def run_formats(
    prepared: Prepared, workspace: Workspace, reporter: Reporter, *, sequences: range, summary: Path
) -> dict[str, Any]:
    """Measure what number formats do to some sequences, which are counted here: first ranges, then errors.

    `summary`: the folder with the summary of the whole corpus, and in it the ranges of all parts once they are joined. Returns
    what was measured; raises as `quantization.measure.measure_part`.
    """
    from outliers.counting.executors import threads_of
    from outliers.quantization.measure import measure_part

    if not prepared.spec.formats.formats:
        raise BadInput("the study names no formats: add --formats, such as --formats int8_token,nvfp4")
    began = time.monotonic()
    workers = threads_of(prepared.spec.compute.executor)
    made = measure_part(prepared, workspace, reporter, sequences, summary, workers=workers)
    return {"measured": made, "seconds": round(time.monotonic() - began, 3), "peak_rss_bytes": peak_rss_bytes()}


def peak_rss_bytes() -> int:
    """The most memory this process ever held: since it began, which ru_maxrss is not where a larger process started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def run_report(
    prepared: Prepared, workspace: Workspace, reporter: Reporter, *, numbers: bool = False
) -> dict[str, Any]:
    """Write the results folder: numbers, plots, report, and last the manifest. Raises as `reporting.write_study`.

    With `numbers` those alone, in the folder of the summary: the control side fetches and renders them.
    """
    from outliers.publish.reporting import write_numbers, write_study

    return (write_numbers if numbers else write_study)(prepared, workspace, reporter)


def run_probe(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    """Make or finish the probe of a study; its numbers lie next to the capture."""
    from outliers.probe.run import probe

    return probe(prepared, workspace, reporter)


def run_verify(prepared: Prepared, workspace: Workspace, reporter: Reporter, *, repair: bool = False) -> dict[str, Any]:
    """Check the capture, every checksum of it; with `repair` what is damaged is marked, for `extract` to compute again.

    Raises CorruptCapture, which names the damage and the way out.
    """
    from outliers.store.verify import verify

    found = verify(workspace.capture(prepared.capture_id), reporter, repair=repair)
    if not found.sound:
        raise CorruptCapture(found.message())
    return found.model_dump(include={"chunks", "bytes", "done", "of_sequences"})


def run_state(prepared: Prepared, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    """What of the study is here and finished: checked, not believed. A repaired capture's results are to be made again."""
    from outliers.counting.summary_files import has_summary
    from outliers.results.format_errors import has_errors
    from outliers.store.repair import is_repaired

    private = workspace.summary(prepared.capture_id, prepared.study_id)
    return {
        "capture": capture_exists(prepared, workspace),
        "summary": has_summary(private) and (not prepared.spec.formats.formats or has_errors(private)),
        "results": not is_repaired(workspace, prepared.capture_id) and _results_exist(prepared, workspace),
    }


def _results_exist(prepared: Prepared, workspace: Workspace) -> bool:
    from outliers.publish.finished import read_finished
    from outliers.publish.reporting import has_numbers

    if has_numbers(prepared, workspace):
        return True
    try:
        return read_finished(workspace.study(prepared.study_id), prepared.study_id) is not None
    except DamagedResults as error:
        log.warning("%s", error)
        return False


def capture_exists(prepared: Prepared, workspace: Workspace) -> bool:
    """Whether the study's capture is complete, or counted and freed; a damaged one is not. Complete: with the losses, where the
    study asks for perplexity, and with the sums of experts.
    """
    from outliers.experts.sums_files import has_sums
    from outliers.store.chunks import has_losses, is_complete
    from outliers.store.fingerprint import layout_from, read_fingerprint

    folder = workspace.capture(prepared.capture_id)
    try:
        whole = is_complete(folder) and not _is_rolling(prepared, workspace)
        if not (whole or is_rolled(prepared, workspace)) or (fingerprint := read_fingerprint(folder)) is None:
            return False
        if whole and prepared.spec.capture.perplexity and not has_losses(folder):
            return False
        layout = layout_from(fingerprint)
        shapes = layout.experts
        return shapes is None or not shapes.values or has_sums(folder, shapes, range(layout.num_sequences))
    except CaptureError:
        return False


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "extract": run_extract,
    "analyze": run_analyze,
    "formats": run_formats,
    "report": run_report,
    "probe": run_probe,
    "verify": run_verify,
    "state": run_state,
}
