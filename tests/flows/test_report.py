"""`outliers report`: where a page is, its pictures as files, and what is refused before anything is written."""

from __future__ import annotations

import json

import pytest

from flows.cli.command import main
from tests.support import results_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return results_folder.make_results(tmp_path_factory.mktemp("finished") / "results")


def run(capsys, tmp_path, *words):
    code = main(["report", *map(str, words), "--workspace", str(tmp_path / "workspace")])
    return code, capsys.readouterr()


def test_it_says_where_the_page_is(finished, capsys, tmp_path):
    code, said = run(capsys, tmp_path, finished)
    assert code == 0
    assert said.out.split()[-1] == str(finished / "report.html")


def test_it_writes_every_picture_and_touches_no_result(finished, capsys, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    out = tmp_path / "figures"
    code, said = run(capsys, tmp_path, finished, "--figures", "svg", "--width", "7", "--out", out, "--json")
    answer = json.loads(said.out)
    assert code == 0
    assert answer["study_id"] == results_folder.STUDY_ID
    assert sorted(answer["files"]) == sorted(map(str, out.iterdir()))
    names = {path.name for path in out.iterdir()}
    assert {"heatmap.svg", "largest_by_layer.svg", "captions.md"} <= names
    assert 'width="504pt"' in (out / "sweep.svg").read_text(), "7 inches"
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    code, said = run(capsys, tmp_path, finished, "--figures", "svg", "--out", out)
    assert code == 2
    assert "is there already; give another folder, or --force" in " ".join(said.err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--figures", "svg,eps"], "'eps' is not a format; give svg, pdf, png"),
        (["--figures", "svg", "--width", "90"], "90 inches; give 2.5 to 12"),
        (["--out", "figures"], "say which, as --figures svg,pdf"),
    ],
)
def test_slips_are_refused(finished, capsys, tmp_path, words, said):
    code, told = run(capsys, tmp_path, finished, *words)
    assert code == 2
    assert said in " ".join(told.err.split())


def test_figures_do_not_go_into_results(finished, capsys, tmp_path):
    code, told = run(capsys, tmp_path, finished, "--figures", "png", "--out", finished)
    assert code == 2
    assert "is a results folder" in " ".join(told.err.split())
    assert not (finished / "captions.md").exists()


def test_an_unknown_study_is_refused(capsys, tmp_path):
    code, told = run(capsys, tmp_path, "nothing")
    assert code == 2
    assert "nothing" in told.err
