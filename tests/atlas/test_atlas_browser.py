"""The atlas's page in a real browser: it fits, says nothing, asks for nothing, prints, and runs no name as a script."""

from __future__ import annotations

import re

import pytest

from outliers.atlas.page import write_atlas_page
from outliers.atlas.table import groups, read_atlas
from tests.report.test_browser import CUT_TABLES
from tests.support import chromium
from tests.support.atlas_store import evil, store

__all__ = ["store"]  # fixtures, found by name

pytestmark = pytest.mark.skipif(
    chromium.executable() is None, reason="no Chromium here: `make test-browser` installs one"
)


@pytest.fixture(scope="module")
def page(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "atlas.html"
    write_atlas_page(path, read_atlas(store))
    return path


@pytest.mark.servers
@pytest.mark.parametrize("width", [390, 800, 1280])
def test_it_fits_says_nothing_and_asks_for_nothing(browser, page, width):
    tab = browser.open(page, width)
    assert tab.said == []
    assert tab.requests == [page.as_uri()]
    opened = "document.querySelectorAll('details').forEach(e => e.open = true), "
    for before in ("", opened):  # as it opens, and with every list of features open
        assert tab.value(f"{before}document.documentElement.scrollWidth") <= width
        assert [text for text in tab.value(CUT_TABLES) if text] == []
    drawn = tab.value("[...document.querySelectorAll('svg.chart')].map(e => e.getBoundingClientRect().width)")
    assert min(drawn) > 250
    tab.close()


@pytest.mark.servers
def test_it_prints(browser, page):
    tab = browser.open(page, 720)  # the width between the margins of A4
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.value("document.documentElement.scrollWidth") <= 720
    assert tab.value(CUT_TABLES) == []
    printed = tab.pdf()
    assert printed.startswith(b"%PDF")
    assert len(printed) > 20_000
    tab.close()


SEEN = """(() => {
  const seen = query => [...document.querySelectorAll(query)].filter(e => e.getClientRects().length > 0);
  return {
    rows: seen('.models tbody tr').map(e => Number(e.cells[0].textContent)),
    points: [...new Set(seen('.chart circle.dot, .chart .number').map(e => Number.parseInt(e.textContent)))],
    whiskers: seen('.chart .whisker').length,
    sections: seen('main > section').map(e => e.id),
    told: seen('.told').length,
  };
})()"""
"""What a reader sees of the studies, by the numbers of their rows."""


def click(tab, *texts):
    """Ticks or unticks boxes by the text beside them."""
    for text in texts:
        found = "[...document.querySelectorAll('.choose label')].filter(e => e.querySelector('bdi').textContent == "
        assert tab.value(f"{found}{text!r}).map(e => e.click()).length") == 1


@pytest.mark.servers
def test_what_is_not_ticked_is_hidden(browser, page, store):
    """Rows, points, whiskers and sections: rows 1 to 9 are the first group, in float32 the last of it alone."""
    tab = browser.open(page, 1280)
    whole = tab.value(SEEN)
    numbered = dict(enumerate((row for rows in groups(read_atlas(store).rows) for row in rows), 1))
    assert whole["rows"] == list(numbered)
    assert set(whole["points"]) == {n for n, row in numbered.items() if n <= 9 and row.total_parameters} | {
        row for row in whole["points"] if row > 9
    }
    assert whole["told"] == 0
    click(tab, "float16")
    some = tab.value(SEEN)
    gone = {n for n, row in numbered.items() if row.dtype == "float16"}
    assert set(whole["rows"]) - set(some["rows"]) == set(whole["points"]) - set(some["points"]) == gone
    assert some["whiskers"] < whole["whiskers"]
    assert some["sections"] == whole["sections"]
    assert some["told"] == 1
    click(tab, "float16", "pooled")
    assert tab.value(SEEN)["rows"] == [n for n, row in numbered.items() if row.reading != "pooled"]
    click(tab, "pooled", "bfloat16")
    left = tab.value(SEEN)
    assert left["rows"] == [n for n, row in numbered.items() if row.dtype != "bfloat16"]
    assert left["sections"] == ["criteria-1"]  # the others have no row that is seen
    click(tab, "bfloat16")
    assert tab.value(SEEN) == whole
    assert tab.said == []
    tab.close()


@pytest.mark.servers
@pytest.mark.parametrize("policy", [True, False])
def test_a_name_is_never_a_script(browser, tmp_path, policy):
    """Also where nothing forbids scripts: escaping has to do without the page's content security policy."""
    path = tmp_path / "atlas.html"
    write_atlas_page(path, read_atlas(evil(tmp_path)))
    if not policy:
        html = path.read_text("utf-8")
        bare = re.sub(r"<meta http-equiv=[^>]*>", "", html)
        assert bare != html
        path.write_text(bare, "utf-8")
    tab = browser.open(path, 390)
    assert tab.said == []
    assert tab.requests == [path.as_uri()]
    assert tab.value("document.scripts.length") == 0
    assert tab.value("typeof window.pwned") == "undefined"
    assert tab.value("document.body.textContent").count("window.pwned") >= 8
    assert tab.value("document.documentElement.scrollWidth") <= 390
    tab.close()
