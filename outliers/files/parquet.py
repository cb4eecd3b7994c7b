"""A table in a Parquet file, written whole and read by one thread.

pyarrow starts its thread pools lazily, and the C++ runtime aborts a process that ends while one still starts ("terminate
called without an active exception", about 1 of 15 short processes on two busy cores with pyarrow 26): a finished step would
end as a failed job. These tables have kilobytes, so no pool is started for them; callers that compute on a table pass
use_threads=False to pyarrow.
A file of kilobytes may unpack to terabytes: its unpacked size is counted from the headers of its pages (`parquet_pages`)
before any of it is unpacked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from outliers.files.atomic import write_atomic
from outliers.untrusted.parquet_pages import check_pages

MAX_ROWS = 1_000_000
"""A published table has at most 8 MB, and a row of a study 30 bytes or more."""
_FOOTER_BYTES = 1 << 22
_FOOTER_ITEMS = 1 << 16


def open_parquet(data: bytes) -> pq.ParquetFile:
    """A Parquet file from its bytes; raises pa.ArrowException or OSError for other bytes, and for a file that would
    unpack to too much memory."""
    file = pq.ParquetFile(
        pa.BufferReader(data),
        pre_buffer=False,
        thrift_string_size_limit=_FOOTER_BYTES,
        thrift_container_size_limit=_FOOTER_ITEMS,
    )
    if file.metadata.num_rows > MAX_ROWS:
        raise pa.ArrowInvalid(f"it has {file.metadata.num_rows:,} rows, at most {MAX_ROWS:,} are read")
    try:
        check_pages(data, file.metadata)
    except ValueError as error:
        raise pa.ArrowInvalid(str(error)) from error
    return file


def read_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table in a Parquet file's bytes; raises pa.ArrowException or OSError for other bytes or a missing column."""
    return open_parquet(data).read(columns=columns, use_threads=False)


def numbers_of(column: Any) -> NDArray[Any]:
    """The values of an Arrow column of numbers or bools without nulls; bool as uint8, which has the same bytes.

    Not by Arrow's own `to_numpy`, nor by a comparison with a Python value: both import pandas where it is installed, half a
    second of every command that reads a study.
    """
    flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.from_dlpack(flat.cast(pa.uint8()) if pa.types.is_boolean(flat.type) else flat)


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file's bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole."""
    write_atomic(path, parquet_bytes(table))
