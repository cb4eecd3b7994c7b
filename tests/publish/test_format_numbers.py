"""quantization.parquet at the boundary: one of the numbers, part of the digest, and refused with one thing too many."""

from __future__ import annotations

import pyarrow as pa
import pytest

from outliers.errors import ForbiddenFile
from outliers.files.parquet import parquet_bytes, read_parquet
from outliers.publish.allowlist import QUANTIZATION, SUMMARY, check_numbers, read_numbers
from outliers.publish.manifest import digest_of
from outliers.publish.publishable import make_publishable
from outliers.publish.received import check_received
from outliers.publish.reporting import has_numbers, numbers_folder, write_numbers
from outliers.results.schema import QUANTIZATION_SCHEMA
from outliers.results.write import json_bytes
from outliers.steps import run_analyze
from tests.quantization.test_measure import made
from tests.support import synthetic


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(prepared, workspace, the bytes of its numbers by name)."""
    folder = tmp_path_factory.mktemp("formats")
    prepared, workspace, _, _ = made(folder, formats=("int8_token", "int8_tensor", "nvfp4"))
    run_analyze(prepared, workspace, synthetic.Silent())
    write_numbers(prepared, workspace, synthetic.Silent())
    return prepared, workspace, dict(read_numbers(numbers_folder(prepared, workspace)).files)


def test_it_is_one_of_the_numbers(study):
    prepared, workspace, files = study
    assert set(files) == {SUMMARY, "tokens.json", "features.parquet", "pictures.json", QUANTIZATION}
    assert has_numbers(prepared, workspace)
    numbers = check_received(files, prepared, workspace)
    assert numbers.files[QUANTIZATION] == files[QUANTIZATION]
    block = numbers.summary["quantization"]
    assert block == {
        "formats": ["int8_token", "int8_tensor", "nvfp4"],
        "sequences": 4,
        "tokens": 32,
        "ends": "range over sequences",
    }
    published = make_publishable(numbers, spec=prepared.public_spec(), provenance={})
    assert QUANTIZATION in {file["path"] for file in published.manifest["files"]}
    assert published.manifest["results_digest"] == digest_of(files)


def test_a_number_of_it_changes_the_digest(study):
    _, _, files = study
    table = read_parquet(files[QUANTIZATION])
    seen = {digest_of(files)}
    for name in ("tokens", "squared_error", "relative_error_low", "range"):
        column = table[name].to_pylist()
        column[0] = "all" if name == "range" else column[0] + 1
        seen.add(digest_of(files | {QUANTIZATION: parquet_bytes(put(table, name, 0, column[0]))}))
    assert len(seen) == 5


def put(table, name, row, value):
    cells = table[name].to_pylist()
    cells[row] = value
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), pa.array(cells, table.schema.field(index).type))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.append_column("extra", t["tokens"]), "columns"),
        (lambda t: t.drop_columns(["range"]), "columns"),
        (lambda t: t.set_column(5, "tokens", t["tokens"].cast(pa.int32())), "int32 in the column tokens"),
        (lambda t: pa.concat_tables([t, t]), "one each"),
        (lambda t: put(t, "site", 0, "block"), "rows of the site 'block'"),
        (lambda t: put(t, "layer", 0, 3), "rows of layer 3"),
        (lambda t: put(t, "format", 0, "secret"), "rows of the format 'secret'"),
        (lambda t: put(t, "format", 0, "fp8_token"), "rows of the format 'fp8_token'"),
        (lambda t: put(t, "range", 0, "some"), "the range 'some'"),
        (lambda t: put(t, "tokens", 0, 33), "has 33 tokens"),
        (lambda t: put(t, "tokens", 0, None), "nulls in the column tokens"),
        (lambda t: put(t, "held_out", 0, -1), "-1 held-out features"),
        (lambda t: put(t, "squared_error", 0, float("nan")), "not finite"),
        (lambda t: put(t, "squared_error", 0, -1.0), "negative square"),
        (lambda t: put(t, "relative_error", 0, 0.5), "its sums do not give"),
        (lambda t: put(t, "sqnr_db", 0, None), "its sums do not give"),
        (lambda t: put(t, "relative_error_low", 0, 0.9), "does not hold its number"),
        (lambda t: put(t, "relative_error_high", 0, None), "does not hold its number"),
        (lambda t: t.replace_schema_metadata({"activations": b"x" * 70_000}), "metadata"),
    ],
)
def test_another_table_is_refused(study, change, word):
    _, _, files = study
    table = read_parquet(files[QUANTIZATION])
    assert table.schema.equals(QUANTIZATION_SCHEMA)
    with pytest.raises(ForbiddenFile) as refused:
        check_numbers(files | {QUANTIZATION: parquet_bytes(change(table))})
    assert str(refused.value).startswith("quantization.parquet ") and word in str(refused.value)


def test_the_table_and_what_the_summary_says_of_it_go_together(study):
    prepared, workspace, files = study
    without = {name: data for name, data in files.items() if name != QUANTIZATION}
    with pytest.raises(ForbiddenFile, match=r"quantization\.parquet is missing"):
        check_numbers(without)
    summary = dict(check_numbers(files).summary)
    summary.pop("quantization")
    with pytest.raises(ForbiddenFile, match=r"summary\.json says nothing of it"):
        check_numbers(files | {SUMMARY: json_bytes(summary)})
    with pytest.raises(ValueError, match="errors of the formats"):
        check_received(without | {SUMMARY: json_bytes(summary)}, prepared, workspace)
    with pytest.raises(ForbiddenFile, match="is not readable Parquet"):
        check_numbers(files | {QUANTIZATION: b"x" * 100})
