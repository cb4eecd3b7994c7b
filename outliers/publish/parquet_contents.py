"""What is refused in any Parquet file that may leave: other columns, other types, nulls, bytes that belong to no column."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa

MAX_PARQUET_EXTRA_BYTES = 65_536
"""Page indexes, magic numbers and the like; what lies in a Parquet file beyond its columns and its footer."""
MAX_PARQUET_METADATA_BYTES = 65_536
MAX_PARQUET_PLAIN_BYTES = 256_000_000
MAX_ROWS = 300_000
"""More than `tables` publishes of the widest model: a few bytes of a packed column can stand for any number of rows."""


class NotAllowedError(Exception):
    """Why the bytes may not be published, as a phrase that follows the file's name."""


def check_columns(found: Any, wanted: Any, known: Sequence[list[str]]) -> None:
    """Refuses other columns than one of the lists in `known`, or another type than in the schema `wanted`."""
    columns = {field.name: str(field.type) for field in found}
    if list(columns) not in known or len(columns) != len(found):
        raise NotAllowedError(f"has the columns {list(columns)[:20]}, not {wanted.names}")
    for name, kind in columns.items():
        if not _same_type(found.field(name).type, wanted.field(name).type):
            raise NotAllowedError(f"has {kind} in the column {name}, not {wanted.field(name).type}")


def check_nulls(table: Any, nullable: Collection[str]) -> None:
    """Refuses a null in any other column than those named."""
    for name in table.column_names:
        if name not in nullable and table[name].null_count:
            raise NotAllowedError(f"has {table[name].null_count:,} nulls in the column {name}; none are allowed")


def _same_type(found: Any, wanted: Any) -> bool:
    if pa.types.is_list(wanted):
        return bool(pa.types.is_list(found) and found.value_type == wanted.value_type)
    return bool(found == wanted)


def check_extras(metadata: Any, size: int, longest: int) -> None:
    """Refuses bytes that belong to no column: between the pages, before them, or as metadata. longest: of a list in a column."""
    held = sum(len(key) + len(value) for key, value in (metadata.metadata or {}).items())
    if held > MAX_PARQUET_METADATA_BYTES:
        raise NotAllowedError(f"holds {held:,} bytes of metadata, at most {MAX_PARQUET_METADATA_BYTES:,} are published")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(n) for group in groups for n in range(group.num_columns)]
    most = max((column.num_values for column in columns), default=0)
    if most > metadata.num_rows * longest:
        raise NotAllowedError(f"holds {most:,} values in a column of {metadata.num_rows:,} rows")
    if (plain := sum(column.total_uncompressed_size for column in columns)) > MAX_PARQUET_PLAIN_BYTES:
        raise NotAllowedError(f"unpacks to {plain:,} bytes, at most {MAX_PARQUET_PLAIN_BYTES:,} are read")
    extra = size - metadata.serialized_size - sum(column.total_compressed_size for column in columns)
    if extra > MAX_PARQUET_EXTRA_BYTES:
        raise NotAllowedError(f"holds {extra:,} bytes outside of its columns, at most {MAX_PARQUET_EXTRA_BYTES:,}")
