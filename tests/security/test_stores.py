"""A store that others write to: what one of them puts there is skipped with a reason, and hides no other studies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.cli.command import main
from outliers.atlas.table import read_atlas
from outliers.publish.publish import model_slug
from outliers.publish.shelf import read_folders, read_store
from tests.security.stores import FILES, dump, in_time, publish_raw
from tests.support.atlas_store import MODELS, edited, finished, objects, place_of, publish_all, quick_store, study
from tests.support.results_folder import features

ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
NAME = "evil/[/red]\x1b[2J\u202emodel"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store of three studies of one model; the second is the hostile one."""
    quick_store(tmp_path / "store", [study(number, MODELS[0]) for number in (1, 2, 3)])
    return tmp_path / "store"


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
    publish_raw(tmp_path / place, put, {"summary.json": bad})
    atlas = in_time(lambda: read_atlas(f"file://{tmp_path}"))
    assert len(atlas.rows) == 1
    assert len(atlas.skipped) == 1


def test_numbers_at_their_limits_end_no_page_of_the_others(tmp_path: Path) -> None:
    """A page is of all studies at once: what one may claim must be drawn, however large."""
    from outliers.atlas.page import render

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
    """A store with a study whose name is markup and escapes, and a plain one."""
    made = study(1, (NAME, 1.0, 1.0, None, 16, 1024))
    made["notes"] = ["[/red] \x1b]0;title\x07 \u2028"]
    made["model"] |= {"architecture": NAME, "revision": NAME, "quantization": NAME}
    place, put = objects(made, {"features.parquet": dump(features())})
    publish_raw(tmp_path / "store" / place, put, {})
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
    assert "evil/[/red]\\x1b[2J\\u202emodel" in capsys.readouterr().out


def test_a_list_of_many_names_is_cut_with_a_word(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import outliers.publish.shelf
    import outliers.publish.stores.open

    monkeypatch.setattr(outliers.publish.stores.folder, "LISTED", 10)
    monkeypatch.setattr(outliers.publish.shelf, "LISTED", 10)
    for number in range(30):
        (root / f"name-{number:02}").mkdir()
    shelf = read_store(f"file://{root}", summaries=False)
    assert [item.why for item in shelf.skipped if "more than 10 names" in item.why]


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
