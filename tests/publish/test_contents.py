"""Files judged by what is in them: tables and JSON with one thing more than they may have are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.refusals import check, refused, results
from tests.support.results_folder import features, summary, tokens

__all__ = ["results"]  # the fixture, found by name


class TestParquet:
    def write(self, results: Path, table: pa.Table) -> None:
        pq.write_table(table, results / "features.parquet")

    def test_empty(self, results: Path) -> None:
        self.write(results, features().slice(0, 0))
        check(results)

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

    def test_a_layer_that_was_not_read(self, results: Path) -> None:
        content = summary()
        # the lists name layers 0, 1 and 3
        content["layers"] = [row for row in content["layers"] if row["layer"] != 2]
        (results / "summary.json").write_text(json.dumps(content))
        refused(results, "features.parquet", "rows of layer 2")

    def test_more_rows_than_the_model_has(self, results: Path) -> None:
        # 3 sites x 4 layers x 16 x 32 features
        table = pa.concat_tables([features()] * (3 * 4 * 16 * 32 // features().num_rows + 1))
        self.write(results, table)
        refused(results, "features.parquet", "6,144")

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


def changed(content: Any, place: tuple[str | int, ...], value: object) -> Any:
    """A copy of some JSON with another value in one place."""
    content = inner = json.loads(json.dumps(content))
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return content


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
            (("layers", 0, "kurtosis"), 10**400),
            (("criteria", "magnitude"), 10**400),
            (("systematic", 0, "layers"), [0, 4]),
            (("systematic", 0, "feature"), 16 * 32),
            (("readings", "block", "union", 0, "feature"), 16 * 32),
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
            (("intervals", "shares"), "of another program"),
        ],
    )
    def test_summary(self, results: Path, place: tuple[str | int, ...], value: object) -> None:
        (results / "summary.json").write_text(json.dumps(changed(summary(), place, value)))
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
        (results / "tokens.json").write_text(json.dumps(changed(tokens(), place, value)))
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
        check(results)
