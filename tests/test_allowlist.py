"""What may leave the machine: every allowed file passes, and an activation does not, whatever it is called."""

from __future__ import annotations

import base64
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from safetensors.numpy import save as save_safetensors

from outliers.allowlist import allowed_name, check_results
from outliers.errors import ForbiddenFile, PublishRefused
from tests.results_folder import features, make_results, page, png, summary, tokens

ALLOWED = ("summary.json", "tokens.json", "features.parquet", "report.html", "run.log", "plots/plot_000.png")
ACTIVATIONS = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path / "results", manifest=False)


def refused(results: Path, *words: str, include_log: bool = True) -> None:
    """The folder is refused, with a message that holds all `words`."""
    with pytest.raises(ForbiddenFile) as caught:
        check_results(results, include_log)
    for word in words:
        assert word in str(caught.value)


def test_what_is_allowed(results: Path) -> None:
    (results / "manifest.json").write_text("{}")
    paths = [file.path for file in check_results(results, include_log=True)]
    assert paths == sorted([*ALLOWED, "plots/plot_001.png", "plots/plot_002.png"])
    assert [file.path for file in check_results(results)] == [path for path in paths if path != "run.log"]


def test_without_plots_and_report(results: Path) -> None:
    for path in [*(results / "plots").iterdir(), results / "report.html"]:
        path.unlink()
    (results / "plots").rmdir()
    assert [file.path for file in check_results(results)] == ["features.parquet", "summary.json", "tokens.json"]


@pytest.mark.parametrize("name", ["summary.json", "tokens.json", "features.parquet"])
def test_what_a_study_must_have(results: Path, name: str) -> None:
    (results / name).unlink()
    with pytest.raises(PublishRefused, match=name):
        check_results(results)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/summary.json",
        "plots",
        "plots/",
        "plots/A.png",
        "plots/a/b.png",
        "plots/../summary.json",
        "plots/.png",
        "plots/a.png\n",
        "plots/a.jpg",
        "Summary.json",
        "summary.json.gz",
        "activations.zarr",
        "../summary.json",
    ],
)
def test_names_that_are_not_allowed(name: str) -> None:
    assert not allowed_name(name)


# Activations, as the tools that hold them write them.


def zarr_chunk(tmp_path: Path) -> bytes:
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=ACTIVATIONS.shape, chunks=ACTIVATIONS.shape, dtype="float32", compressors=None
    )
    array[:] = ACTIVATIONS
    return (tmp_path / "a.zarr" / "c" / "0" / "0").read_bytes()


def torch_file(tmp_path: Path) -> bytes:
    torch.save(torch.from_numpy(ACTIVATIONS), tmp_path / "a.pt")
    return (tmp_path / "a.pt").read_bytes()


def safetensors_file(tmp_path: Path) -> bytes:
    return save_safetensors({"activations": ACTIVATIONS})


def zero_safetensors(tmp_path: Path) -> bytes:
    # all ASCII and NUL: valid UTF-8
    return save_safetensors({"activations": np.zeros((4, 64), np.float32)})


def parquet_file(tmp_path: Path) -> bytes:
    pq.write_table(pa.table({str(n): row for n, row in enumerate(ACTIVATIONS)}), tmp_path / "a.parquet")
    return (tmp_path / "a.parquet").read_bytes()


def json_file(tmp_path: Path) -> bytes:
    return json.dumps({"schema_version": 1, "activations": ACTIVATIONS.tolist()}).encode()


def base64_file(tmp_path: Path) -> bytes:
    return base64.b64encode(np.tile(ACTIVATIONS, (16, 1)).tobytes())


HOLDERS = [zarr_chunk, torch_file, safetensors_file, zero_safetensors, parquet_file, json_file, base64_file]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("name", [*ALLOWED, "plots/innocent.png"])
def test_activations_under_an_allowed_name(
    results: Path, tmp_path: Path, holder: Callable[[Path], bytes], name: str
) -> None:
    if (holder, name) == (json_file, "run.log"):
        pytest.skip("256 numbers as text in a log are a log")
    (results / name).write_bytes(holder(tmp_path))
    refused(results, name)


@pytest.mark.parametrize(
    "name",
    [
        "weights.pt",
        "model.safetensors",
        "c0",
        ".hidden",
        "plots/a.pt",
        "plots/c.0.0",
        "zarr.json",
        "features.parquet.bak",
    ],
)
def test_activations_under_their_own_name(results: Path, tmp_path: Path, name: str) -> None:
    (results / name).write_bytes(torch_file(tmp_path))
    refused(results, name, "allow-list")


@pytest.mark.parametrize("folder", ["activations.zarr", "plots/activations.zarr", ".zarr", "empty"])
def test_folders(results: Path, folder: str) -> None:
    (results / folder / "c" / "0").mkdir(parents=True)
    refused(results, folder, "is a folder")


@pytest.mark.parametrize("name", ["plots/extra.png", "run.log", "report.html"])
def test_symbolic_links(results: Path, tmp_path: Path, name: str) -> None:
    original = tmp_path / "original"
    original.write_bytes((results / "plots/plot_000.png").read_bytes())
    (results / name).unlink(missing_ok=True)
    (results / name).symlink_to(original)
    refused(results, name, "symbolic link", include_log=False)


def test_linked_plots_folder(results: Path, tmp_path: Path) -> None:
    (results / "plots").rename(tmp_path / "elsewhere")
    (results / "plots").symlink_to(tmp_path / "elsewhere")
    refused(results, "plots", "symbolic link")


def test_a_pipe_does_not_hang(results: Path) -> None:
    os.mkfifo(results / "plots" / "pipe.png")
    refused(results, "plots/pipe.png", "regular file")


def test_too_large_a_file(results: Path) -> None:
    (results / "plots" / "large.png").write_bytes(png(width=1_700, height=1_600))
    refused(results, "plots/large.png", "8,000,000")


def test_too_large_a_study(results: Path) -> None:
    for n in range(3):
        (results / "plots" / f"large{n}.png").write_bytes(png(n, width=1_500, height=1_250))
    refused(results, "16,000,000", "large")


class TestPng:
    @pytest.mark.parametrize(
        ("change", "word"),
        [
            (lambda data: data + b"x", "after the end"),
            (lambda data: data + data, "after the end"),
            (lambda data: data[:-20], "without an end"),
            (lambda data: data[:100] + b"\xff\xff" + data[102:], "decoded"),
            (lambda data: b"\xff\xd8\xff" + data, "does not begin"),
            (lambda data: insert(data, b"tEXt", b"k\0" + b"x" * 5_000), "text"),
            (lambda data: insert(data, b"prVt", b"xxxx"), "chunk"),
            (lambda data: insert(data, b"eXIf", b"xxxx"), "chunk"),
        ],
    )
    def test_more_than_a_picture(self, results: Path, change: Callable[[bytes], bytes], word: str) -> None:
        path = results / "plots" / "plot_000.png"
        path.write_bytes(change(path.read_bytes()))
        refused(results, "plots/plot_000.png", word)

    def test_more_data_than_pixels(self, results: Path) -> None:
        header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
        raw = b"\0ab\0cd"
        for pixels, fits in ((raw, True), (raw + b"more", False)):
            (results / "plots" / "own.png").write_bytes(assembled(header, zlib.compress(pixels)))
            if fits:
                check_results(results)
            else:
                refused(results, "own.png", "no pixels")
        (results / "plots" / "own.png").write_bytes(assembled(header, zlib.compress(raw) + b"more"))
        refused(results, "own.png")

    def test_sixteen_bits_a_pixel(self, results: Path) -> None:
        header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
        (results / "plots" / "bf16.png").write_bytes(assembled(header, zlib.compress(b"\0abcd")))
        refused(results, "bf16.png", "16 bits")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def insert(data: bytes, name: bytes, body: bytes) -> bytes:
    return data[:33] + chunk(name, body) + data[33:]


def assembled(header: bytes, pixels: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class TestParquet:
    def write(self, results: Path, table: pa.Table) -> None:
        pq.write_table(table, results / "features.parquet")

    def test_empty(self, results: Path) -> None:
        self.write(results, features().slice(0, 0))
        check_results(results)

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            (lambda t: t.append_column("extra", t["hits"]), "extra"),
            (lambda t: t.drop_columns(["std"]), "columns"),
            (lambda t: t.select(list(reversed(t.column_names))), "columns"),
            (lambda t: cast(t, "hits", pa.int32()), "hits"),
            (lambda t: cast(t, "mean", pa.float64()), "mean"),
            (lambda t: cast(t, "ladder_hits", pa.list_(pa.float64())), "ladder_hits"),
            (lambda t: pa.concat_tables([t, t]), "one each"),
            (lambda t: put(t, "layer", 0, 4), "layers from"),
            (lambda t: put(t, "feature", 0, -1), "features from"),
            (lambda t: put(t, "site", 0, "activations"), "activations"),
            (lambda t: put(t, "hits", 0, None), "nulls"),
            (lambda t: put(t, "ladder_hits", 0, list(range(500))), "ladder_hits"),
            (lambda t: put(t, "ladder_hits", 0, list(range(3_000))), "values in a column"),
            (lambda t: put(t, "mean", t.num_rows - 1, 1.0), "block"),
            (lambda t: t.replace_schema_metadata({"activations": b"x" * 70_000}), "metadata"),
        ],
    )
    def test_another_table(self, results: Path, change: Callable[[Any], Any], word: str) -> None:
        self.write(results, change(features()))
        refused(results, "features.parquet", word)

    def test_more_rows_than_the_model_has(self, results: Path) -> None:
        # 3 sites x 4 layers x 8 x 32 features
        table = pa.concat_tables([features()] * (3 * 4 * 8 * 32 // features().num_rows + 1))
        self.write(results, table)
        refused(results, "features.parquet", "3,072")

    def test_bytes_between_the_columns(self, results: Path) -> None:
        data = (results / "features.parquet").read_bytes()
        # offsets in the footer count from the start: what stands before the footer belongs to no column
        footer = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
        (results / "features.parquet").write_bytes(data[:footer] + b"x" * 70_000 + data[footer:])
        refused(results, "features.parquet", "outside of its columns")


def cast(table: Any, column: str, kind: Any) -> Any:
    index = table.schema.get_field_index(column)
    return table.set_column(index, column, table[column].cast(kind))


def put(table: Any, column: str, row: int, value: object) -> Any:
    cells = table[column].to_pylist()
    cells[row] = value
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(column), pa.array(cells, table.schema.field(column).type))


class TestJson:
    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("activations",), [0.5] * 64),
            (("model", "weights"), [0.5] * 64),
            (("model", "id"), "/home/someone/model"),
            (("model", "id"), "~/model"),
            (("corpus", "source"), "C:\\texts"),
            (("sweep", "magnitudes"), [float(n) for n in range(34)]),
            (("sweep", "counts"), {"block": {"pooled": [1] * 64}}),
            (("sweep", "counts"), {"activations": {}}),
            (("histogram", "attn_in"), {"lower_edges": [0.5, 0.25], "counts": [1, 1]}),
            (("histogram", "attn_in"), {"lower_edges": [0.5, 0.75], "counts": [0.1, 0.2]}),
            (("layers", 0, "layer"), 4),
            (("layers", 1, "layer"), 0),
            (("layers", 0, "kurtosis"), float("nan")),
            (("layers", 0, "hits"), 1.5),
            (("layers", 0, "hits"), 10**400),
            (("layers", 0, "values"), [0.5]),
            (("systematic", 0, "values"), [0.5]),
            (("systematic", 0, "layers"), [1, 0]),
            (("systematic", 0, "feature"), 3),
            (("systematic", 0, "hits"), "210"),
            (("readings", "attn_in", "legacy"), {"feature_sequence_pairs": 1, "features": []}),
            (("notes",), ["x" * 1_001]),
            (("massive",), [[0.5] * 64]),
            (("study_id",), "../elsewhere"),
            (("schema_version",), 2),
        ],
    )
    def test_summary(self, results: Path, place: tuple[str | int, ...], value: object) -> None:
        content: Any = json.loads(json.dumps(summary()))
        inner = content
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value
        (results / "summary.json").write_text(json.dumps(content))
        refused(results, "summary.json")

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("text",), False),
            (("study_id",), "another"),
            (("activations",), []),
            (("features", 0, "top"), [{"value": 0.5}] * 64),
            (("features", 0, "positions", "counts"), [0.5]),
            (("features", 0, "top", 0, "after"), "x" * 500),
            (("features", 0, "top", 0, "value"), [0.5] * 64),
        ],
    )
    def test_tokens(self, results: Path, place: tuple[str | int, ...], value: object) -> None:
        content: Any = tokens()
        inner = content
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value
        (results / "tokens.json").write_text(json.dumps(content))
        refused(results, "tokens.json")

    def test_a_key_twice(self, results: Path) -> None:
        text = json.dumps(summary())
        (results / "summary.json").write_text('{"notes": [0.5, 0.25], ' + text[1:])
        refused(results, "summary.json", "twice")

    def test_without_text(self, results: Path) -> None:
        content = tokens()
        content["text"] = False
        content["features"][0]["top"][0] |= {"token": None, "before": None, "after": None}
        (results / "tokens.json").write_text(json.dumps(content))
        check_results(results)


class TestReport:
    @pytest.mark.parametrize(
        ("addition", "word"),
        [
            ("<img src='data:image/png;base64,AAAA'>", "none of"),
            (f"<img src='data:image/png;base64,{base64.b64encode(png(99)).decode()}'>", "none of"),
            ("<img src='data:image/png;base64,A'>", "base64"),
            ("<img src='data:application/octet-stream;base64,AAAA'>", "loads"),
            ("<img src=' data:image/png;base64,AAAA'>", "loads"),
            ("<a href='data:application/octet-stream;base64,AAAA'>x</a>", "loads"),
            ("<a href='javascript:alert(1)'>x</a>", "loads"),
            ("<img src='https://example.org/a.png'>", "loads"),
            ("<img src='//example.org/a.png'>", "loads"),
            ("<img src='a.png' src=''>", "loads"),
            ("<script src='a.js'></script>", "script"),
            ("<script>1</script>", "script"),
            ("<link rel=stylesheet href='https://example.org/a.css'>", "loads"),
            ("<iframe srcdoc='x'></iframe>", "iframe"),
            ("<style>@import 'x'</style>", "style"),
            ("<style>p { background: URL(https://example.org/a.png) }</style>", "style"),
            ("<p style='background: url(data:image/png;base64,AAAA)'>x</p>", "style"),
            ("<svg><rect fill='url(https://example.org/a)'/></svg>", "fill"),
            ("<meta http-equiv=refresh content='0; url=https://example.org'>", "refresh"),
            ("<p onclick='x()'>x</p>", "script"),
            (f"<!-- {base64.b64encode(bytes(4_000)).decode()} -->", "without a space"),
            ("<p>\0</p>", "not text"),
            ("<p>" + "0.125 " * 170_000 + "</p>", "1,000,000"),
        ],
    )
    def test_more_than_a_page(self, results: Path, addition: str, word: str) -> None:
        whole = (results / "report.html").read_text()
        (results / "report.html").write_text(whole.replace("</body>", f"{addition}</body>"))
        refused(results, "report.html", word)

    def test_a_picture_that_is_no_longer_there(self, results: Path) -> None:
        (results / "plots" / "plot_001.png").unlink()
        refused(results, "report.html", "none of the 2")

    @pytest.mark.parametrize("text", ["", "<html></html>", " <!doctype html>", "PK\3\4<!doctype html>"])
    def test_no_page(self, results: Path, text: str) -> None:
        (results / "report.html").write_text(text)
        refused(results, "report.html", "doctype")

    def test_pictures_do_not_count_as_page(self, results: Path) -> None:
        pictures = [png(n, width=700, height=600) for n in range(2)]
        for n, picture in enumerate(pictures):
            (results / "plots" / f"plot_00{n}.png").write_bytes(picture)
        (results / "report.html").write_text(page(pictures))
        assert (results / "report.html").stat().st_size > 3_000_000
        check_results(results)


def test_log_that_is_too_long(results: Path) -> None:
    (results / "run.log").write_text("0.125 " * 200_000)
    refused(results, "run.log", "1,000,000")
    check_results(results, include_log=False)
