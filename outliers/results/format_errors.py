"""Sums of the error of number formats by sequence, on disk next to the private summary, and the published table of them.

    <summary>/formats/errors.npz       the sums
    <summary>/formats/checksums.json   its checksum, written last: it marks them as complete

`outliers.quantization` measures them. Knows sums and files, no format's rule.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from outliers.counting.summary_files import FORMATS
from outliers.errors import CaptureError, CorruptCapture
from outliers.files.sealed import check_folder, seal_folder
from outliers.results.intervals import ratio_ends, share_span
from outliers.results.schema.quantization import QUANTIZATION_SCHEMA, QuantizationBlock
from outliers.study.prepare import Prepared
from outliers.untrusted.npz import UNREADABLE, open_npz

FOLDER, ERRORS = FORMATS, "errors.npz"
DIGITS = 6
"""Decimals of a number in dB: more would depend on a processor's logarithm."""


@dataclass(frozen=True)
class Measured:
    """What one row of the table is of. layer: its own number. held_out: how many features are kept as they are."""

    site: str
    layer: int
    format: str
    held_out: int
    range: str | None


@dataclass(frozen=True)
class FormatErrors:
    """Sums of a sample of whole sequences. R rows, S sequences.

    sequences: ascending. lengths: (S,) int64, tokens of each. rows: what each row is of. tokens: (R, S) int64, measured
    tokens. squares, errors: (R, S) float64, sums of x^2 and of squared errors over them. ranges: of a part of the corpus,
    which has some sequences of the sample, the digest of the ranges it was measured with; "" for the whole sample.
    """

    study_id: str
    sequences: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rows: tuple[Measured, ...]
    tokens: NDArray[np.int64]
    squares: NDArray[np.float64]
    errors: NDArray[np.float64]
    ranges: str = ""


_ARRAYS = ("sequences", "lengths", "tokens", "squares", "errors")


def write_errors(summary: Path, found: FormatErrors) -> None:
    """Write the sums next to the summary in a folder, and their checksum last."""
    folder = summary / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = np.array(json.dumps([asdict(row) for row in found.rows]))
    arrays = {name: getattr(found, name) for name in _ARRAYS}
    if found.ranges:
        arrays["ranges"] = np.array(found.ranges)
    np.savez(folder / ERRORS, study_id=np.array(found.study_id), rows=rows, **arrays)
    seal_folder(folder, (ERRORS,))


def has_errors(summary: Path) -> bool:
    """Whether there are sums next to the summary in a folder, as they were written."""
    return (summary / FOLDER / ERRORS).exists() and check_folder(summary / FOLDER)


def read_errors(summary: Path, prepared: Prepared) -> FormatErrors:
    """The sums of the whole sample next to the summary in a folder.

    Raises CaptureError where there are none, or those of a part of the corpus; CorruptCapture for others.
    """
    found = read_part_errors(summary, prepared)
    if found.ranges:
        raise CaptureError(
            f"the errors of number formats in {summary} are of a part of the corpus: merge those of all parts"
        )
    return found


def read_part_errors(summary: Path, prepared: Prepared) -> FormatErrors:
    """As `read_errors`, also of a part of the corpus."""
    path = summary / FOLDER / ERRORS
    if not path.exists():
        raise CaptureError(
            f"there are no errors of number formats in {summary}: analyze the whole capture in one run, which measures them, or "
            "measure those of each part (`python -m outliers formats`) and merge the parts again"
        )
    if not check_folder(summary / FOLDER):
        raise CorruptCapture(f"{path} is not what was written there: analyze again")
    try:
        with open_npz(path) as stored:
            rows = tuple(Measured(**row) for row in json.loads(str(stored["rows"])))
            ranges = str(stored["ranges"]) if "ranges" in stored else ""
            arrays = {name: stored[name] for name in _ARRAYS}
            found = FormatErrors(str(stored["study_id"]), rows=rows, **arrays, ranges=ranges)
    except UNREADABLE as error:
        raise CorruptCapture(f"{path} can't be read: {error}; analyze again") from error
    if found.study_id != prepared.study_id or found.errors.shape != (len(found.rows), found.sequences.size):
        raise CorruptCapture(f"{path} is of another study than {prepared.study_id}: analyze again")
    return found


def errors_table(found: FormatErrors) -> pa.Table:
    """quantization.parquet, a row for each of `found`'s, in that order."""
    return pa.Table.from_pylist([_row(found, number) for number in range(len(found.rows))], QUANTIZATION_SCHEMA)


def errors_block(prepared: Prepared, found: FormatErrors) -> QuantizationBlock:
    """What summary.json says of the table."""
    return QuantizationBlock(
        formats=list(prepared.spec.formats.formats),
        sequences=int(found.sequences.size),
        tokens=int(found.lengths.sum()),
        ends=share_span(found.sequences.size) if found.sequences.size > 1 else None,
    )


def _row(found: FormatErrors, number: int) -> dict[str, Any]:
    errors, squares = found.errors[number], found.squares[number]
    error, square = math.fsum(errors.tolist()), math.fsum(squares.tolist())
    share = error / square if square else None
    ends = ratio_ends(errors, squares) if share is not None and errors.size > 1 else None
    low, high = ends or (None, None)
    return asdict(found.rows[number]) | {
        "tokens": int(found.tokens[number].sum()),
        "squared_norm": square,
        "squared_error": error,
        "relative_error": share,
        "relative_error_low": low,
        "relative_error_high": high,
        "sqnr_db": decibels(share),
        "sqnr_db_low": decibels(high),
        "sqnr_db_high": decibels(low),
    }


def decibels(share: float | None) -> float | None:
    """Signal to quantization noise of a relative error, in dB; None where there is no error, or none is known."""
    return round(-10 * math.log10(share), DIGITS) if share else None
