"""The report from a results folder that is built by brute force from planted activations (`planted`)."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from outliers.errors import BadInput, WorkspaceError
from outliers.report.captions import PLOT_TEXTS
from outliers.report.figures import Plot
from outliers.report.report import write_report
from tests.support.cases import first_here
from tests.support.html_page import Page
from tests.support.planted import DRAWS, Acts, example, page_of, planted, rewrite, write_results

AT_RESID = {"massive_surface.png", "massive_positions.png"}
"""Pictures that the example does not have: resid was not captured."""
EVIL = "<script>alert(1)</script>"
PROVENANCE = {"versions": {"torch": "2.9.1", "zarr": "3.1.5"}, "devices": ["cpu"], "stages": [{"name": "extract"}]}


def read(folder: Path) -> tuple[str, Page]:
    html = (folder / "report.html").read_text("utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    write_results(folder, example())
    write_report(folder, PROVENANCE)
    return folder


def test_the_answer_comes_first(results: Path) -> None:
    html, page = read(results)
    assert html.startswith("<!doctype html>")
    assert (
        "SmolLM2 has 1 systematic outlier feature by the reading pooled at block: "
        "abs(x) ≥ 6 in at least 25% of 6 layers and 6% of 128 tokens."
    ) in page.text
    assert page.text.index("has 1 systematic") < page.text.index("Every reading, every site")
    assert "-33.75" in page.text
    assert "0-5" in page.text  # the layers of feature 3
    assert "torch" in page.text and "stages.0.name" in page.text
    assert "--sites attn_in,mlp_in,resid" in page.text


def pixels(data: bytes) -> tuple[tuple[int, int], bytes]:
    """The size of a picture in any format, and its colours."""
    with Image.open(io.BytesIO(data)) as image:
        return image.size, image.convert("RGB").tobytes()


def on_page(image: dict[str, str | None]) -> bytes:
    """The bytes of an <img>."""
    return base64.b64decode(str(image["src"]).removeprefix("data:image/webp;base64,"), validate=True)


def drawn(folder: Path) -> tuple[Plot, ...]:
    """The pictures of a report, in the order of its page."""
    files = {pixels(path.read_bytes()): path for path in (folder / "plots").iterdir()}
    found = []
    for attrs in [attrs for tag, attrs in read(folder)[1].tags if tag == "img"]:
        path = files[pixels(on_page(attrs))]
        found.append(Plot(path.name, str(attrs["alt"]), path.read_bytes()))
    return tuple(found)


def test_the_page_knows_no_order_of_provenance(results: Path) -> None:
    """A manifest sorts names: a page of what was read there is the page of what was written, byte for byte."""
    known = json.loads(json.dumps(PROVENANCE, sort_keys=True))
    assert list(known) != list(PROVENANCE)
    assert page_of(results, known, drawn(results)) == (results / "report.html").read_bytes()


def test_images_are_the_plots(results: Path) -> None:
    """Each <img> has an alternative text and the pixels of a file in plots/; each file is on the page."""
    _, page = read(results)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    inside = [on_page(image) for image in images]
    files = {path.name: path.read_bytes() for path in (results / "plots").iterdir()}
    assert set(files) == set(PLOT_TEXTS) - AT_RESID
    assert {pixels(data) for data in inside} == {pixels(data) for data in files.values()}
    assert sum(map(len, inside)) < 0.8 * sum(map(len, files.values()))
    assert all(data[12:16] == b"VP8L" and b"EXIF" not in data and b"XMP " not in data for data in inside)
    assert all(image["alt"] for image in images)
    for png in files.values():
        with Image.open(io.BytesIO(png)) as image:
            image.load()
            assert set(image.info) <= {"dpi"}  # no date, no program
        assert len(png) < 150_000


def test_the_page_loads_nothing(results: Path) -> None:
    html, page = read(results)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "srcset", "action", "poster"):
            # a place on the page itself is no load
            assert (attrs.get(name) or "data:").startswith(("data:", "#")), (tag, attrs)
    assert not re.search(r"url\(|@import|https?://", html)
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)


def test_equal_inputs_give_equal_bytes(results: Path, tmp_path: Path) -> None:
    """Two threads at once, and the report that was written before."""
    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path / str(index) for index in range(2)]
        for folder in folders:
            write_results(folder, example())
        written = list(pool.map(lambda folder: write_report(folder, PROVENANCE), folders))
    written.append(tuple(results / path.relative_to(folders[0]) for path in written[0]))
    digests = [[(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths] for paths in written]
    assert digests[0] == digests[1] == digests[2]
    drawn_plots = [name for name in PLOT_TEXTS if name not in AT_RESID]
    assert [name for name, _ in digests[0]] == [*drawn_plots, "report.html"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_text_is_escaped_wherever_it_comes_from(tmp_path: Path) -> None:
    summary = write_results(tmp_path, example() | planted(("resid",), 6, 2, 64, 16), model=f"a{EVIL}$x^{{2$")
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    nasty = {"token": EVIL, "before": f"a\n{EVIL}\u202e", "after": f'" onload="x{EVIL}'}
    for row in tokens["features"][0]["top"]:
        row.update(nasty)
    summary["corpus"]["source"], summary["model"]["architecture"], summary["notes"][0] = f"a{EVIL}", EVIL, EVIL
    at = {"layer": 1, "sequence": 0, "position": 5, "feature": 2, "value": 900.0}
    ratios = {"ratio": None, "token_median": 0.0, "token_ratio": None}
    summary["massive"], summary["massive_count"] = [{**at, "token": EVIL, **ratios}], 1
    tokens["massive"] = [{**at, **nasty}]
    rewrite(tmp_path, summary, tokens)
    write_report(tmp_path, {EVIL: {EVIL: EVIL}})
    html, page = read(tmp_path)
    assert "<script" not in html
    assert "\u202e" not in html
    assert not any(tag == "script" or any(name.startswith("on") for name in attrs) for tag, attrs in page.tags)
    # model (h1, answer), architecture, corpus, note, provenance (twice as the name, once as the value), 3 a context
    assert page.text.count(EVIL) >= 8 + 3 * (len(tokens["features"][0]["top"]) + 1)
    assert "a⏎" in page.text
    assert [attrs for tag, attrs in page.tags if tag == "mark"]


@pytest.mark.parametrize(
    ("plant", "words", "plots"),
    [
        # nothing above 3: the largest magnitude is named, and no cell of the heat map is a hit
        (lambda x: None, "No value reached abs(x) ≥ 6; the largest magnitude is 2.9, at attn_in", 5),
        # 1 of 6 layers is 16.7% (25% needed), 128 of 768 pairs are 16.7% (6% needed)
        (lambda x: x["attn_in"][0, :, :, 5].fill(7), "feature 5 (up to 7) with 16.7% of layers and 16.7% of tokens", 5),
    ],
)
def test_no_systematic_feature(tmp_path: Path, plant: Any, words: str, plots: int) -> None:
    acts = planted(("attn_in", "mlp_in"), 6, 2, 64, 16)
    plant(acts)
    write_results(tmp_path, acts)
    paths = write_report(tmp_path, {})
    _, page = read(tmp_path)
    assert "has no systematic outlier features by the reading pooled" in page.text
    assert words in page.text
    assert len(paths) == plots + 1


@pytest.mark.parametrize(
    ("reading", "words"),
    first_here(
        [
            ("pooled", "feature 4 (up to -8) with 50% of layers and 5.47% of tokens"),  # 3 * 14 / 768
            ("affected", "feature 4 (up to -8) with 50% of layers and 10.9% of tokens"),  # 14 / 128
            ("union", "feature 4 (up to -8) with 50% of layers and at least 10.9% of tokens"),
            ("per_layer", "feature 4 (up to -8) with 50% of layers; feature 2"),
        ]
    ),
)
def test_what_nearly_passed(tmp_path: Path, reading: str, words: str) -> None:
    """Feature 4 is hit at tokens 0..6 of both sequences in 3 of 6 layers; feature 2 at one token is further off."""
    acts = planted(("attn_in", "mlp_in"), 6, 2, 64, 16)
    acts["mlp_in"][2:5, :, :7, 4] = -8
    acts["attn_in"][0, 0, 0, 2] = 50
    summary = write_results(tmp_path, acts, reading=reading)
    summary["systematic"] = []  # where the reading passes it, as if the rule had been a little stricter
    rewrite(tmp_path, summary, json.loads((tmp_path / "tokens.json").read_text()) | {"features": []})
    assert f"Nearest to it: {words}" in undrawn(tmp_path).text


@pytest.mark.parametrize(
    ("sites", "layers"), [(("resid",), 6), (("resid",), 1), (("attn_in", "mlp_in"), 56), (("o_in",), 1)]
)
def test_other_shapes(tmp_path: Path, sites: tuple[str, ...], layers: int) -> None:
    acts = planted(sites, layers, 2, 32, 12)
    acts[sites[0]][:, :, ::2, 1] = 2000.0
    write_results(tmp_path, acts)
    paths = write_report(tmp_path, {})
    html, page = read(tmp_path)
    assert f"in at least 25% of {layers} layer{'' if layers == 1 else 's'} and 6% of 64 tokens" in page.text
    massive = bool(json.loads((tmp_path / "summary.json").read_text())["massive"])
    assert len(paths) == len(PLOT_TEXTS) + 1 - (0 if massive else len(AT_RESID))
    assert ("feature-sequence pairs" in page.text) == ("attn_in" in sites)
    assert ("× median" in page.text) == ("resid" in sites)
    assert ("was not captured" in page.text) == ("resid" not in sites)
    assert len(re.sub(r'base64,[^"]*', "", html)) < 300_000


def test_nonfinite_values_are_shown_at_the_top(results: Path, tmp_path: Path) -> None:
    assert "non-finite" not in read(results)[1].text
    summary = write_results(tmp_path, example())
    summary["layers"][2] |= {"nonfinite": 17, "kurtosis": None, "max_magnitude": None, "median_magnitude": None}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = render_text(tmp_path)
    assert "17 non-finite values (NaN or infinite)" in text
    assert "attn_in of layer 2: 17." in text
    assert text.index("17 non-finite") < text.index("Every reading, every site")


def test_how_sure_the_numbers_are(tmp_path: Path) -> None:
    """Feature 7 passes by the first tokens alone, feature 4 in draws with sequence 0 alone."""
    acts = planted(("attn_in", "mlp_in"), 6, 2, 64, 16)
    acts["attn_in"][0, :, :, 7] = 7
    acts["attn_in"][1:, :, 0, 7] = 50
    acts["mlp_in"][2:5, 0, ::3, 4] = -8
    summary = write_results(tmp_path, acts)
    # 7: all pairs of one layer of six, 128, and 2 first tokens in each of five; 4: 22 tokens in each of three
    assert [row["feature"] for row in summary["systematic"]] == [7, 4]
    interval = summary["systematic"][1]["interval"]
    assert interval["position_fraction"] == [0, 132 / 768] and 0 < interval["passes"] < 1
    page = undrawn(tmp_path)
    text, rows = page.text, table_rows(page)
    assert "Range over resamples of the sequences: 1 to 2." in text
    assert "95% interval" not in text
    assert rows["7"] == ["7", "50.00", "100%", "0-5", "18%", "2/2", "100%", "138", "8.7%fails without"]
    assert rows["4"][4:] == ["8.59%0–17.2%", "1/2", f"{interval['passes'] * 100:g}%", "66", "4.55%passes without"]
    assert rows["block"][1] == "21–21 w/o first"
    assert rows["mlp_in"][1] == "10–1"
    assert f"share of {DRAWS} bootstrap draws over sequences" in text


def test_one_sequence_has_no_intervals(tmp_path: Path) -> None:
    acts = planted(("attn_in", "mlp_in"), 4, 1, 32, 8)
    acts["attn_in"][:, :, ::2, 3] = 9
    assert write_results(tmp_path, acts)["intervals"] is None
    text = undrawn(tmp_path).text
    assert "has 1 systematic outlier feature" in text and "32 in 1 sequence " in text
    assert "interval" not in text and "bootstrap" not in text and "stability" not in text
    assert "Leaving out the first token of each sequence changes no number." in text


def test_studies_of_before_still_have_a_report(tmp_path: Path) -> None:
    """The keys that the first versions did not write: without them the page says less, and nothing else."""
    summary = write_results(tmp_path, with_massive())
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    for key in ("reading_counts", "without_first_tokens", "intervals", "massive_by_token", "massive_by_token_count"):
        del summary[key]
    del summary["quantile_levels"], summary["sweep"]["counts_without_first_tokens"], tokens["massive_features"]
    for rows in (summary["systematic"], *(found for own in summary["readings"].values() for found in own.values())):
        for row in rows["features"] if isinstance(rows, dict) else rows:
            row.pop("interval", None)
    for row in summary["layers"]:
        del row["quantiles"], row["mean_inf_norm"]
    rewrite(tmp_path, summary, tokens)
    text, rows = render_text(tmp_path), table_rows(read(tmp_path)[1])
    assert rows["block"][1] == str(len(summary["readings"]["block"]["pooled"]))
    assert not re.search("interval|bootstrap|stability|without the first|Leaving out|By a variant", text)
    assert "The largest, in their text" in text


def test_keys_of_newer_studies_are_passed_over(results: Path, tmp_path: Path) -> None:
    summary = write_results(tmp_path, example())
    summary["model"]["tomorrow"] = summary["tomorrow"] = summary["layers"][0]["tomorrow"] = 1
    rewrite(tmp_path, summary, json.loads((tmp_path / "tokens.json").read_text()) | {"tomorrow": []})
    assert page_of(tmp_path, PROVENANCE, drawn(results)) == (results / "report.html").read_bytes()


def test_counts_of_cut_lists_are_the_counted_ones(tmp_path: Path) -> None:
    summary = write_results(tmp_path, example())
    summary["reading_counts"]["attn_in"]["union"] = 4321
    summary["reading_counts"]["block"]["legacy"] = 1234
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    rows = table_rows(undrawn(tmp_path))
    assert rows["attn_in"][2].startswith("4,321")
    assert rows["block"][5].startswith("1,234")


def with_massive() -> Acts:
    """Feature 2 is massive at the first token in layers 1-3, at token 9 of the second sequence in layer 3."""
    acts = example() | planted(("resid",), 6, 2, 64, 16)
    acts["resid"][1:4, :, 0, 2] = 900
    acts["resid"][3, 1, 9, 2] = -800
    return acts


def test_massive_activations_are_one_line_a_token(tmp_path: Path) -> None:
    summary = write_results(tmp_path, with_massive())
    assert (summary["massive_count"], summary["massive_by_token_count"]) == (7, 7)
    text, tables = render_text(tmp_path), read(tmp_path)[1].rows
    assert "7 values at resid with abs(x) > 100" in text
    assert "1,000 times the median of the token itself: 7 values." in text
    assert ["2", "3", "66.7%", "25%", "12.5%"] in tables  # feature, tokens, first tokens, delimiters, special tokens
    lines = [row for row in tables if row[0] in ("900.00", "-800.00")]
    # feature, layers, sequence, position
    assert [row[3:7] for row in lines] == [["2", "1-3", "0", "0"], ["2", "1-3", "1", "0"], ["2", "3", "1", "9"]]
    assert "massive_positions.png" in {path.name for path in (tmp_path / "plots").iterdir()}


def table_rows(page: Page) -> dict[str, list[str]]:
    """The rows of the page's tables by the text of their first cell; the last of that name."""
    return {row[0]: row for row in page.rows}


def undrawn(folder: Path) -> Page:
    """The page of a folder without pictures: drawing them takes nine tenths of a report's time."""
    return Page(page_of(folder).decode())


def render_text(folder: Path) -> str:
    write_report(folder, {})
    return read(folder)[1].text


def test_text_that_is_not_published_is_not_there(tmp_path: Path) -> None:
    summary = write_results(tmp_path, example())
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    tokens["text"] = False
    for row in tokens["features"][0]["top"]:
        row.update(token=None, before=None, after=None)
    rewrite(tmp_path, summary, tokens)
    text = undrawn(tmp_path).text
    assert "positions only" in text
    assert "token in its text" not in text


def test_hundreds_of_features_stay_small(tmp_path: Path) -> None:
    """400 systematic features with long contexts: the page says what it leaves out and stays below 300 KB."""
    summary = write_results(tmp_path, example(layers=48, width=16, length=32))
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    one, context = summary["systematic"][0], tokens["features"][0]
    one["layers"] = list(range(0, 48, 2))
    summary["systematic"] = [{**copy.deepcopy(one), "feature": j} for j in range(400)]
    for row in context["top"]:
        row.update(token="t" * 400, before="b" * 400, after="a" * 400)
    tokens["features"] = [{**context, "feature": j} for j in range(400)]
    rewrite(tmp_path, summary, tokens)
    write_report(tmp_path, {"spec": {str(index): "x" * 5000 for index in range(900)}})
    html, page = read(tmp_path)
    assert "The 100 largest of 400" in page.text
    assert "more in manifest.json" in page.text
    assert len(re.sub(r'base64,[^"]*', "", html)) < 300_000
    assert all(path.stat().st_size < 150_000 for path in (tmp_path / "plots").iterdir())


def test_plots_of_an_earlier_report_go(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    assert (tmp_path / "plots" / "heatmap.png").exists()
    (tmp_path / "plots" / "mine.png").write_bytes(b"kept: not ours")
    write_results(tmp_path, planted(("attn_in", "mlp_in"), 6, 2, 64, 16))
    write_report(tmp_path, {})
    left = {path.name for path in (tmp_path / "plots").iterdir()}
    assert left == {*PLOT_TEXTS} - AT_RESID - {"trajectories.png", "positions.png", "kinds.png"} | {"mine.png"}


def test_unusable_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"summary\.json does not exist"):
        write_report(tmp_path, {})
    summary = write_results(tmp_path, example())
    (tmp_path / "features.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(BadInput, match="not a readable table"):
        write_report(tmp_path, {})
    (tmp_path / "summary.json").write_text(json.dumps(summary)[:-5])
    with pytest.raises(BadInput, match=r"not readable: .*Invalid JSON"):
        write_report(tmp_path, {})
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"schema_version": 2}))
    with pytest.raises(WorkspaceError, match="schema_version 2"):
        write_report(tmp_path, {})
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"criteria": {**summary["criteria"], "site": "q"}}))
    with pytest.raises(BadInput, match=r"summary\.json is not readable: criteria\.site"):
        write_report(tmp_path, {})
    assert not (tmp_path / "report.html").exists()
