"""Ranges and errors of formats that parts of a study measured, joined into exactly what one machine measures.

Each part counts its sequences; with the summaries of all, each gives the ranges that a summary lacks; with the ranges of all,
each gives the errors of its sequences of the sample (`measure.measure_part`). What is joined is of the same counts and the
same ranges, which digests say, and of each sequence once. Parts come from other machines: their arrays are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from outliers.corpus.tokens import load_corpus
from outliers.counting.summary import Summary, merge
from outliers.counting.summary_files import read_summary
from outliers.errors import CorruptCapture
from outliers.quantization.ranges import FormatPlan, Ranges, read_ranges, write_ranges
from outliers.results.format_errors import FOLDER, FormatErrors, has_errors, read_part_errors, write_errors
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

Missing = Literal["ranges", "errors"]


def plan_of(prepared: Prepared, workspace: Workspace, summary: Summary) -> FormatPlan:
    """What is measured of a study, from the summary of its whole corpus."""
    lengths = load_corpus(prepared.corpus, workspace).lengths.astype(np.int64)
    return FormatPlan.of(prepared, summary, lengths)


def joined_summary(folders: Sequence[Path]) -> Summary:
    """The totals of disjoint summaries. Raises CaptureError, CorruptCapture, SummaryMismatch."""
    total = read_summary(folders[0])
    for folder in folders[1:]:
        total = merge(total, read_summary(folder))
    return total


def join_ranges(plan: FormatPlan, folders: Sequence[Path]) -> Ranges | None:
    """The ranges of the whole corpus; None where those of some sequences are missing. Raises CorruptCapture."""
    every = tuple(range(plan.lengths.size))
    total = Ranges(plan, every)
    if not plan.scanned:
        return total
    found = [ranges for folder in folders if (ranges := read_ranges(folder, plan)) is not None]
    if sorted(sequence for ranges in found for sequence in ranges.sequences) != list(every):
        return None
    for ranges in found:
        for layer in range(plan.summary.frame.num_layers):
            total.raise_to(layer, {key: values[layer] for key, values in ranges.largest.items()})
    return total


def are_measured(folder: Path, ranges: Ranges) -> bool:
    """Whether the part in a folder has its errors, measured with these ranges."""
    return has_errors(folder) and read_part_errors(folder, ranges.plan.prepared).ranges == ranges.digest


def join_errors(ranges: Ranges, folders: Sequence[Path]) -> FormatErrors | None:
    """The errors of the whole sample, in the order of its sequences; None where some are missing. Raises CorruptCapture."""
    plan = ranges.plan
    found = [
        _checked(read_part_errors(folder, plan.prepared), plan, folder)
        for folder in folders
        if are_measured(folder, ranges)
    ]
    numbers = np.concatenate([np.zeros(0, np.int64), *(part.sequences for part in found)])
    order = np.argsort(numbers, kind="stable")
    if not np.array_equal(numbers[order], plan.chosen):
        return None

    return FormatErrors(
        study_id=plan.prepared.study_id,
        sequences=plan.chosen,
        lengths=plan.lengths[plan.chosen],
        rows=plan.rows(),
        tokens=np.ascontiguousarray(np.concatenate([part.tokens for part in found], axis=1)[:, order]),
        squares=np.ascontiguousarray(np.concatenate([part.squares for part in found], axis=1)[:, order]),
        errors=np.ascontiguousarray(np.concatenate([part.errors for part in found], axis=1)[:, order]),
    )


def _checked(found: FormatErrors, plan: FormatPlan, folder: Path) -> FormatErrors:
    """The errors of a part. Raises CorruptCapture where they are of something else, or no sums of squares."""
    shape = (len(found.rows), found.sequences.size)
    known = (
        found.rows == plan.rows()
        and found.sequences.dtype == np.int64
        and found.sequences.ndim == 1
        and np.isin(found.sequences, plan.chosen).all()
        and np.array_equal(found.lengths, plan.lengths[found.sequences])
        and found.tokens.dtype == np.int64
        and found.squares.dtype == found.errors.dtype == np.float64
        and found.tokens.shape == found.squares.shape == found.errors.shape == shape
        and (found.tokens >= 0).all()
        and (found.tokens <= found.lengths).all()
        and all((np.isfinite(sums) & (sums >= 0)).all() for sums in (found.squares, found.errors))
    )
    if not known:
        raise CorruptCapture(f"the errors of number formats in {folder / FOLDER} are not of this study: measure again")
    return found


def write_joined(plan: FormatPlan, folders: Sequence[Path], whole: Path) -> Missing | None:
    """Join what the parts in `folders` measured into the folder of the merged summary; what is missing of some of them.

    Ranges are written as soon as those of all are there: each part needs them for its errors.
    """
    ranges = join_ranges(plan, folders)
    if ranges is None:
        return "ranges"
    if plan.scanned:
        write_ranges(whole, ranges)
    errors = join_errors(ranges, folders)
    if errors is None:
        return "errors"
    write_errors(whole, errors)
    return None
