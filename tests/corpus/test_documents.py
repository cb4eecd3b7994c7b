"""Which files of a corpus are read, and what comes out of them: the column text of tables, the texts that a person sees."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from outliers.corpus.hub_data import find_documents
from outliers.corpus.text_files import LONG_BYTES, classify
from outliers.errors import CorpusError
from outliers.spec import CorpusSpec

TEXTS = ["A sentence.", "2020-01-01", "007", "1.10", 'line\nbreak, "quotes", a\ttab', "", "中文 😀 é", "true"]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def read(source, **spec):
    """Every document of a source, as a string."""
    full = CorpusSpec(source=str(source), **spec)
    found = find_documents(full).texts(full)
    return [text if isinstance(text, str) else text.first(1 << 40) for text in found]


def identity(source):
    return find_documents(CorpusSpec(source=str(source))).identity


def lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table_csv(delimiter):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerows([["id", "text"], *([row["id"], row["text"]] for row in ROWS)])
    return stream.getvalue().encode()


def arrow(writer):
    sink, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    if writer == "parquet":
        pq.write_table(table, sink)
    elif writer == "feather":
        feather.write_feather(table, sink)
    elif writer == "feather 1":
        feather.write_feather(table, sink, version=1)
    else:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return sink.getvalue()


def arrow_twice():
    sink, table = io.BytesIO(), pa.table([["x"], ["y"]], names=["text", "text"])
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def zst(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COLUMNS = {"text": TEXTS, "id": list(range(len(TEXTS)))}
PANDAS = {"text": {str(number): text for number, text in enumerate(TEXTS)}}
WRITTEN = {
    # name: bytes; every one holds ROWS
    "rows.jsonl": lines(),
    "UPPER.JSONL": lines(),
    "rows.ndjson": lines(),
    "mark.jsonl": codecs.BOM_UTF8 + lines(),
    "rows.json": lines(),
    "list.json": json.dumps(ROWS, indent=2).encode(),
    "mark.json": codecs.BOM_UTF8 + json.dumps(ROWS).encode(),
    "data.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "columns.json": json.dumps(COLUMNS).encode(),
    "pandas.json": json.dumps(PANDAS).encode(),
    "objects.json": "\n".join(json.dumps(row, indent=4) for row in ROWS).encode(),
    "rows.csv": table_csv(","),
    "mark.csv": codecs.BOM_UTF8 + table_csv(","),
    "rows.TSV": table_csv("\t"),
    "rows.parquet": arrow("parquet"),
    "stream.arrow": arrow("stream"),
    "file.arrow": arrow("feather"),
    "rows.feather": arrow("feather"),
    "old.feather": arrow("feather 1"),
    "rows.jsonl.gz": gzip.compress(lines(), mtime=0),
    "two.jsonl.gz": gzip.compress(lines(ROWS[:3]), mtime=0) + gzip.compress(lines(ROWS[3:]), mtime=0),
    "rows.JSON.GZ": gzip.compress(json.dumps(ROWS).encode(), mtime=0),
    "rows.csv.zst": zst(table_csv(",")),
    "rows.jsonl.zst": zst(lines(ROWS[:3])) + zst(lines(ROWS[3:])),
}


@pytest.mark.filterwarnings("ignore:.*feather.*:DeprecationWarning", "ignore:.*feather.*:FutureWarning")
@pytest.mark.parametrize("name", WRITTEN)
def test_the_column_text_comes_out_as_it_is_written(texts, name):
    (texts / name).write_bytes(WRITTEN[name])
    (texts / "README.md").write_text("# a data set\n")
    (texts / "LICENSE").write_text("do what you like")
    (texts / "dataset_info.json").write_text("{}")
    assert sorted(read(texts)) == sorted(TEXTS)
    assert sorted(read(texts / name)) == sorted(TEXTS)


def test_what_is_left_out_is_said(texts, caplog):
    (texts / "rows.jsonl").write_bytes(lines())
    for name in ("README.md", "LICENSE.txt", "page.htm", "suffixless"):
        (texts / name).write_text("x")
    with caplog.at_level(logging.WARNING):
        read(texts)
    assert "1 tables are read; left out: LICENSE.txt, README.md, page.htm, suffixless" in caplog.text


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.TXT", b"some text\n"),
        ("a.txt", codecs.BOM_UTF8 + b"some text\n"),
        ("a.md", b"some text\r\n"),
        ("a.txt.gz", gzip.compress(b"some text\n", mtime=0)),
        ("a.txt.zst", zst(codecs.BOM_UTF8 + b"some text\n")),
    ],
)
def test_a_text_is_read_without_its_mark_and_its_packing(texts, name, data):
    (texts / name).write_bytes(data)
    assert read(texts) == read(texts / name) == ["some text\n"]


def test_hidden_names_are_left_out(texts):
    (texts / "a.txt").write_text("seen")
    (texts / "._a.txt").write_bytes(bytes.fromhex("0005160700020000") + b"\xb0" * 20)
    for folder in (".ipynb_checkpoints", ".git", "__MACOSX", "sub"):
        (texts / folder).mkdir()
        (texts / folder / "b.txt").write_text(folder)
    (texts / ".DS_Store").write_bytes(b"\0\0")
    assert sorted(read(texts)) == ["seen", "sub"]
    assert read(texts / ".git" / "b.txt") == [".git"]  # given by name


def test_links_are_followed_and_no_folder_is_read_twice(texts, tmp_path, caplog):
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "b.txt").write_text("elsewhere")
    (texts / "sub").mkdir()
    (texts / "sub" / "a.txt").write_text("here")
    (texts / "sub" / "up").symlink_to(texts)
    (texts / "again").symlink_to(texts / "sub")
    (texts / "out").symlink_to(tmp_path / "else")
    (texts / "file.txt").symlink_to(tmp_path / "else" / "b.txt")
    (texts / "gone.txt").symlink_to(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        assert sorted(read(texts)) == ["elsewhere", "elsewhere", "here"]
    assert "again is a link to a folder that is read already" in caplog.text
    assert "gone.txt is a link to nothing" in caplog.text


def test_a_file_given_by_name_is_text_where_it_is(texts):
    (texts / "chapter").write_text("no suffix")
    assert read(texts / "chapter") == ["no suffix"]


def test_a_text_of_json_lines_stays_a_text_and_is_said(texts, caplog):
    (texts / "a.txt").write_bytes(lines())
    with caplog.at_level(logging.WARNING):
        assert len(read(texts)) == 1
    assert "looks like JSON lines: name it .jsonl" in caplog.text


LATIN = "Größe".encode("latin-1")
REFUSED = {
    # name of the file or files: (what is in them, what is said)
    "nul.txt": (b"a\0b", "nul.txt is not UTF-8 text: it holds NUL bytes"),
    "latin.txt": (b"x" * 3_000_000 + LATIN, "latin.txt is not UTF-8 text .*iconv"),
    "latin.csv": (b"text\n" + LATIN, "latin.csv is not UTF-8 text"),
    "utf16.txt": ("text".encode("utf-16"), "utf16.txt is not UTF-8 text, it begins as UTF-16"),
    "utf32.txt": ("text".encode("utf-32"), "utf32.txt is not UTF-8 text, it begins as UTF-32: iconv -f UTF-32"),
    "utf16.jsonl": ('{"text": "x"}'.encode("utf-16"), "utf16.jsonl is not UTF-8 text"),
    "empty.txt": (b"", "holds no text: empty.txt has nothing but blanks"),
    "mark.txt": (codecs.BOM_UTF8, "has nothing but blanks"),
    "blank.txt.gz": (gzip.compress(b" \n" * 99, mtime=0), "has nothing but blanks"),
    "torn.txt.gz": (gzip.compress(os.urandom(3000).hex().encode(), mtime=0)[:-900], "torn.txt.gz can't be read"),
    "no.txt.gz": (b"plain", "no.txt.gz can't be read"),
    "no.txt.zst": (b"plain", "no.txt.zst can't be read"),
    "empty.jsonl": (b"", "holds no text"),
    "nulls.jsonl": (b'{"text": null}\n{"text": ""}', "holds no text"),
    "torn.jsonl": (lines() + b'{"text": "x', "torn.jsonl, line 9 is not a JSON object"),
    "list.jsonl": (json.dumps(ROWS, indent=1).encode(), "list.jsonl, line 1 .* is named .json"),
    "words.jsonl": (b'"only words"\n', "words.jsonl, line 1: str where an object"),
    "flags.jsonl": (b'{"text": true}\n', "the column 'text' holds bool and no text"),
    "deep.jsonl": (b'{"text": {"en": "x"}}\n', "the column 'text' holds dict and no text"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', "holds half a character"),
    "nul.jsonl": (b'{"text": "x"}\0\n', "NUL bytes"),
    "nested.json": (b"[" * 200_000, "nested.json can't be read"),
    "torn.json": (json.dumps(ROWS)[:-9].encode(), "torn.json, line 1: not JSON"),
    "more.json": (b'[{"text": "x"}] 7', "there is more after the list"),
    "other.json": (b'{"rows": [], "title": "x"}', "has no column 'text'; its columns: rows, title"),
    "body.csv": (b"id,body\n1,x\n", "body.csv has no column 'text'; its columns: id, body"),
    "commas.csv": (b"id,text\n1,a text, with a comma\n", "commas.csv, line 2 has 3 fields, its header 2"),
    "quote.csv": (b'id,text\n1,"a text\n', "quote.csv, line 2 is not CSV"),
    "twice.csv": (b"text,text\nx,y\n", "twice.csv has 2 columns 'text': give it one"),
    "twice.arrow": (arrow_twice(), "twice.arrow has 2 columns 'text': give it one"),
    "numbers.parquet": ("parquet", "the column 'text' holds int and no text"),
    "torn.parquet": (arrow("parquet")[:-30], "torn.parquet can't be read"),
    "no.arrow": (b"no arrow", "no.arrow can't be read"),
    "rows.parquet.gz": (gzip.compress(arrow("parquet"), mtime=0), "while it is packed"),
    "rows.xlsx": (b"PK\x03\x04" + bytes(range(256)), "rows.xlsx is not UTF-8 text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_before_anything_is_read_of_it(texts, name):
    data, message = REFUSED[name]
    if data == "parquet":
        pq.write_table(pa.table({"text": [1, 2]}), texts / name)
    else:
        (texts / name).write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        identity(texts / name)


def test_folders_that_mix_are_refused_by_name(texts):
    (texts / "a.txt").write_text("x")
    (texts / "rows.jsonl").write_bytes(lines())
    with pytest.raises(CorpusError, match=r"holds texts \(a.txt\) and tables \(rows.jsonl\)"):
        identity(texts)
    (texts / "a.txt").unlink()
    (texts / "rows.csv").write_bytes(table_csv(","))
    with pytest.raises(CorpusError, match=r"mixes CSV and JSON files \(rows.jsonl, rows.csv\): give one kind"):
        identity(texts)


def test_a_readme_among_texts_is_one_of_them(texts):
    for name in ("a.txt", "README.md", "noticeboard.txt"):
        (texts / name).write_text(name)
    assert sorted(read(texts)) == ["README.md", "a.txt", "noticeboard.txt"]


def test_a_readme_beside_data_that_is_not_read_is_refused(texts):
    (texts / "README.md").write_text("# a data set\n")
    assert read(texts) == ["# a data set\n"]
    (texts / "rows.jsonl.bz2").write_bytes(b"BZh9")
    with pytest.raises(CorpusError, match=r"holds no text: .*; besides README\.md has rows\.jsonl\.bz2"):
        identity(texts)


@pytest.mark.parametrize(
    "source", ["rows.jsonl", "notes.CSV", "data/rows.txt.gz", "~nobody-known/a", "x" * 300 + "/y.txt"]
)
def test_a_mistyped_file_is_never_looked_for_on_the_hub(source):
    with pytest.raises(CorpusError, match="there is no text at"):
        identity(source)


def test_the_identity_changes_with_what_is_read(texts, tmp_path):
    (texts / "a.txt").write_text("one")
    first = identity(texts)
    assert identity(texts) == first
    (texts / ".hidden.txt").write_text("x")
    assert identity(texts) == first
    (texts / "b.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "b.txt").write_text("two")
    second = identity(texts)
    (tmp_path / "b.txt").write_text("2nd")
    assert len({first, second, identity(texts)}) == 3


def test_a_file_that_changes_after_it_was_hashed_is_refused(texts):
    (texts / "a.txt").write_text("one")
    spec = CorpusSpec(source=str(texts))
    found = find_documents(spec)
    (texts / "a.txt").write_text("another")
    with pytest.raises(CorpusError, match="was changed while it was read"):
        list(found.texts(spec))


def test_a_bomb_is_read_as_far_as_it_is_asked_for(texts):
    with gzip.open(texts / "bomb.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b"ab \n" * (LONG_BYTES // 4))
    spec = CorpusSpec(source=str(texts))
    (text,) = find_documents(spec).texts(spec)
    assert text.first(10) == "ab \nab \nab"
    assert len(text._text) <= LONG_BYTES


def test_rows_without_the_column_are_empty_documents(texts):
    (texts / "a.jsonl").write_bytes(b'{"id": 1}\n{"id": 2, "text": "x"}\n\n{"id": 3, "text": 5e3}\n')
    assert sorted(read(texts)) == ["", "5e3", "x"]  # a number as it is written


def test_kinds_are_told_by_the_name_alone():
    assert [classify(name).kind for name in ("A.TXT", "a.Json.GZ", "a.tar.gz", "a", "a.htm", "a.zst")] == [
        *("text", "table"), *(["other"] * 4)
    ]  # fmt: skip
