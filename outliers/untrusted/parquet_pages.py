"""Counts what a Parquet file unpacks to from the headers of its pages, before any page is unpacked.

The footer only claims sizes; a reader believes the header of each page. So every header is read here (Thrift's compact
protocol, the part of it that PageHeader uses), and the bytes that its values take in memory are added up: a dictionary of one
long string, of which every row is an index, counts as often as it is used. Source: parquet.thrift of the Parquet format 2.10.
"""

from __future__ import annotations

from typing import Any

MAX_UNPACKED_BYTES = 1 << 29
"""All pages, and all values as columns hold them. A table of a million rows has 250 MB."""
_NUMBER_BYTES = 8
"""Of a value that is not a string: int64 and float64 are the widest."""
_DEPTH = 8
_MAGIC = b"PAR1"
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3
"""PageType; no program writes an index page (1)."""


def check_pages(data: bytes, metadata: Any) -> None:
    """Raises ValueError if the file unpacks to more than MAX_UNPACKED_BYTES, or its pages can't be read."""
    total = 0
    if "parquet-mr" in (metadata.created_by or ""):  # for its first versions a reader also takes bytes behind a column
        raise ValueError("it was written by another program")
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in (group.column(index) for index in range(group.num_columns)):
            if not column.num_values:  # no page of it is read
                continue
            begin = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset is not None:
                begin = min(begin, column.dictionary_page_offset)
            end = begin + column.total_compressed_size
            if begin < len(_MAGIC) or end > len(data) or end < begin:
                raise ValueError("a column lies outside of the file")
            total += _column_bytes(data, begin, end, column.physical_type)
            if total > MAX_UNPACKED_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")


def _column_bytes(data: bytes, begin: int, end: int, kind: str) -> int:
    """Bytes that the pages of a column chunk take unpacked, and its values in memory; at least."""
    total, entry = 0, _NUMBER_BYTES
    strings = kind in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
    while begin < end:
        head, begin = _struct(data, begin, end, 0)
        unpacked, packed = _number(head, 2), _number(head, 3)
        if begin + packed > end:
            raise ValueError("a page lies outside of its column")
        begin += packed
        total += unpacked
        if _number(head, 1) == _DICTIONARY:
            # one entry may be as long as the page
            entry = max(entry, unpacked) if strings else entry
            continue
        own = head.get(5 if _number(head, 1) == _DATA else 8)
        if _number(head, 1) not in (_DATA, _DATA_2) or not isinstance(own, dict):
            raise ValueError("a page is of no known kind")
        total += _number(own, 1) * entry
        if total > MAX_UNPACKED_BYTES:
            break
    return total


def _number(head: dict[int, Any], field: int) -> int:
    found = head.get(field)
    if not isinstance(found, int) or found < 0:
        raise ValueError("the head of a page lacks a number")
    return found


def _struct(data: bytes, at: int, end: int, depth: int) -> tuple[dict[int, Any], int]:
    """A struct of the compact protocol from `at` on, and where it ends: whole numbers and structs by field, others skipped."""
    if depth > _DEPTH:
        raise ValueError("the head of a page is nested too deep")
    found: dict[int, Any] = {}
    field = 0
    while True:
        byte, at = _byte(data, at, end)
        if byte == 0:
            return found, at
        kind, step = byte & 0x0F, byte >> 4
        if step:
            field += step
        else:
            field, at = _signed(data, at, end)
        if kind in (1, 2):  # a boolean is in the kind itself
            continue
        value, at = _value(data, at, end, kind, depth)
        if value is not None:
            found[field] = value


def _value(data: bytes, at: int, end: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):  # i16, i32, i64
        return _signed(data, at, end)
    if kind == 12:
        return _struct(data, at, end, depth + 1)
    if kind == 3:
        return None, at + 1
    if kind == 7:
        return None, at + 8
    if kind == 8:  # bytes, such as the minimum of a page
        length, at = _unsigned(data, at, end)
        if at + length > end:
            raise ValueError("the head of a page has no end")
        return None, at + length
    raise ValueError(f"the head of a page has a field of kind {kind}")


def _byte(data: bytes, at: int, end: int) -> tuple[int, int]:
    if at >= end:
        raise ValueError("the head of a page has no end")
    return data[at], at + 1


def _unsigned(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte, at = _byte(data, at, end)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("the head of a page has a number without an end")


def _signed(data: bytes, at: int, end: int) -> tuple[int, int]:
    value, at = _unsigned(data, at, end)
    return (value >> 1) ^ -(value & 1), at
