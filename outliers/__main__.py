"""The steps themselves, on the machine that has the data, without Prefect.

    python -m outliers extract SPEC.json --workspace DIR
    python -m outliers analyze SPEC.json --workspace DIR
    python -m outliers formats SPEC.json --workspace DIR --sequences FIRST:STOP --summary DIR
    python -m outliers report  SPEC.json --workspace DIR
    python -m outliers probe   SPEC.json --workspace DIR
    python -m outliers verify  SPEC.json --workspace DIR

SPEC.json is a StudySpec (`outliers study ... --print-spec`), or what the flow has made of one. A study is extract, analyze
and report in this order; each can be run again and does what is missing. `formats` is for a part of a study alone: analyze
measures the formats of a whole one. Exit codes: 0 done, 1 failed, 2 refused.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliers.capture.library_errors import memory_message
from outliers.errors import BadInput, DiskFull, JobFailed, MemoryFull, OutliersError
from outliers.events.stream import Reporter, reporter_from_environment, send_logs_to
from outliers.files.atomic import NO_ROOM, write_atomic
from outliers.jobs.jobs import JOB_VARIABLE, record_error

if TYPE_CHECKING:
    from outliers.study.prepare import Prepared


_HELP = {
    "extract": "read the activations of every layer in one pass into the workspace; goes on where it was stopped",
    "analyze": "count, from the finished capture; the model is not loaded",
    "formats": "of some sequences that are counted: ranges of number formats, and with the ranges of all parts their errors",
    "report": "write the results folder: JSON, Parquet, plots, report.html, manifest",
    "probe": "read the corpus again with changes in the model, and say what they do; goes on where it was stopped",
    "verify": "check every checksum of the capture",
    "state": "say what of the study is here and finished",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m outliers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in _HELP.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument("spec", type=Path, metavar="SPEC.json", help="the study")
        sub.add_argument("--workspace", metavar="DIR", help="default: $OUTLIERS_WORKSPACE, else ~/.outliers")
        if verb in ("extract", "analyze", "formats"):
            sub.add_argument(
                "--sequences",
                metavar="FIRST:STOP",
                required=verb == "formats",
                help="these sequences alone, such as 0:8" + ("" if verb == "formats" else " (default: all)"),
            )
        if verb == "formats":
            sub.add_argument(
                "--summary", type=Path, metavar="DIR", required=True, help="the merged summary of all sequences"
            )
        if verb == "analyze":
            sub.add_argument(
                "--executor",
                metavar="NAME",
                help="threads, threads=N, or dask=ADDRESS of a Dask cluster that mounts the workspace (default: the spec's)",
            )
        if verb == "report":
            sub.add_argument(
                "--numbers",
                action="store_true",
                help="write the numbers alone, into the folder of the summary: no page, no pictures",
            )
        if verb == "verify":
            sub.add_argument("--repair", action="store_true", help="mark what is damaged: extract computes it again")
    return parser


def deliver(result: dict[str, Any]) -> None:
    """Write a step's result into the folder of its job, or print it where no job runs."""
    text = json.dumps(result)
    if folder := os.environ.get(JOB_VARIABLE):
        write_atomic(Path(folder) / "result.json", text.encode())
    else:
        print(text)


def main(argv: list[str] | None = None) -> int:
    """Run one step; prints what it did as JSON on standard output."""
    arguments = _parser().parse_args(argv)
    reporter = reporter_from_environment()
    send_logs_to(reporter)
    # progress is ours to show: a library's bars would be torn lines in a job's log
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from outliers.steps import STEPS
    from outliers.study.prepare import read_prepared
    from outliers.workspace import open_workspace

    try:
        workspace = open_workspace(arguments.workspace)
    except OutliersError as error:
        return fail(error, reporter)
    try:
        prepared = read_prepared(arguments.spec, workspace)
        step = functools.partial(STEPS[arguments.verb], **_options(arguments, prepared))
        deliver(step(prepared, workspace, reporter))
    except OutliersError as error:
        return fail(error, reporter)
    except (MemoryError, RuntimeError) as error:
        said = memory_message(error)
        if said is None:
            raise
        return fail(MemoryFull(_no_memory(said, arguments.verb)), reporter)
    except OSError as error:
        if error.errno in NO_ROOM:
            return fail(DiskFull(_no_room(error, workspace.root)), reporter)
        reporter.log("debug", traceback.format_exc())
        return fail(JobFailed(_refused(error, arguments.verb)), reporter)
    return 0


def _options(arguments: argparse.Namespace, prepared: Prepared) -> dict[str, Any]:
    """What was asked of one step alone."""
    from outliers.counting.merge import parse_sequences

    options: dict[str, Any] = {}
    if getattr(arguments, "repair", False):
        options["repair"] = True
    if getattr(arguments, "numbers", False):
        options["numbers"] = True
    if getattr(arguments, "sequences", None) is not None:
        batch = prepared.spec.capture.batch_sequences
        options["sequences"] = parse_sequences(arguments.sequences, prepared.corpus.num_sequences, batch)
    if getattr(arguments, "summary", None) is not None:
        options["summary"] = arguments.summary
    if getattr(arguments, "executor", None) is not None:
        options["executor"] = arguments.executor
    return options


def fail(error: OutliersError, reporter: Reporter) -> int:
    """Log an error, record it for the job's result, and return the exit code."""
    try:
        record_error(error)
    except OSError:
        # where no file takes a byte, what is printed is all that comes through
        print(error, file=sys.stderr)
    reporter.log("error", str(error))
    return 2 if isinstance(error, BadInput) else 1


def _refused(error: OSError, verb: str) -> str:
    return (
        f"{verb}: {error}. The operating system refused this; remove the cause, and run the same again: "
        "what is done is not done again"
    )


def _no_memory(said: str, verb: str) -> str:
    return (
        f"{verb}: no memory is left ({said}): end what else uses it, or choose a machine with more (--min-cpu-ram), and run the "
        "same again: it goes on after what is done"
    )


def _no_room(error: OSError, root: Path) -> str:
    free = shutil.disk_usage(root).free
    return (
        f"the disk of {root} takes no more ({error.strerror}, {free / 1e6:,.0f} MB free): free some (`outliers captures list`), "
        "or use another --workspace, and run the same again: it goes on after what is journaled"
    )


if __name__ == "__main__":
    sys.exit(main())
