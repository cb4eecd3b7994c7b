"""The judge of quantization.parquet: whether its bytes are the errors of number formats of the study, and nothing besides."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from outliers.files.parquet import open_parquet
from outliers.publish.parquet_contents import MAX_ROWS, NotAllowedError, check_columns, check_extras, check_nulls
from outliers.results.schema import QUANTIZATION_NULLABLE, QUANTIZATION_SCHEMA, RANGES, StudySummary
from outliers.spec import BLOCK
from outliers.spec.formats import parse_format

MAX_FORMATS = 64
_KEY = ["site", "layer", "format", "held_out", "range"]
_ENDS = ("relative_error_low", "relative_error_high", "sqnr_db_low", "sqnr_db_high")
_CLOSE = 1e-9


def check_quantization(data: bytes | None, summary: StudySummary) -> None:
    """quantization.parquet: exactly QUANTIZATION_SCHEMA, of the study's sites, layers and formats; there where the summary says
    so, and only there."""
    block = summary.quantization
    if (data is None) != (block is None):
        raise NotAllowedError("is missing" if data is None else "is there, and summary.json says nothing of it")
    if data is None:
        return
    try:
        file = open_parquet(data)
        check_columns(file.schema_arrow, QUANTIZATION_SCHEMA, (QUANTIZATION_SCHEMA.names,))
        if file.metadata.num_rows > MAX_ROWS:
            raise NotAllowedError(f"has {file.metadata.num_rows:,} rows, at most {MAX_ROWS:,} are published")
        check_extras(file.metadata, len(data), 1)
        table = file.read(use_threads=False)
        check_nulls(table, QUANTIZATION_NULLABLE)
        _check_places(table, summary)
        _check_values(table, summary)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise NotAllowedError(f"is not readable Parquet: {str(error)[:200]}") from error


def _check_places(table: Any, summary: StudySummary) -> None:
    known = set(summary.readings) - {BLOCK}
    if unknown := set(pc.unique(table["site"]).to_pylist()) - known:
        raise NotAllowedError(f"has rows of the site {sorted(unknown)[0]!r}, the summary has {sorted(known)}")
    if strange := set(pc.unique(table["layer"]).to_pylist()) - {row.layer for row in summary.layers}:
        raise NotAllowedError(f"has rows of layer {min(strange)}, which the summary does not have")
    names = pc.unique(table["format"]).to_pylist()
    if len(names) > MAX_FORMATS:
        raise NotAllowedError(f"has {len(names)} formats, at most {MAX_FORMATS} are published")
    asked = {parse_format(name).base for name in _block(summary).formats}
    for name in names:
        try:
            base = parse_format(name[:40]).base
        except ValueError:
            base = None
        if base is None or base not in asked:
            raise NotAllowedError(f"has rows of the format {name[:40]!r}, the study has {sorted(asked)}")
    if odd := set(pc.unique(table["range"]).to_pylist()) - {None, *RANGES}:
        raise NotAllowedError(f"has the range {min(odd)[:40]!r}, not one of {', '.join(RANGES)}")
    keys = table.select(_KEY).group_by(_KEY, use_threads=False).aggregate([])
    if keys.num_rows != table.num_rows:
        raise NotAllowedError(
            f"has {table.num_rows:,} rows for {keys.num_rows:,} ({', '.join(_KEY)}); one each is allowed"
        )


def _block(summary: StudySummary) -> Any:
    return summary.quantization


def _close(found: float | None, due: float | None) -> bool:
    if found is None or due is None:
        return found is due
    return abs(found - due) <= 1e-6 + _CLOSE * abs(due)


def _check_values(table: Any, summary: StudySummary) -> None:
    """Every number in its bounds, and the derived ones those of the sums."""
    most, width, one = _block(summary).tokens, summary.max_width, _block(summary).ends is None
    for row in table.to_pylist():
        what = f"at {row['site']}, layer {row['layer']}, {row['format']}"
        if not 0 <= row["tokens"] <= most or not 0 <= row["held_out"] <= width:
            raise NotAllowedError(f"has {row['tokens']:,} tokens and {row['held_out']:,} held-out features {what}")
        numbers = [value for value in row.values() if isinstance(value, float)]
        if not all(math.isfinite(value) for value in numbers) or min(row["squared_norm"], row["squared_error"]) < 0:
            raise NotAllowedError(f"has a number that is not finite, or a negative square, {what}")
        share = row["squared_error"] / row["squared_norm"] if row["squared_norm"] else None
        wanted = (share, -10 * math.log10(share) if share else None)
        for found, due in zip((row["relative_error"], row["sqnr_db"]), wanted, strict=True):
            if not _close(found, due):
                raise NotAllowedError(f"has a relative error or a number in dB that its sums do not give, {what}")
        if one and any(row[name] is not None for name in _ENDS):
            raise NotAllowedError(f"has an interval of one sequence, {what}")
        low, high = row["relative_error_low"], row["relative_error_high"]
        if (low is None) != (high is None) or (low is not None and not low <= (share or 0.0) <= high):
            raise NotAllowedError(f"has an interval that does not hold its number, {what}")
