"""`outliers merge`: summaries of parts of one study, counted on several machines, joined into the whole and reported.

Calls `outliers.counting.merge` and `outliers.steps`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.answers import Answers
from flows.cli.captures import Bars
from flows.cli.console import Steps, line

if TYPE_CHECKING:
    from rich.console import Console

    from outliers.counting.merge import Merged
    from outliers.publish.outcome import Outcome
    from outliers.study.prepare import Prepared
    from outliers.workspace import Workspace

_TEXT = """Join summaries of disjoint sequences of one study, from several machines, into the exact whole.

SUMMARY is a folder that `python -m outliers analyze study.json --sequences FIRST:STOP` wrote
(<workspace>/captures/<capture_id>/summaries/<study_id>). Where every sequence is there, the results are written too.
Summaries that share a sequence, or are of another model, corpus or criteria, are refused.

A study with --formats is merged three times: each part then measures ranges, and after the next merge errors, by
`python -m outliers formats study.json --sequences FIRST:STOP --summary MERGED`.
"""


def add_merge_parser(verbs: Any, text: str) -> None:
    """Add `merge SUMMARY...`."""
    merge = verbs.add_parser(
        "merge",
        help=text,
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument("summary", nargs="+", type=Path, metavar="SUMMARY", help="folder with totals.npz")
    merge.add_argument("--workspace", metavar="DIR", help="where the study was prepared (default: $OUTLIERS_WORKSPACE)")
    merge.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def merge_command(
    workspace: Workspace, arguments: argparse.Namespace, console: Console
) -> tuple[Outcome, Prepared] | None:
    """`outliers merge`; the outcome of the study where it is whole. Raises BadInput, SummaryMismatch, CorruptCapture."""
    from outliers.counting.merge import merge_summaries
    from outliers.publish.outcome import make_outcome
    from outliers.steps import run_report
    from outliers.units import format_ranges

    merged = merge_summaries(arguments.summary, workspace)
    of, have = merged.prepared.corpus.num_sequences, len(merged.sequences)
    out = console if arguments.json else Answers()
    line(
        out,
        "merged",
        f"{have} of {of} sequences of {merged.prepared.title}: {format_ranges(merged.sequences, half_open=True)}",
    )
    if merged.missing:
        line(out, "missing", f"{format_ranges(merged.missing, half_open=True)}; merge again with those")
        line(out, "summary", str(merged.folder))
        if arguments.json:
            print(
                json.dumps(
                    {
                        "study_id": merged.prepared.study_id,
                        "summary": str(merged.folder),
                        "sequences": have,
                        "missing": format_ranges(merged.missing, half_open=True),
                    }
                )
            )
        return None
    if merged.prepared.spec.formats.formats and not _have_formats(workspace, arguments, merged, out):
        return None
    steps = Steps(console)
    with steps.shown():
        run_report(merged.prepared, workspace, Bars(steps))
    return make_outcome(merged.prepared, workspace, published=None, cached=False), merged.prepared


def _have_formats(workspace: Workspace, arguments: argparse.Namespace, merged: Merged, out: Console) -> bool:
    """Join what the parts measured of formats; where some of it is missing, say how each part measures it."""
    from outliers.counting.summary_files import read_summary
    from outliers.quantization.joining import plan_of, write_joined

    plan = plan_of(merged.prepared, workspace, read_summary(merged.folder))
    missing = write_joined(plan, arguments.summary, merged.folder)
    if missing is None:
        return True
    line(
        out,
        "missing",
        f"the {missing} of formats of some parts. Send {merged.folder} to each, run there `python -m outliers formats study.json "
        "--sequences FIRST:STOP --summary FOLDER`, and merge again",
    )
    if arguments.json:
        print(
            json.dumps(
                {"study_id": merged.prepared.study_id, "summary": str(merged.folder), "missing_formats": missing}
            )
        )
    return False
