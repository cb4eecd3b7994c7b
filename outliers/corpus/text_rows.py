"""The column `text` of a table in a file, one row after the other, exactly as written.

JSON lines, JSON, CSV, TSV, Parquet and Arrow are read here and not by `datasets`, which guesses a type for each column: it
turned the text "2020-01-01" into a time and "007" into a number. A row without text is a document without tokens.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from outliers.corpus.text_files import TextFile, check_text, open_text, reading
from outliers.errors import CorpusError

COLUMN = "text"
LONGEST_ROW = 1 << 28
"""Characters: a longer row is refused before it fills the memory."""
ROWS_WITHOUT = 1_000
"""A table whose first rows, up to this many, lack the column is refused."""
_READ_CHARACTERS = 1 << 16
_BATCH_ROWS = 1_000
_BLANK = re.compile(r"[ \t\r\n]*")

Row = tuple[str, object]
"""The place of a row, for a message, and the row."""


class _Written(str):
    """A number of a JSON file, as written."""


def texts_of(file: TextFile) -> Iterator[str]:
    """The texts of a table. Raises CorpusError if it can't be read, lacks the column, or has values of another kind in it."""
    path, seen, number = file.path, False, 0
    columns: list[str] = []
    with reading(path):
        for where, row in _rows(file):
            if number % _BATCH_ROWS == 0:
                file.check_unchanged()
            number += 1
            if not isinstance(row, Mapping):
                raise CorpusError(f"{path}, {where}: {type(row).__name__} where an object with '{COLUMN}' is expected")
            if COLUMN in row:
                seen = True
            elif not seen:
                columns = columns or [str(name) for name in row]
                if number >= ROWS_WITHOUT:
                    break
            yield _text(row.get(COLUMN), f"{path}, {where}")
        if number and not seen:
            raise CorpusError(f"{path} has no column '{COLUMN}'; its columns: {', '.join(sorted(columns))}")
        file.check_unchanged()


def check_table(file: TextFile) -> bool:
    """Whether the first rows hold a text. Raises CorpusError as `texts_of`."""
    first = [bool(text.strip()) for text in islice(texts_of(file), ROWS_WITHOUT)]
    return any(first) or len(first) == ROWS_WITHOUT


def _text(value: object, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(f"{place}: the column '{COLUMN}' holds {type(value).__name__} and no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{place}: the column '{COLUMN}' holds half a character ({error.reason})") from error
    return str(value)


def _rows(file: TextFile) -> Iterator[Row]:
    suffix, packed = file.kind.suffix, file.kind.packed
    if suffix in (".parquet", ".arrow", ".feather"):
        if packed:
            raise CorpusError(f"{file.path} can't be read while it is packed: unpack it, or save it as JSON lines")
        with _arrow_errors(file.path):
            yield from _parquet(file.path) if suffix == ".parquet" else _arrow(file.path)
    elif suffix in (".csv", ".tsv"):
        with open_text(file.path, packed, newline="") as stream:
            yield from _csv(stream, file.path, "," if suffix == ".csv" else "\t")
    else:
        with open_text(file.path, packed) as stream:
            yield from _json(stream, file.path) if suffix == ".json" else _json_lines(stream, file.path)


def _lines(stream: TextIO, path: Path) -> Iterator[str]:
    number = 0
    while line := stream.readline(LONGEST_ROW):
        number += 1
        if len(line) == LONGEST_ROW:
            raise CorpusError(f"{path}, line {number} has more than {LONGEST_ROW:,} characters: split it")
        check_text(line, path)
        yield line


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_int=_Written, parse_float=_Written, parse_constant=_Written)


def _json_lines(stream: TextIO, path: Path) -> Iterator[Row]:
    decoder = _decoder()
    for number, line in enumerate(_lines(stream, path), 1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except json.JSONDecodeError as error:
            hint = "; a document over several lines is named .json" if number == 1 else ""
            raise CorpusError(f"{path}, line {number} is not a JSON object: {error.msg}{hint}") from error
        yield f"line {number}", row


class _JsonText:
    """JSON values one after the other from a stream, of which little more than one value is in memory."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        self.stream, self.path, self.decoder = stream, path, _decoder()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def _fill(self) -> None:
        self.line += self.text.count("\n", 0, self.at)
        piece = self.stream.read(max(_READ_CHARACTERS, len(self.text) - self.at))
        check_text(piece, self.path)
        self.text, self.at, self.ended = self.text[self.at :] + piece, 0, not piece
        if len(self.text) > 2 * LONGEST_ROW:
            raise CorpusError(
                f"{self.path}, line {self.line}: a value of more than {LONGEST_ROW:,} characters: split it"
            )

    def where(self) -> str:
        """The line of the next character."""
        return f"line {self.line + self.text.count(chr(10), 0, self.at)}"

    def peek(self) -> str:
        """The next character that is not blank; an empty text at the end."""
        while True:
            match = _BLANK.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._fill()

    def value(self) -> Any:
        """The next value."""
        while True:
            try:
                found, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended:
                    raise CorpusError(f"{self.path}, {self.where()}: not JSON: {error.msg}") from error
            else:
                if end < len(self.text) or self.ended:
                    self.at = end
                    return found
            self._fill()

    def take(self, expected: str) -> str:
        """The next character, which must be one of these."""
        found = self.peek()
        if not found or found not in expected:
            raise CorpusError(
                f"{self.path}, {self.where()}: not JSON: {found or 'the end'!r} where {expected} is expected"
            )
        self.at += 1
        return found


def _json(stream: TextIO, path: Path) -> Iterator[Row]:
    """A list of objects; one object with a list `data`, or with columns; or objects one after the other."""
    source = _JsonText(stream, path)
    if not source.peek():
        return
    if source.peek() == "[":
        source.take("[")
        if source.peek() == "]":
            return
        while True:
            source.peek()
            where = source.where()
            yield where, source.value()
            if source.take(",]") == "]":
                break
        if source.peek():
            raise CorpusError(f"{path}, {source.where()}: there is more after the list")
        return
    where, first = source.where(), source.value()
    if not source.peek():
        yield from _one_object(first, where)
        return
    yield where, first
    while source.peek():
        where = source.where()
        yield where, source.value()


def _one_object(value: object, where: str) -> Iterator[Row]:
    if isinstance(value, Mapping) and COLUMN not in value and isinstance(value.get("data"), list):
        yield from ((f"row {number} of data", row) for number, row in enumerate(value["data"], 1))
        return
    column = value.get(COLUMN) if isinstance(value, Mapping) else None
    if isinstance(column, Mapping):
        column = list(column.values())
    if isinstance(column, list):
        yield from ((f"row {number}", {COLUMN: text}) for number, text in enumerate(column, 1))
    else:
        yield where, value


def _csv(stream: TextIO, path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader(_lines(stream, path), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        _check_columns(header, path)
        place = header.index(COLUMN)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise CorpusError(
                    f"{path}, line {reader.line_num} has {len(row)} fields, its header {len(header)}: a text with a "
                    "delimiter in it stands in quotes"
                )
            yield f"line {reader.line_num}", {COLUMN: row[place]}
    except csv.Error as error:
        raise CorpusError(f"{path}, line {reader.line_num} is not CSV: {error}") from error


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise CorpusError(f"{path} can't be read: {error}") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _check_columns(file.schema_arrow.names, path)
        yield from _batches(file.iter_batches(batch_size=_BATCH_ROWS, columns=[COLUMN]))


def _arrow(path: Path) -> Iterator[Row]:
    """The stream that `datasets` saves, or a file of either version of Feather."""
    import pyarrow as pa
    from pyarrow import feather

    with path.open("rb") as file:
        begins = file.read(6)
    if begins.startswith(b"FEA1"):
        table = feather.read_table(path)
        _check_columns(table.schema.names, path)
        yield from _batches(table.to_batches(_BATCH_ROWS))
        return
    with pa.OSFile(str(path)) as source:
        if begins == b"ARROW1":
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(source)
        _check_columns(reader.schema.names, path)
        yield from _batches(batches)


def _check_columns(names: list[str], path: Path) -> None:
    if COLUMN not in names:
        raise CorpusError(f"{path} has no column '{COLUMN}'; its columns: {', '.join(names)}")
    if names.count(COLUMN) > 1:
        raise CorpusError(f"{path} has {names.count(COLUMN)} columns '{COLUMN}': give it one")


def _batches(batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for value in batch.column(batch.schema.names.index(COLUMN)).to_pylist():
            number += 1
            yield f"row {number}", {COLUMN: value}
