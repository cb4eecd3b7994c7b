"""A store that others write to: what one of them puts there is skipped with a reason, and hides nobody else's studies."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import main
from flows.run_show import read_run
from outliers.atlas import read_atlas
from outliers.errors import BadInput, PublishRefused
from outliers.manifest import MAX_MANIFEST_BYTES
from outliers.parquet import open_parquet
from outliers.parquet_pages import check_pages
from outliers.publish import model_slug, publish
from outliers.published import read_folders, read_store
from outliers.targets import opened
from outliers.workspace import open_workspace
from tests.atlas_store import MODELS, edited, finished, objects, place_of, publish_all, quick_store, study
from tests.results_folder import SLUG, STUDY_ID, features, make_results

SECONDS = 60
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
NAME = "evil/[/red]\x1b[2J\u202emodel"


def in_time(do: Callable[[], Any]) -> Any:
    """What `do` gives, or raises; a test that hangs fails."""
    said: list[Any] = []

    def run() -> None:
        try:
            said.append((True, do()))
        except BaseException as error:  # noqa: BLE001 - it is raised below, in the test's own thread
            said.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert said, "it hangs"
    done, value = said[0]
    if not done:
        raise value
    return value


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store of three studies of one model; the second is the hostile one."""
    quick_store(tmp_path / "store", [study(number, MODELS[0]) for number in (1, 2, 3)])
    return tmp_path / "store"


def _large(path: Path) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.truncate(6_000_000_000)  # sparse: it takes no disk


def _bind(path: Path) -> None:
    path.unlink()
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as one:  # by a short name
        one.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def _instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.unlink()
        make(path)

    return put


# what stands where a small regular file is expected, and what is said of it
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (_instead(os.mkfifo), "a pipe, no regular file"),
    "a link to a device": (
        _instead(lambda path: path.symlink_to("/dev/zero")),
        "a symbolic link, which is not followed",
    ),
    "a link to itself": (_instead(lambda path: path.symlink_to(path.name)), "a symbolic link, which is not followed"),
    "a link to a file": (
        _instead(lambda path: path.symlink_to("/etc/passwd")),
        "a symbolic link, which is not followed",
    ),
    "a socket": (_bind, "no regular file"),
    "a folder": (_instead(Path.mkdir), "a folder, no regular file"),
    "six gigabytes": (_large, "6,000,000,000 bytes, at most"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["manifest.json", "summary.json"])
def test_what_is_no_small_regular_file_is_skipped_and_the_others_are_shown(root: Path, kind: str, name: str) -> None:
    place, (put, why) = place_of(root, 2), FILES[kind]
    put(next(place.rglob(name)))
    atlas = in_time(lambda: read_atlas(f"file://{root}"))
    assert {row.study_id for row in atlas.rows} == {f"{number:016x}" for number in (1, 3)}
    (skipped,) = atlas.skipped
    assert why in skipped.why
    assert place.name in skipped.why
    if name == "manifest.json":
        assert in_time(lambda: read_store(f"file://{root}", summaries=False)).skipped == (skipped,)


def _folder_link(root: Path, target: Path) -> None:
    (place_of(root, 1).parent / f"{9:016x}").symlink_to(target)
    (root / "a-model").symlink_to(target)


@pytest.mark.parametrize("target", [".", "..", "/dev", "nowhere", "/proc/self/root"])
def test_a_folder_that_is_a_link_is_not_walked(root: Path, target: str) -> None:
    _folder_link(root, Path(target))
    shelf = in_time(lambda: read_store(f"file://{root}", summaries=True))
    assert len(shelf.studies) == 3
    assert [item.why.rpartition("/")[2] for item in shelf.skipped] == [
        "a-model is a symbolic link, which is not followed; remove it",
        f"{9:016x} is a symbolic link, which is not followed; remove it",
    ]


def _put_manifest(root: Path, data: bytes) -> None:
    (place_of(root, 2) / "manifest.json").write_bytes(data)


def _with_value(root: Path, text: str) -> bytes:
    """The manifest with `text` in the place of its spec."""
    found = (place_of(root, 2) / "manifest.json").read_text()
    assert '"spec": {}' in found
    return found.replace('"spec": {}', f'"spec": {{"x": {text}}}').encode()


MANIFESTS: dict[str, Callable[[Path], bytes]] = {
    "nested lists": lambda root: _with_value(root, "[" * 100_000 + "]" * 100_000),
    "nested objects": lambda root: _with_value(root, '{"a":' * 900 + "1" + "}" * 900),
    "a number of many digits": lambda root: _with_value(root, "9" * 4_000),
    "NaN": lambda root: _with_value(root, "NaN"),
    "infinity": lambda root: _with_value(root, "-Infinity"),
    "beyond float64": lambda root: _with_value(root, "1e999"),
    "a key twice": lambda root: _with_value(root, '1, "x": 2'),
    "no UTF-8": lambda root: b"\xff\xfe" + _with_value(root, "1"),
    "no object": lambda root: b"[1, 2]",
    "null": lambda root: b"null",
    "nothing": lambda root: b"",
    "a headline out of bounds": lambda root: re.sub(
        rb'"num_tokens": \d+', b'"num_tokens": ' + b"9" * 39, _with_value(root, "1")
    ),
    "a negative headline": lambda root: re.sub(rb'"num_layers": \d+', b'"num_layers": -1', _with_value(root, "1")),
    "a long name": lambda root: re.sub(
        rb'"model": "[^"]*"', b'"model": "' + b"x" * 9_000 + b'"', _with_value(root, "1")
    ),
    "many files": lambda root: _with_value(root, "1").replace(b'"files": [', b'"files": [' + b"{}, " * 20_000),
    "another study": lambda root: (place_of(root, 1) / "manifest.json").read_bytes(),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_is_not_plain_is_skipped(root: Path, kind: str) -> None:
    _put_manifest(root, MANIFESTS[kind](root))
    shelf = in_time(lambda: read_store(f"file://{root}", summaries=False))
    assert len(shelf.studies) == 2
    (skipped,) = shelf.skipped
    assert len(skipped.why) <= 600
    assert len(in_time(lambda: read_atlas(f"file://{root}")).rows) == 2


SUMMARIES: dict[str, Callable[[dict[str, Any]], str]] = {
    "nested": lambda made: json.dumps(made | {"later": 1}).replace(
        '"later": 1', '"later": ' + "[" * 5_000 + "]" * 5_000
    ),
    "NaN": lambda made: json.dumps(made | {"massive_count": float("nan")}),
    "a key twice": lambda made: json.dumps(made)[:-1] + ', "schema_version": 1}',
    "a huge count": lambda made: json.dumps(made | {"massive_count": 10**30}),
    "not a study": lambda made: "[]",
    "a name of markup": lambda made: json.dumps(made | {"criteria": made["criteria"] | {"reading": "[/red]"}}),
}


@pytest.mark.parametrize("kind", SUMMARIES)
def test_a_summary_that_is_not_plain_is_skipped(tmp_path: Path, kind: str) -> None:
    quick_store(tmp_path, [study(1, MODELS[0])])
    made = study(2, MODELS[0])
    place, put = objects(made, {})
    bad = SUMMARIES[kind](made).encode()
    _publish_raw(tmp_path / place, put, {"summary.json": bad})
    atlas = in_time(lambda: read_atlas(f"file://{tmp_path}"))
    assert len(atlas.rows) == 1
    assert len(atlas.skipped) == 1


def _publish_raw(place: Path, put: dict[str, bytes], others: dict[str, bytes]) -> None:
    """Files as a hostile publisher puts them: with a manifest that names them as they are."""
    import hashlib

    manifest = json.loads(put["manifest.json"])
    named = {item["path"]: item for item in manifest["files"]}
    for path, data in others.items():
        named[path] = {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        put[f"{manifest['folder']}/{path}"] = data
    manifest["files"] = list(named.values())
    put["manifest.json"] = json.dumps(manifest).encode()
    for path, data in put.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(data)


def test_numbers_at_their_limits_end_no_page_of_the_others(tmp_path: Path) -> None:
    """A page is of all studies at once: what one may claim must be drawn, however large."""
    from outliers.atlas_page import render

    quick_store(tmp_path, [study(number, MODELS[number], perplexity=9.0) for number in range(3)])
    extremes = [
        (5e-324, 1, 0),
        (1.7e308, (1 << 63) - 1, (1 << 63) - 1),
        (0.0, 0, 0),
    ]
    for number, (value, size, massive) in enumerate(extremes, 10):
        made = study(number, MODELS[0], perplexity=1.0, massive=massive)
        made["perplexity"]["value"] = value
        made["model"] |= {"total_parameters": size, "active_parameters": size, "num_experts": size}
        for row in made["systematic"]:
            row |= {"max_magnitude": value, "min": -value, "max": value}
        quick_store(tmp_path, [made])
    atlas = in_time(lambda: read_atlas(f"file://{tmp_path}"))
    assert len(atlas.rows) + len(atlas.skipped) == 6
    assert "<!doctype html>" in in_time(lambda: render(atlas)).lower()


@pytest.fixture
def evil(tmp_path: Path) -> str:
    """A store with a study whose name is markup and escapes, beside a plain one."""
    made = study(1, (NAME, 1.0, 1.0, None, 16, 1024))
    made["notes"] = ["[/red] \x1b]0;title\x07 \u2028"]
    made["model"] |= {"architecture": NAME, "revision": NAME, "quantization": NAME}
    place, put = objects(made, {"features.parquet": dump(features())})
    _publish_raw(tmp_path / "store" / place, put, {})
    edited(tmp_path / "store", 1, spec={"label": NAME, "model": {"dtype": NAME}, "corpus": {"subset": NAME}})
    publish_all(f"file://{tmp_path}/store", [study(2, MODELS[0])])
    (tmp_path / "store" / "x\x1b[31m[red]\udcff").write_text("")
    (tmp_path / "store" / place).with_name("\u202e[bold").mkdir()
    return f"file://{tmp_path}/store"


@pytest.mark.parametrize("width", ["80", "300"])
def test_names_are_text_at_the_terminal(
    evil: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    workspace = ["--workspace", str(tmp_path / "workspace")]
    study_url = f"{evil}/{model_slug(NAME)}/{1:016x}"
    for command, code in (
        (["runs", "list", evil, *workspace], 0),
        (["runs", "list", evil, *workspace, "--json"], 0),
        (["atlas", evil, "--out", str(tmp_path / "page.html")], 0),
        (["atlas", evil, "--out", str(tmp_path / "page.html"), "--json"], 0),
        (["runs", "show", study_url, *workspace], 0),
        (["runs", "show", study_url, "--feature", "7", *workspace], 0),
        (["runs", "compare", study_url, study_url, *workspace], 2),
        (["runs", "show", "no\x1b[31m[/red]", *workspace], 2),
    ):
        assert main(command) == code, capsys.readouterr().err
        said = capsys.readouterr()
        assert not ACTS.search(said.out + said.err), (command, said)
        if command[:2] == ["runs", "list"]:
            assert f"{2:016x}" in said.out + said.err
    assert "<img" not in (tmp_path / "page.html").read_text()
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["runs", "list", evil, *workspace]) == 0
    assert "evil/[/red]\\x1b[2J\\u202emodel" in capsys.readouterr().err.replace("\n", "")


def test_a_list_of_many_names_is_cut_with_a_word(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import outliers.published
    import outliers.targets

    monkeypatch.setattr(outliers.targets, "LISTED", 10)
    monkeypatch.setattr(outliers.published, "LISTED", 10)
    for number in range(30):
        (root / f"name-{number:02}").mkdir()
    shelf = read_store(f"file://{root}", summaries=False)
    assert [item.why for item in shelf.skipped if "more than 10 names" in item.why]


# features.parquet


def dump(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "zstd", **options})
    return bytes(sink.getvalue())


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
    _publish_raw(tmp_path / "store" / place, put, {"features.parquet": BOMBS["a dictionary"]()})
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
    _publish_raw(tmp_path / "store" / place, put, {"features.parquet": dump(table)})
    with pytest.raises(BadInput, match=r"features\.parquet has"):
        read_run(f"file://{tmp_path}/store/{place}", open_workspace(tmp_path / "w"))


# a workspace's own results


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["manifest.json", "summary.json", "features.parquet", "plots/plot_000.png"])
def test_a_results_folder_is_read_as_regular_files(tmp_path: Path, kind: str, name: str) -> None:
    for number in (1, 2):
        finished(tmp_path / f"{number:016x}", study(number, MODELS[0]))
    put, why = FILES[kind]
    put(tmp_path / f"{2:016x}" / name)
    shelf = in_time(lambda: read_folders(tmp_path))
    assert [item.manifest["study_id"] for item in shelf.studies] == [f"{1:016x}"]
    (skipped,) = shelf.skipped
    assert why in skipped.why


def test_links_in_a_results_folder_are_not_followed(tmp_path: Path) -> None:
    finished(tmp_path / f"{1:016x}", study(1, MODELS[0]))
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "again").symlink_to(f"{1:016x}")
    plots = finished(tmp_path / f"{2:016x}", study(2, MODELS[0])) / "plots"
    plots.rename(tmp_path.parent / "elsewhere")
    plots.symlink_to(tmp_path.parent / "elsewhere")
    shelf = in_time(lambda: read_folders(tmp_path))
    assert len(shelf.studies) == 1
    assert len(shelf.skipped) == 3
    assert all("symbolic link, which is not followed" in item.why for item in shelf.skipped)


# publishing


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path / "results")


@pytest.mark.parametrize("step", ["model", "study", "folder", "plots"])
def test_nothing_is_published_through_a_link(tmp_path: Path, results: Path, step: str) -> None:
    target, outside = tmp_path / "atlas", tmp_path / "outside"
    outside.mkdir()
    manifest = json.loads((results / "manifest.json").read_text())
    steps = {"model": SLUG, "study": STUDY_ID, "folder": manifest["folder"], "plots": "plots"}
    place = target
    for name, part in steps.items():
        if name == step:
            place.mkdir(parents=True, exist_ok=True)
            (place / part).symlink_to(outside)
            break
        place = place / part
    with pytest.raises(PublishRefused, match="symbolic link, which is not followed"):
        in_time(lambda: publish(results, f"file://{target}", SLUG))
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "a folder"])
def test_publishing_waits_for_nothing_that_stands_in_the_place_of_a_manifest(
    tmp_path: Path, results: Path, kind: str
) -> None:
    place = tmp_path / "atlas" / SLUG / STUDY_ID
    place.mkdir(parents=True)
    (place / "manifest.json").write_bytes(b"")
    FILES[kind][0](place / "manifest.json")
    before = (place / "manifest.json").lstat()
    with pytest.raises(PublishRefused, match="remove it there"):
        in_time(lambda: publish(results, f"file://{tmp_path}/atlas", SLUG))
    assert (place / "manifest.json").lstat().st_ino == before.st_ino


def test_a_file_that_is_a_link_is_replaced_and_not_written_through(tmp_path: Path, results: Path) -> None:
    manifest = json.loads((results / "manifest.json").read_text())
    folder, victim = tmp_path / "atlas" / SLUG / STUDY_ID / manifest["folder"], tmp_path / "victim"
    folder.mkdir(parents=True)
    victim.write_text("mine")
    (folder / "summary.json").symlink_to(victim)
    publish(results, f"file://{tmp_path}/atlas", SLUG)
    assert victim.read_text() == "mine"
    assert not (folder / "summary.json").is_symlink()


def test_the_files_of_a_target_are_for_others_to_read(tmp_path: Path, results: Path) -> None:
    before = os.umask(0o022)
    try:
        publish(results, f"file://{tmp_path}/atlas", SLUG)
    finally:
        os.umask(before)
    for path in (tmp_path / "atlas").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "a//b", "", ".", "a/./b", "a\0b"])
def test_a_key_leads_nowhere_else(tmp_path: Path, key: str) -> None:
    with opened(f"file://{tmp_path}/atlas") as store:
        for do in (
            lambda: store.read(key),
            lambda: store.put(key, b"x"),
            lambda: store.create(key, b"x"),
            lambda: store.delete(key),
        ):
            with pytest.raises(BadInput):
                do()
    assert list(tmp_path.rglob("x")) == []


@pytest.mark.servers
def test_an_object_of_a_bucket_is_read_up_to_its_limit(s3_server: Any) -> None:
    from uuid import uuid4

    from tests.s3 import BUCKET, environment

    s3_server.start()
    url = f"s3://{BUCKET}/{uuid4().hex}"
    with environment(s3_server.environment()):
        place, put = objects(study(1, MODELS[0]), {})
        with opened(url) as store:
            for path, data in put.items():
                store.put(f"{place}/{path}", data)
            store.put(f"{place[:-1]}9/manifest.json", b" " * (MAX_MANIFEST_BYTES + 1))
            store.put("small", b"")
            assert store.read("small") == b""
            assert store.read("none") is None
            assert store.read(f"{place}/manifest.json", len(put["manifest.json"])) == put["manifest.json"]
            with pytest.raises(PublishRefused, match="has 12 bytes, at most 11 are read"):
                store.put("twelve", b"x" * 12)
                store.read("twelve", 11)
        shelf = read_store(url, summaries=True)
    assert len(shelf.studies) == 1
    assert [item.why for item in shelf.skipped if f"has {MAX_MANIFEST_BYTES + 1:,} bytes" in item.why]
