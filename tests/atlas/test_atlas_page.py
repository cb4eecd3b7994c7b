"""The atlas as a page: what it says, where its points stand, that no name is ever markup."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from outliers.atlas.choose import MAX_VALUES, choices, keys
from outliers.atlas.page import render, write_atlas_page
from outliers.atlas.plots import short
from outliers.atlas.reference import PAPER
from outliers.atlas.table import Filter, groups, read_atlas
from tests.support.atlas_store import FINEWEB, MODELS, edited, evil, many, quick_store, store, study
from tests.support.html_page import Page, check_harmless

__all__ = ["store"]  # fixtures, found by name

DOTS = re.compile(r'<circle class="dot (\w+)( other)?"[^>]*><title>(\d+): ')
"""Kind, whether it is hollow, and number of each point of each chart."""
SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"


def test_the_page_says_what_is_compared_with_what(store):
    text = Page(render(read_atlas(store))).text
    assert "9 models, 12 studies" in text
    assert "counted under 4 different criteria" in text
    assert "They differ in reading, site, magnitude;" in text
    assert "the studies have 3 corpora and 3 kinds of arithmetic" in text
    one = Page(
        render(
            read_atlas(store, Filter(readings=("pooled",), magnitudes=(6.0,), dtypes=("bfloat16",), corpora=(FINEWEB,)))
        )
    )
    assert (
        "all counted under the same criteria: pooled at block: abs(x) ≥ 6 in 25% of layers and 6% of tokens" in one.text
    )
    assert "Not all alike" not in one.text


def test_one_model_with_other_corpora_and_dtypes_is_there_twice(store):
    page = Page(render(read_atlas(store)))
    rows = [row for row in page.rows if len(row) == 11 and "Qwen/Qwen3-30B-A3B" in row[1]]
    assert [row[4] for row in rows] == ["32–4", "54–6"]
    assert "16 × 2,048 tokens, bfloat16" in rows[0][10]
    assert "8 × 512 tokens, float16" in rows[1][10]


def test_partial_layers_are_told(tmp_path):
    summary = study(1, MODELS[0])
    summary["layers"] = [row for row in summary["layers"] if row["layer"] < 5]
    quick_store(tmp_path, [summary, study(2, MODELS[1])])
    text = Page(render(read_atlas(f"file://{tmp_path}"))).text
    assert "In 1 study not every layer was read" in text
    assert "5 of 28 layers × 1,024" in text
    assert "layers 0-4 of 28" in text


def test_part_of_the_layers_and_modules_named_by_hand_are_hollow(tmp_path):
    part = study(1, MODELS[0])
    part["layers"] = [row for row in part["layers"] if row["layer"] in (0, 1, 2, 9)]
    quick_store(tmp_path, [part, *(study(n, MODELS[n]) for n in (2, 3, 4, 5))])
    edited(tmp_path, 3, spec={"capture": {"site_modules": ["attn_in=layers.*.norm"], "layers": "all"}})
    html = render(read_atlas(f"file://{tmp_path}"))
    others = {place for _, other, place in DOTS.findall(html) if other}
    assert others == {"1", "3"}
    text = Page(html).text
    assert "the studies have 3 choices of layers or modules, on which a number depends too. Most, 3 of 5, read" in text
    assert "layers 0-2,9 of 28" in text
    assert "attn_in=layers.*.norm" in text


def test_the_page_loads_nothing_and_is_the_same_every_time(store, tmp_path):
    for name in ("a.html", "b.html"):
        write_atlas_page(tmp_path / name, read_atlas(store))
    html = (tmp_path / "a.html").read_text("utf-8")
    assert html == (tmp_path / "b.html").read_text("utf-8")
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    check_harmless(html)
    assert not re.search(r"(?:https?:)?//(?!\S*</code>)[a-z]", html.replace("file://", ""))


def charts_of(html):
    """Every chart as (label, {row number: (x, y)}, number of the paper's points)."""
    found = []
    for svg in re.findall(r'<svg class="chart".*?</svg>', html, re.DOTALL):
        dots = re.findall(r'<circle class="dot [^"]*" cx="([\d.]+)" cy="([\d.]+)" r="4"><title>(\d+): ', svg)
        label = re.search(r'aria-label="([^"]*)"', svg)[1]
        found.append((label, {int(n): (float(x), float(y)) for x, y, n in dots}, svg.count('class="paper-point"')))
    return found


def test_points_stand_where_the_numbers_say(store):
    """Order and equality along both axes, against the rows themselves; the paper's points only under its criteria."""
    atlas = read_atlas(store)
    charts = charts_of(render(atlas))
    numbered = [row for rows in groups(atlas.rows) for row in rows]
    first = charts[:6]
    axes = [("total_parameters", 1), ("active_parameters", 1), ("perplexity", -1)]
    for (label, dots, paper), (size, direction), what in zip(
        first, axes * 2, ["num_features"] * 3 + ["layer_fraction"] * 3, strict=True
    ):
        shown = {
            n: row for n, row in enumerate(numbered[:9], 1) if None not in (getattr(row, size), getattr(row, what))
        }
        assert dots.keys() == shown.keys(), label
        assert paper == len(PAPER)
        for n, one in shown.items():
            for m, other in shown.items():
                wide = direction * (getattr(one, size) - getattr(other, size))
                high = getattr(one, what) - getattr(other, what)
                assert (dots[n][0] - dots[m][0]) * wide >= 0
                assert (dots[n][1] - dots[m][1]) * high <= 0
                assert (dots[n][0] == dots[m][0]) == (wide == 0), (label, n, m)
                assert (dots[n][1] == dots[m][1]) == (high == 0), (label, n, m)
    # magnitude 3 is not the paper's, and one study alone is set against nothing
    assert not [
        label
        for label, dots, _ in charts[6:]
        if next(n for n, row in enumerate(numbered, 1) if row.magnitude == 3) in dots
    ]


def test_what_is_not_like_most_is_hollow(store):
    """Of the nine of the first group those of another corpus or arithmetic: rows 1, 7 and 9, of which 9 has no size."""
    html = render(read_atlas(store))
    table = re.findall(r'<span class="in-cards">(\d+)&ensp;</span><i class="key (\w+)( other)?"', html)
    assert [int(place) for place, _, other in table if other] == [1, 7, 9]
    assert {place for place, kind, _ in table if kind == "moe"} == {"4", "6", "7", "8", "10"}
    dots = DOTS.findall(html)
    assert {int(place) for _, other, place in dots if other} == {1, 7}
    assert {(place, kind) for kind, _, place in dots} <= {(place, kind) for place, kind, _ in table}


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [
        ({}, True),
        ({"site": "mlp_in"}, True),
        ({"site": "resid"}, False),
        ({"magnitude": 8.0}, False),
        ({"layer_fraction": 0.3}, False),
        ({"position_fraction": 0.05}, False),
        ({"reading": "affected"}, True),
    ],
)
def test_the_reference_is_drawn_under_its_own_criteria_alone(tmp_path, changes, drawn):
    quick_store(tmp_path, [study(1, MODELS[0], **changes), study(2, MODELS[1], **changes)])
    html = render(read_atlas(f"file://{tmp_path}"))
    assert {paper for _, _, paper in charts_of(html)} == {len(PAPER) if drawn else 0}


def captions(html):
    """What stands above each chart, without tags."""
    found = re.findall(r"<figcaption>(.*?)</figcaption>", html, re.DOTALL)
    return [" ".join(re.sub(r"<[^>]*>", "", text).split()) for text in found]


def test_a_chart_says_which_studies_it_can_not_show(store, tmp_path):
    """Nine studies: one without parameters, four without perplexity, one without a feature; then a group without perplexity."""
    html = render(read_atlas(store))
    said = captions(html)
    assert said[:6] == [
        "Features by parameters 8 of 9 studies",
        "Features by active parameters 8 of 9 studies",
        "Features by perplexity 5 of 9 studies",
        "Share of layers by parameters 7 of 9 studies",
        "Share of layers by active parameters 7 of 9 studies",
        "Share of layers by perplexity 5 of 9 studies",
    ]
    # of two that are alone, each beside the reference: by parameters, and no chart of the reference by itself
    assert said[6:] == ["Features by parameters", "Share of layers by parameters"] * 2
    assert [(len(dots), paper) for _, dots, paper in charts_of(html)[6:]] == [(1, len(PAPER))] * 4


def test_what_no_study_has_is_told_and_not_drawn(tmp_path):
    """Dense models alone: their active parameters are all parameters. None measured its perplexity."""
    quick_store(tmp_path, [study(1, MODELS[0], magnitude=3.0), study(2, MODELS[1], magnitude=3.0, features=0)])
    html = render(read_atlas(f"file://{tmp_path}"))
    assert captions(html) == ["Features by parameters", "Share of layers by parameters 1 of 2 studies"]
    assert "Not drawn: by perplexity: measured by no study here (--perplexity)." in Page(html).text
    none = tmp_path / "none"
    quick_store(none, [study(n, MODELS[n], magnitude=3.0, features=0) for n in (1, 2)])
    html = render(read_atlas(f"file://{none}"))
    assert captions(html) == ["Features by parameters"]
    assert "share of layers: no study here has a systematic feature" in Page(html).text
    alone = tmp_path / "alone"
    quick_store(alone, [study(1, MODELS[0], magnitude=3.0)])
    html = render(read_atlas(f"file://{alone}"))
    assert captions(html) == []
    assert "One study, and nothing published under these criteria to set it against: no chart." in Page(html).text


def test_both_axes_are_labelled_and_points_have_names(store):
    html = render(read_atlas(store))
    svg = re.findall(r'<svg class="chart".*?</svg>', html, re.DOTALL)
    labels = [re.findall(r'<text class="label mid"[^>]*>([^<]*)</text>', chart) for chart in svg]
    assert labels[0] == ["parameters (total), log scale", "systematic features"]
    assert labels[3] == ["parameters (total), log scale", "share of layers"]
    assert labels[2][0] == "perplexity (better to the right), log scale"
    assert all(len(own) == 2 for own in labels)
    rows = dict(enumerate((row for own in groups(read_atlas(store).rows) for row in own), 1))
    written = re.findall(r'<text class="number" x="[\d.]+" y="[\d.]+">(\d+)(?: ([^<]*))?</text>', svg[0])
    assert len(written) == 8
    # a name is the model's own, and most points of this chart have room for it
    assert {int(n): name for n, name in written if name}.items() <= {
        n: row.model.rpartition("/")[2].removeprefix("builtin:") for n, row in rows.items()
    }.items()
    assert sum(bool(name) for _, name in written) >= 6


def test_texts_of_a_chart_do_not_lie_on_each_other(store):
    """By the boxes that a browser of 9 units gives: 5.4 a character at most, 9 high."""
    for svg in re.findall(r'<svg class="chart".*?</svg>', render(read_atlas(store)), re.DOTALL):
        texts = re.findall(r'<text class="(?:number|paper-name)" x="([\d.]+)" y="([\d.]+)">([^<]*)</text>', svg)
        boxes = [(float(x), float(y) - 8, float(x) + 5.3 * len(t), float(y) - 0.3, t) for x, y, t in texts]
        for number, one in enumerate(boxes):
            for other in boxes[:number]:
                apart = one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
                assert apart, (one, other)


def test_ticks_of_the_axes_stand_where_their_numbers_are(tmp_path):
    """A model with exactly as many parameters as a tick says is drawn on that tick's line."""
    models = [(f"m{n}", 10.0**n, 10.0**n, None, 16, 1024) for n in (-1, 0, 1)]
    quick_store(tmp_path, [study(n, model, features=n + 1) for n, model in enumerate(models)])
    html = render(read_atlas(f"file://{tmp_path}"))
    _, dots, _ = charts_of(html)[0]
    svg = re.search(r'<svg class="chart".*?</svg>', html, re.DOTALL)[0]
    ticks = {
        text: float(x) for x, text in re.findall(r'<text class="tick mid" x="([\d.]+)" y="[\d.]+">([^<]*)</text>', svg)
    }
    assert {name: dots[n][0] for n, name in enumerate(("100M", "1B", "10B"), 1)}.items() <= ticks.items()


@pytest.mark.parametrize(
    ("value", "said"),
    [(134_515_008, "135M"), (1.5e9, "1.5B"), (999.9e6, "1B"), (7e9, "7B"), (12, "12"), (1.2e12, "1.2T")],
)
def test_sizes_for_people(value, said):
    assert short(value) == said


def test_what_may_be_chosen_is_what_differs(store, tmp_path):
    """A box for each value of a criterion or arithmetic that studies differ in, with its number of studies."""
    html = render(read_atlas(store))
    box = r'<input type="checkbox" id="pick-([\d-]+)" autocomplete="off" checked><bdi>([^<]*)</bdi><span class="count">(\d+)<'
    boxes = {text: (key, int(count)) for key, text, count in re.findall(box, html)}
    assert {text: count for text, (_, count) in boxes.items()} == {
        "pooled": 10,
        "per_layer": 1,
        "union": 1,
        "block": 11,
        "attn_in": 1,
        "6": 11,
        "3": 1,
        "bfloat16": 10,
        "float16": 1,
        "float32": 1,
    }
    for key, _ in boxes.values():
        assert f"main:has(#pick-{key}:not(:checked)) .is-{key} {{ display: none; }}" in html
    quick_store(tmp_path, [study(1, MODELS[0]), study(2, MODELS[1])])
    alike = render(read_atlas(f"file://{tmp_path}"))
    assert "pick-" not in alike
    assert "<fieldset" not in alike


def test_too_many_values_are_no_choice():
    texts = [f"v{n}" for n in range(MAX_VALUES + 1)]
    assert choices({"a": texts, "b": texts[1:] + texts[1:2], "c": ["same"] * len(texts)})[0].name == "b"
    made = choices({"a": ["x", "y", "x"]})
    assert [(value.key, value.text, value.count) for value in made[0].values] == [("0-0", "x", 2), ("0-1", "y", 1)]
    assert keys(made, {"a": "y", "b": "x"}) == ("0-1",)
    assert keys(made, {"b": "x"}) == ()


@pytest.mark.studies
def test_a_thousand_studies_make_one_page(tmp_path):
    quick_store(tmp_path, many(1_000))
    atlas = read_atlas(f"file://{tmp_path}")
    html = render(atlas)
    assert len([row for row in Page(html).rows if len(row) == 11]) == 1_000 + len(groups(atlas.rows))
    assert sum(len(dots) for _, dots, _ in charts_of(html)[::6]) == 1_000
    assert 'class="number"' not in html  # with this many they would hide each other


def test_a_name_is_text_wherever_it_stands(tmp_path):
    atlas = read_atlas(evil(tmp_path))
    html = render(atlas)
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    # model, architecture, corpus, arithmetic, label; in the notice, the charts' titles, the list of features, what was skipped
    assert page.text.count("window.pwned = 1") >= 8
    assert html.count("<script") == 0
    check_harmless(html)
