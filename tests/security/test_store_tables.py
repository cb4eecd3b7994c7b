"""Tables of a store: what unpacks to far more, or has another form, is refused before it is unpacked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flows.cli.command import main
from flows.cli.run_show import read_run
from outliers.errors import BadInput
from outliers.files.parquet import open_parquet
from outliers.untrusted.parquet_pages import check_pages
from outliers.workspace import open_workspace
from tests.security.stores import dump, publish_raw
from tests.support.atlas_store import MODELS, objects, study
from tests.support.results_folder import features

BOMBS: dict[str, Callable[[], bytes]] = {
    "rows": lambda: dump(pa.table({"layer": pa.array([0] * 2_000_000, pa.int32())})),
    "a dictionary": lambda: dump(
        pa.table({"site": pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), ["x" * 4_000_000])})
    ),
    "a list": lambda: dump(
        pa.table({"layer": pa.ListArray.from_arrays([0, 80_000_000], pa.array(np.zeros(80_000_000, np.int8)))})
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_table_that_unpacks_to_far_more_is_refused_before_it_is_unpacked(kind: str) -> None:
    data = BOMBS[kind]()
    assert len(data) < 100_000
    before = pa.total_allocated_bytes()
    with pytest.raises(pa.ArrowInvalid, match=r"at most|unpacks to more"):
        open_parquet(data)
    assert pa.total_allocated_bytes() - before < 1_000_000


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "none"},
        {"data_page_version": "2.0"},
        {"use_dictionary": False},
        {"write_page_index": True},
        {"write_page_checksum": True},
        {"data_page_size": 64, "row_group_size": 7},
    ],
)
def test_every_table_of_ours_is_read(options: dict[str, Any]) -> None:
    assert open_parquet(dump(features(), **options)).read().equals(features())
    assert open_parquet(dump(features().slice(0, 0), **options)).metadata.num_rows == 0


def head(unpacked: int, values: int, packed: int = 0) -> bytes:
    """The head of a data page in Thrift's compact protocol, as the format's own text says."""

    def number(value: int) -> bytes:
        value, out = value << 1, b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    own = b"\x15" + number(values) + b"\x15" + number(0) + b"\x15" + number(3) + b"\x15" + number(3) + b"\x00"
    return b"\x15" + number(0) + b"\x15" + number(unpacked) + b"\x15" + number(packed) + b"\x2c" + own + b"\x00"


def _footer(length: int) -> Any:
    """A footer that claims nothing worth a look: one column chunk of a few bytes."""
    column = SimpleNamespace(
        num_values=1,
        data_page_offset=4,
        has_dictionary_page=False,
        dictionary_page_offset=None,
        total_compressed_size=length,
        physical_type="INT32",
    )
    group = SimpleNamespace(num_columns=1, column=lambda index: column)
    return SimpleNamespace(num_row_groups=1, row_group=lambda index: group, created_by="parquet-cpp-arrow")


def test_the_heads_of_pages_are_believed_and_not_the_footer() -> None:
    check_pages(b"PAR1" + head(100, 10), _footer(len(head(100, 10))))
    for page in (head(2_000_000_000, 1), head(10, 1_000_000_000), head(10, 10_000_000) * 10):
        with pytest.raises(ValueError, match="unpacks to more"):
            check_pages(b"PAR1" + page, _footer(len(page)))
    for page in (b"\x19" * 20, b"\xff" * 20, b"\x1c" * 40, head(1, 1, packed=50), head(1, 1)[:-1]):
        with pytest.raises(ValueError, match=r"page|column"):
            check_pages(b"PAR1" + page, _footer(len(page)))


def test_a_published_bomb_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, put = objects(study(1, MODELS[0]), {})
    publish_raw(tmp_path / "store" / place, put, {"features.parquet": BOMBS["a dictionary"]()})
    assert main(["runs", "show", f"file://{tmp_path}/store/{place}", "--workspace", str(tmp_path / "w")]) == 2
    assert "unpacks to more than" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["no such column", "another type", "nulls", "another site"])
def test_a_published_table_of_another_form_is_refused_in_words(tmp_path: Path, kind: str) -> None:
    table, hits = features(), features().schema.get_field_index("hits")
    table = {
        "no such column": lambda: table.drop_columns(["hits"]),
        "another type": lambda: table.set_column(hits, "hits", table["site"]),
        "nulls": lambda: table.set_column(hits, "hits", pa.nulls(table.num_rows, pa.int64())),
        "another site": lambda: table.set_column(0, "site", pa.array(["[/red]\x1b"] * table.num_rows)),
    }[kind]()
    place, put = objects(study(1, MODELS[0]), {})
    publish_raw(tmp_path / "store" / place, put, {"features.parquet": dump(table)})
    with pytest.raises(BadInput, match=r"features\.parquet has"):
        read_run(f"file://{tmp_path}/store/{place}", open_workspace(tmp_path / "w"))
