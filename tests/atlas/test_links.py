"""Where a row of the atlas leads: relative beside its store, a file or a page of the hub elsewhere, nowhere from a bucket."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from outliers.atlas.links import check_base, report_link
from outliers.atlas.page import render, write_atlas_page
from outliers.atlas.table import read_atlas
from outliers.errors import BadInput
from tests.support.atlas_store import MODELS, quick_store, study

HREF = re.compile(r'<th scope="row"[^>]*>.*?<a href="([^"#][^"]*)"')


def links_of(path):
    return HREF.findall(path.read_text())


@pytest.mark.parametrize(
    "place", ["atlas.html", "store/atlas.html", "store/Qwen--Qwen3-0.6B/atlas.html", "other/atlas.html"]
)
def test_each_row_leads_to_a_file_that_is_there(tmp_path, place):
    store = tmp_path / "store"
    quick_store(store, [study(1, MODELS[0]), study(2, MODELS[1])])
    page = tmp_path / place
    page.parent.mkdir(exist_ok=True)
    write_atlas_page(page, read_atlas(f"file://{store}"))
    links = links_of(page)
    assert len(links) == 2
    for link in links:
        parts = urlsplit(link)
        # elsewhere than beside the store a link is absolute, so that the page can be moved
        assert parts.scheme == ("file" if place.startswith("other") else "")
        target = Path(unquote(parts.path))
        target = target if parts.scheme else Path(os.path.normpath(page.parent / target))
        assert target.name == "report.html"
        assert target.is_file()


def test_a_folder_with_odd_characters(tmp_path):
    store = tmp_path / "a b:c%é"
    quick_store(store, [study(1, MODELS[0])])
    write_atlas_page(tmp_path / "atlas.html", read_atlas(f"file://{store}"))
    (link,) = links_of(tmp_path / "atlas.html")
    assert urlsplit(link).scheme == ""
    assert (tmp_path / unquote(link)).is_file()


REPORT = "model/study/0123456789ab/report.html"


@pytest.mark.parametrize(
    ("store", "base", "expected"),
    [
        ("s3://bucket/atlas", None, None),
        ("s3://bucket/atlas", "https://host/runs", f"https://host/runs/{REPORT}"),
        ("file:///data", "http://host", f"http://host/{REPORT}"),
        ("hf://datasets/a/b/c", None, f"https://huggingface.co/datasets/a/b/blob/main/c/{REPORT}"),
    ],
)
def test_addresses(store, base, expected):
    assert report_link(f"{store}/{REPORT}", store, Path("/x/atlas.html"), base) == expected
    assert report_link(None, store, None, base) is None


def test_a_bucket_says_how_its_rows_get_links(tmp_path):
    quick_store(tmp_path, [study(1, MODELS[0])])
    atlas = read_atlas(f"file://{tmp_path}")
    moved = [row.model_copy(update={"report": f"s3://bucket/{REPORT}"}) for row in atlas.rows]
    html = render(type(atlas)("s3://bucket", tuple(moved), (), 0, atlas.filter))
    assert "--links" in html
    assert not HREF.findall(html)


@pytest.mark.parametrize(
    "base", ["host/x", "ftp://h/x", "https://u:p@h/x", "https://h/x?a=secret", "javascript:alert(1)"]
)
def test_what_is_no_address_is_refused(base):
    with pytest.raises(BadInput) as caught:
        check_base(base)
    assert "secret" not in str(caught.value)
    assert check_base("https://host/x/") == "https://host/x"
