"""What the pictures show: their alternative texts, their looks, and studies of before pictures.json."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from outliers.errors import BadInput
from outliers.report.content import Content
from outliers.report.figures import Look, look, look_of, paper_look
from outliers.report.heat_map import heat_map
from outliers.report.kinds import kind_table
from outliers.report.layer_plots import largest_by_layer, trajectories
from outliers.report.paper import check_formats, check_width, make_figures
from outliers.report.report import make_page, make_plots, read_content
from outliers.report.token_plots import kinds, massive_surface, position_shares
from tests.support.planted import example, planted, write_results


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".parquet")}


def content_of(folder: Path) -> Content:
    return read_content(read_files(folder))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Feature 3 is systematic; resid was not read."""
    folder = tmp_path_factory.mktemp("plain")
    write_results(folder, example())
    return folder


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    """The same with resid: feature 2 is massive, feature 3 grows from layer to layer."""
    folder = tmp_path_factory.mktemp("residual")
    acts = example() | planted(("resid",), 6, 2, 64, 16)
    for layer in range(6):
        acts["resid"][layer, :, 5, 3] = -10 - layer
    acts["resid"][2, 0, 0, 2], acts["resid"][2, 1, 4, 2], acts["resid"][3, 0, 0, 2] = 1500, 1200, 900
    write_results(folder, acts)
    return folder


def test_the_heat_map_has_what_stays_below_the_magnitude(plain):
    """16 features by 6 layers; hits: 3 in all six layers, 5 in one, 9 in all six."""
    found = heat_map(content_of(plain))
    assert "16 features over 6 layers at block; 1 of them are systematic. 13 of 96 cells are hits." in found.alt
    assert "largest value is 120, in feature 9" in found.alt


def test_the_heat_map_of_before_has_hits_alone(plain):
    content = content_of(plain)
    found = heat_map(Content(content.summary, content.tokens, content.cells, None))
    assert "3 features over 6 layers" in found.alt
    assert "13 of 13 cells are hits" in found.alt


def test_each_systematic_feature_is_followed_through_resid(residual, plain):
    assert "6 layers at resid: feature 3 is largest in layer 5, 15." in trajectories(content_of(residual)).alt
    assert "at attn_in and mlp_in" in trajectories(content_of(plain)).alt
    content = content_of(plain)
    assert trajectories(Content(content.summary, content.tokens, content.cells, None)) is None


def test_the_largest_features_of_a_layer(residual, plain):
    """In layer 2 of resid 1,500 is the largest; of two sites the larger counts."""
    alt = largest_by_layer(content_of(residual)).alt
    assert "the 3 largest features" in alt
    assert "magnitude is 1,500, in layer 2" in alt
    assert "attn_in and mlp_in" in largest_by_layer(content_of(plain)).alt
    content = content_of(plain)
    before = largest_by_layer(Content(content.summary, content.tokens, content.cells, None))
    assert "the 1 largest features" in before.alt


def test_the_solid_is_of_the_layer_with_the_largest(residual, plain):
    alt = massive_surface(content_of(residual).summary).alt
    assert "2 tokens and 1 features of layer 2" in alt
    assert "is 1,500, in feature 2 at position 0 of sequence 0" in alt
    assert massive_surface(content_of(plain).summary) is None


def test_a_token_without_text_or_beyond_the_font_is_a_place(residual):
    content = content_of(residual)
    rows = [
        row.model_copy(update={"token": text})
        for row, text in zip(content.summary.massive, (None, "龍", "$x$"), strict=True)
    ]
    assert massive_surface(content.summary.model_copy(update={"massive": rows})).png[1:4] == b"PNG"


def test_kinds_are_counts_and_shares_of_all_tokens_of_a_kind(plain):
    """Every fourth of 128 tokens is a start of a word; feature 3 has hits at multiples of 3 and 4."""
    content = content_of(plain)
    where = [t for t in range(128) if t % 64 % 3 == 0 or t % 64 % 4 == 0]
    starts = sum(t % 4 == 0 for t in where)
    first, own = kind_table(content.pictures.kinds)
    assert (first.name, first.tokens) == ("all tokens", 128)
    assert [cell.count for cell in first.cells] == [0, 32, 32, 32, 0, 32]
    assert (own.name, own.tokens, own.cells[3].count) == ("feature 3", len(where), starts)
    assert own.cells[3].share == "100%"
    assert own.cells[0].share == "", "the corpus has no special token"
    assert "Feature 3:" in kinds(content).alt


def test_positions_are_shares_of_the_tokens_there(plain):
    """64 positions of 2 sequences in bins of 2: feature 3 is hit at the multiples of 3 and of 4."""
    content = content_of(plain)
    shares = position_shares(content.summary, content.tokens.features[0])
    assert shares == [100 * sum(p % 3 == 0 or p % 4 == 0 for p in (2 * b, 2 * b + 1)) / 2 for b in range(32)]
    ragged = content.summary.model_copy(
        update={"corpus": content.summary.corpus.model_copy(update={"num_tokens": 100})}
    )
    assert sum(position_shares(ragged, content.tokens.features[0])) == pytest.approx(100)


@pytest.mark.studies
def test_figures_for_a_paper(plain):
    """As wide as asked for, with text as text, no date and no program's name, in equal bytes; the page's look comes back."""
    made = make_figures(read_files(plain), ("svg", "pdf", "png"), 3.4)
    assert made == make_figures(read_files(plain), ("svg", "pdf", "png"), 3.4)
    assert look() == Look()
    names = {name.removesuffix(".svg") for name in made if name.endswith(".svg")}
    assert {"heatmap", "trajectories", "largest_by_layer", "kinds"} <= names
    assert set(made) == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf", "png")} | {"captions.md"}
    svg = made["largest_by_layer.svg"].decode()
    assert 'width="244.8pt"' in svg, "3.4 inches"
    assert ">second<" in svg, "text, not outlines"
    assert "SmolLM2" not in svg, "a paper's figure has no title"
    assert not re.search(r"<dc:date>|dc:creator|Matplotlib v", svg)
    assert b"CreationDate" not in made["heatmap.pdf"]
    assert b"Producer" not in made["heatmap.pdf"]
    with Image.open(io.BytesIO(made["kinds.png"])) as image:
        assert image.width == round(3.4 * 300)
    captions = made["captions.md"].decode()
    assert captions.count("## ") == len(names)
    assert "Sun et al. average the three largest values" in captions


def test_letters_of_a_narrow_figure_can_be_read(plain):
    """The least letters on one column of 3.4 inches are of 5.5 points or more."""
    svg = make_figures(read_files(plain), ("svg",))["heatmap.svg"].decode()
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
    assert len(sizes) > 20
    assert min(sizes) >= 5.5, "of an SVG in points a px is a point"


@pytest.mark.parametrize(("formats", "said"), [(["svg", "eps"], "'eps' is not a format"), ([], "nothing")])
def test_other_formats_are_refused(formats, said):
    with pytest.raises(BadInput, match=said):
        check_formats(formats)


@pytest.mark.parametrize("inches", [0.5, 40.0, float("nan")])
def test_other_widths_are_refused(inches):
    with pytest.raises(BadInput, match="inches"):
        check_width(inches)


def test_looks_do_not_reach_other_threads(plain):
    """A page that is drawn while figures are drawn elsewhere is the page."""
    from concurrent.futures import ThreadPoolExecutor

    files = read_files(plain)
    alone = [plot.png for plot in make_plots(files)]
    with look_of(paper_look(3.4, ())), ThreadPoolExecutor(1) as pool:
        assert [plot.png for plot in pool.submit(make_plots, files).result()] == alone


def test_the_page_of_a_study_of_before(plain):
    """Without pictures.json there is a page, with the pictures that its files can give."""
    files = {name: data for name, data in read_files(plain).items() if name != "pictures.json"}
    plots = make_plots(files)
    names = {plot.name for plot in plots}
    assert "heatmap.png" in names
    assert not names & {"kinds.png", "trajectories.png"}
    assert b"<h2>Kinds of tokens</h2>" not in make_page(files, plots, {})


def test_pictures_of_another_kind_are_refused(plain):
    files = read_files(plain)
    broken = json.loads(files["pictures.json"]) | {"schema_version": 2}
    with pytest.raises(Exception, match="schema_version 2"):
        read_content(files | {"pictures.json": json.dumps(broken).encode()})


def test_one_cell_does_not_wash_out_the_others(tmp_path):
    """A value of 100,000 beside hits of 7: their colours are far from white."""
    acts = planted(("attn_in", "mlp_in"), 10, 1, 16, 4)
    acts["attn_in"][:, 0, :, 1] = 7
    acts["attn_in"][4, 0, 0, 2] = 100_000
    write_results(tmp_path, acts)
    with Image.open(io.BytesIO(heat_map(content_of(tmp_path)).png)) as image:
        pixels = np.asarray(image.convert("RGB"), np.int64).reshape(-1, 3)
    reddish = (pixels[:, 0] > 200) & (pixels[:, 0] - pixels[:, 2] > 30) & (pixels[:, 0] - pixels[:, 2] < 150)
    assert reddish.mean() > 0.05
