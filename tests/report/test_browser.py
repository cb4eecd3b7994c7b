"""report.html in a real browser: it says nothing, asks for nothing, fits a phone, prints, and runs no text as a script."""

from __future__ import annotations

import json
import re

import pytest

from outliers.report.report import write_report
from tests.support import chromium
from tests.support.planted import planted, write_results

pytestmark = pytest.mark.skipif(
    chromium.executable() is None, reason="no Chromium here: `make test-browser` installs one and runs this"
)
# a table that is wider than its frame can be scrolled, but neither read at a glance nor printed
CUT_TABLES = (
    "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"
)
EVIL = (
    '"><script>window.pwned = 1; document.title = "pwned"</script><img src=x onerror="window.pwned = 2">'
    "</style></title><svg onload='window.pwned = 3'>javascript:window.pwned=4 \u202e\x1b[31m $\\frac{1}{0}$ {{ 7 * 7 }}"
)


def results(folder, model="SmolLM2", layers=12):
    """A report of a model with massive activations, many layers, and text around its tokens."""
    acts = planted(("attn_in", "mlp_in", "resid"), layers, 2, 32, 12)
    acts["resid"][:, :, ::4, 1] = 2000.0  # of 48 layers fewer than the 1,000 that a summary holds
    acts["attn_in"][:, :, :, 3] = -9.0
    write_results(folder, acts, model=model)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = results(tmp_path_factory.mktemp("report"), layers=48)
    write_report(folder, {"versions": {"torch": "2.9.1"}, "devices": ["cpu"]})
    return folder / "report.html"


def harmless(tab, page):
    assert tab.said == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [page.as_uri()]
    assert tab.value("document.scripts.length") == 0
    sizes = tab.value("[...document.images].map(image => image.naturalWidth)")
    assert sizes
    assert min(sizes) > 0


@pytest.mark.servers
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_says_nothing_and_asks_for_nothing(browser, page, width):
    tab = browser.open(page, width)
    harmless(tab, page)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(CUT_TABLES) == []
    headings = tab.value("[...document.querySelectorAll('h1, h2')].map(heading => heading.textContent.trim())")
    assert headings[0] == "SmolLM2"
    assert headings[1] == "The systematic features"
    assert headings[-1] == "Where this comes from"
    tab.close()


@pytest.mark.servers
def test_it_prints(browser, page):
    tab = browser.open(page, 720)  # the width between the margins of A4
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.value(CUT_TABLES) == []
    printed = tab.pdf()
    assert printed.startswith(b"%PDF")
    assert len(printed) > 50_000
    tab.close()


@pytest.mark.servers
@pytest.mark.parametrize("policy", [True, False])
def test_text_is_never_a_script(browser, tmp_path, policy):
    """A model's name, a corpus, its tokens, notes and provenance that are all markup.

    Also where nothing forbids scripts: escaping has to do without the page's content security policy.
    """
    folder = results(tmp_path)
    for name in ("summary.json", "tokens.json"):
        content = json.loads((folder / name).read_text())
        if name == "summary.json":
            name_of_model = f"a{EVIL}".replace("\\", "/")  # what the schema takes for a name
            content["model"] |= {"id": name_of_model, "architecture": EVIL, "revision": EVIL}
            content["corpus"]["source"] = name_of_model
            content["notes"] = [EVIL, "n" * 300]
            rows = content["massive"]
        else:
            rows = content["massive"] + [top for feature in content["features"] for top in feature["top"]]
        for row in rows:
            row |= {key: EVIL for key in ("token", "before", "after") if key in row}
        (folder / name).write_text(json.dumps(content))
    write_report(folder, {EVIL: EVIL})
    if not policy:
        html = (folder / "report.html").read_text("utf-8")
        bare = re.sub(r"<meta http-equiv=[^>]*>", "", html)
        assert bare != html
        (folder / "report.html").write_text(bare, "utf-8")
    tab = browser.open(folder / "report.html", 390)
    assert tab.value("document.body.textContent").count("window.pwned") >= 8
    harmless(tab, folder / "report.html")
    assert tab.value("typeof window.pwned") == "undefined"
    assert tab.value("document.title") != "pwned"
    # links within the page are its own
    outside = "img[src=x], svg[onload], a[href]:not([href^='#'])"
    assert tab.value(f'document.querySelectorAll("{outside}").length') == 0
    assert tab.value("document.documentElement.scrollWidth") <= 390
    tab.close()


@pytest.mark.servers
def test_the_browser_itself_would_tell(browser, tmp_path):
    """The same eyes on a page that does all of it: else these tests could not fail."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<title>x</title><div style='width: 900px'>wide</div><script>window.pwned = 1; console.error('no')</script>"
        "<img src='missing.png'>"
    )
    tab = browser.open(bad, 390)
    assert tab.value("typeof window.pwned") == "number"
    assert tab.said
    assert any(url.endswith("missing.png") for url in tab.requests)
    tab.close()
