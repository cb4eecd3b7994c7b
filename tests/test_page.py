"""report.html judged: a page that loads, runs or hides anything is refused."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from outliers.allowlist import check_results
from tests.refusals import refused, results
from tests.results_folder import page, png

__all__ = ["results"]  # the fixture, found by name


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
