"""The atlas as a table: every number against an oracle, like with like, filters, and the command."""

from __future__ import annotations

import json
import os

import duckdb
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from outliers.atlas.compare import compare
from outliers.atlas.page import render
from outliers.atlas.row import AtlasRow
from outliers.atlas.table import ATLAS_SCHEMA, Filter, atlas_table, groups, read_atlas, write_atlas_table
from outliers.errors import BadInput
from outliers.publish.shelf import read_study
from tests.support.atlas_store import FINEWEB, MODELS, dozen, edited, own, quick_store, store, study
from tests.support.commands import run_command
from tests.support.html_page import check_harmless

__all__ = ["own", "store"]  # fixtures, found by name


def expected(summary):
    """The columns of one study, worked out from its summary.json by hand."""
    model, corpus, rule, found = (summary[name] for name in ("model", "corpus", "criteria", "systematic"))
    row = {name: model[name] for name in ("architecture", "dtype", "total_parameters", "active_parameters")}
    row |= {name: model[name] for name in ("num_experts", "num_layers", "hidden_size", "revision")}
    row |= {name: corpus[name] for name in ("num_sequences", "sequence_length", "num_tokens", "token_sha256")}
    row |= {name: rule[name] for name in ("reading", "site", "sites", "magnitude")}
    row |= {"study_id": summary["study_id"], "model": model["id"], "corpus": corpus["source"]}
    row |= {"min_layer_fraction": rule["layer_fraction"], "min_position_fraction": rule["position_fraction"]}
    row |= {"num_features": len(found), "massive_count": summary["massive_count"]}
    ends = [None, None]
    if summary["intervals"]:
        ends = summary["intervals"]["counts"][rule["site"]][rule["reading"]]
    row |= {"num_features_low": ends[0], "num_features_high": ends[1]}
    for side in ("layer_fraction", "position_fraction"):
        values = [item[side] for item in found]
        known = bool(values) and None not in values
        row[side] = sum(values) / len(values) if known else None
        for end, index in (("low", 0), ("high", 1)):
            # a share of layers has no interval, though older studies published ends of it
            drawn = known and summary["intervals"] is not None and side == "position_fraction"
            row[f"{side}_{end}"] = sum(i["interval"][side][index] for i in found) / len(found) if drawn else None
    row["max_magnitude"] = max([item["max_magnitude"] for item in found], default=None)
    row["perplexity"] = summary.get("perplexity", {}).get("value")
    legacy = summary["readings"]["block"]["legacy"]
    row |= {"legacy_pairs": legacy["feature_sequence_pairs"], "legacy_features": len(legacy["features"])}
    pairs = [item for item in legacy["features"] for _ in range(item["sequences"])]  # one entry for each pair
    for side in ("layer_fraction", "position_fraction"):
        row[f"legacy_{side}"] = sum(item[side] for item in pairs) / len(pairs) if pairs else None
    return row


def check_columns(found, summary):
    for name, value in expected(summary).items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-12), name
        else:
            assert found[name] == value, name


def test_every_number_of_every_study(store, tmp_path):
    write_atlas_table(tmp_path / "atlas.parquet", read_atlas(store).rows)
    table = pq.read_table(tmp_path / "atlas.parquet")
    assert table.schema.equals(ATLAS_SCHEMA)
    rows = {row["study_id"]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows == 12
    for summary in dozen():
        row = rows[summary["study_id"]]
        check_columns(row, summary)
        assert [item["feature"] for item in row["features"]] == [item["feature"] for item in summary["systematic"]]
        for item, source in zip(row["features"], summary["systematic"], strict=True):
            ends = source["interval"] and source["interval"]["position_fraction"]
            assert [item["position_fraction_low"], item["position_fraction_high"]] == (ends or [None, None])
            assert item["layer_fraction_low"] is item["layer_fraction_high"] is None
        assert row["url"].startswith(f"{store}/")
        assert row["url"].endswith(summary["study_id"])
        assert read_study(row["url"]).manifest["results_digest"] == row["results_digest"]


def test_the_table_is_ordered_by_size_unknown_last(store):
    sizes = [row.total_parameters for row in read_atlas(store).rows]
    assert sizes[-1] is None
    assert sizes[:-1] == sorted(sizes[:-1])


def test_others_read_the_table(store, tmp_path):
    """pandas, polars and duckdb see the same rows, with the types that the schema says."""
    path = tmp_path / "atlas.parquet"
    write_atlas_table(path, read_atlas(store).rows)
    columns = [name for name in ATLAS_SCHEMA.names if name not in ("features", "sites")]
    tables = [pd.read_parquet(path), pl.read_parquet(path).to_pandas(), duckdb.sql(f"select * from '{path}'").df()]
    first, *others = [table[columns].astype(object).where(table[columns].notna(), None) for table in tables]
    for other in others:
        pd.testing.assert_frame_equal(first, other, check_dtype=False)
    assert duckdb.sql(f"select sum(len(features)) from '{path}'").fetchall() == [(sum(first["num_features"]),)]
    assert pl.read_parquet(path)["features"].list.len().sum() == sum(first["num_features"])
    empty = atlas_table([])
    assert empty.schema.equals(ATLAS_SCHEMA)
    assert list(AtlasRow.model_fields) == ATLAS_SCHEMA.names


def test_another_part_of_one_source_is_another_corpus(tmp_path):
    """The source and the size alone are not the text: what else was asked of it stands in the manifest."""
    quick_store(tmp_path, [study(number, MODELS[0]) for number in (1, 2, 3)])
    asked = {"source": FINEWEB, "split": "train", "packing": "joined", "bos": "auto", "seed": 0, "subset": None}
    edited(tmp_path, 1, spec={"corpus": asked})
    other = {"subset": "sample-10BT", "seed": 3, "packing": "documents", "bos": ["strange"]}
    edited(tmp_path, 2, spec={"corpus": asked | other})
    rows = {row.study_id[-1]: row for row in read_atlas(f"file://{tmp_path}").rows}
    assert [rows[n].corpus_options for n in "123"] == [None, "subset sample-10BT, seed 3, packing documents", None]
    assert rows["1"].conditions == rows["3"].conditions != rows["2"].conditions
    html = render(read_atlas(f"file://{tmp_path}"))
    assert "the studies have 2 corpora, on which a number depends too" in html
    assert "subset sample-10BT, seed 3, packing documents" in html
    assert compare([read_study(row.url) for row in rows.values()]).conditions == ("corpus_options",)


def test_a_cut_list_gives_no_mean_over_pairs(tmp_path):
    summary = study(1, MODELS[0], features=4)
    legacy = summary["readings"]["block"]["legacy"]
    legacy["features"] = legacy["features"][:3]
    quick_store(tmp_path, [summary])
    (row,) = read_atlas(f"file://{tmp_path}").rows
    assert row.legacy_pairs == legacy["feature_sequence_pairs"]
    assert row.legacy_features == 4
    assert row.legacy_layer_fraction is None


@pytest.mark.parametrize(
    ("shares", "ends", "level"),
    [
        (None, "range over resamples", None),  # studies of before do not say, and theirs were percentiles
        ("range over sequences", "range over sequences", None),
        ("95% interval", "95% interval", 0.95),
        ("of another program", "of another program", None),
    ],
)
def test_what_the_ends_of_shares_are(tmp_path, shares, ends, level):
    summary = study(1, MODELS[0])
    summary["intervals"] |= {"shares": shares} if shares else {}
    quick_store(tmp_path, [summary])
    (row,) = read_atlas(f"file://{tmp_path}").rows
    assert (row.share_ends, row.interval_level) == (ends, level)


def test_a_mean_over_a_part_of_the_features_is_none(tmp_path):
    """One feature of three has no interval: the ends of the others are no interval of the mean."""
    summary = study(1, MODELS[0])
    summary["systematic"][1]["interval"] = None
    quick_store(tmp_path, [summary])
    (row,) = read_atlas(f"file://{tmp_path}").rows
    assert row.layer_fraction is not None
    assert (row.layer_fraction_low, row.layer_fraction_high, row.position_fraction_low) == (None, None, None)


def test_what_a_newer_program_adds_is_passed_over(tmp_path):
    summary = study(1, MODELS[0])
    summary["model"]["router"] = "new"
    summary["systematic"][0]["novelty"] = [1]
    summary["systematic"][0]["interval"]["novelty"] = 1
    quick_store(tmp_path, [summary | {"novelty": {"a": 1}}])
    assert read_atlas(f"file://{tmp_path}").rows[0].num_features == 3


def test_groups_have_identical_criteria_and_none_else(store):
    found = groups(read_atlas(store).rows)
    for rows in found:
        assert len({row.criteria for row in rows}) == 1
    assert len({rows[0].criteria for rows in found}) == len(found) == 4
    assert sum(len(rows) for rows in found) == 12
    assert [len(rows) for rows in found] == [9, 1, 1, 1]


@pytest.mark.parametrize(
    "other",
    [
        {"reading": "union"},
        {"site": "attn_in"},
        {"magnitude": 8.0},
        {"layer_fraction": 0.5},
        {"position_fraction": 0.1},
    ],
    ids=lambda other: next(iter(other)),
)
def test_each_criterion_makes_a_group_of_its_own(tmp_path, other):
    quick_store(tmp_path, [study(1, MODELS[0]), study(2, MODELS[1], **other)])
    assert [len(rows) for rows in groups(read_atlas(f"file://{tmp_path}").rows)] == [1, 1]
    (name, value), *_ = other.items()
    chosen = Filter(**{f"{name}s": (value,)})
    assert [row.study_id for row in read_atlas(f"file://{tmp_path}", chosen).rows] == [f"{2:016x}"]


CHOICES = [
    (Filter(readings=("pooled",)), lambda s: s["criteria"]["reading"] == "pooled"),
    (Filter(readings=("union", "per_layer")), lambda s: s["criteria"]["reading"] != "pooled"),
    (Filter(sites=("attn_in",)), lambda s: s["criteria"]["site"] == "attn_in"),
    (Filter(magnitudes=(3.0,)), lambda s: s["criteria"]["magnitude"] == 3.0),
    (Filter(layer_fractions=(0.25,), position_fractions=(0.06,)), lambda s: True),
    (Filter(dtypes=("float16", "float32")), lambda s: s["model"]["dtype"] != "bfloat16"),
    (Filter(corpora=(FINEWEB,)), lambda s: s["corpus"]["source"] == FINEWEB),
    (Filter(min_tokens=513), lambda s: s["corpus"]["num_tokens"] > 512),
    (
        Filter(readings=("pooled",), corpora=("builtin:python-docs",), min_tokens=4096),
        lambda s: s["corpus"] and s["corpus"]["source"] == "builtin:python-docs" and s["corpus"]["num_tokens"] >= 4096,
    ),
]


@pytest.mark.parametrize(("chosen", "wanted"), CHOICES)
def test_a_filter_leaves_what_it_asks_for(store, chosen, wanted):
    atlas = read_atlas(store, chosen)
    assert {row.study_id for row in atlas.rows} == {s["study_id"] for s in dozen() if wanted(s)}
    assert len(atlas.rows) + atlas.left_out == 12
    assert chosen.words() in render(atlas)


def test_a_filter_that_nothing_passes_says_what_there_is(store):
    for chosen in (Filter(magnitudes=(7.0,)), Filter(readings=("affected",)), Filter(dtypes=("float8",))):
        with pytest.raises(BadInput, match=f"none of the 12 studies of {store} passes {chosen.words()}"):
            read_atlas(store, chosen)
    with pytest.raises(BadInput, match=r"--magnitude 3, 6;.* --dtype bfloat16, float16, float32;"):
        read_atlas(store, Filter(dtypes=("float8",), corpora=(FINEWEB,), min_tokens=10, readings=("pooled",)))


def outliers(*arguments, cwd):
    return run_command(cwd, *arguments, environment=os.environ)


@pytest.mark.servers
def test_the_command_makes_page_and_table(own, tmp_path):
    (own / "notes.txt").write_text("")
    done = outliers("atlas", own, "--out", "page.html", "--parquet", "table.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "2 of 1 model in file://" in said
    assert "2 different sets" in said
    assert "notes.txt does not belong to a published study" in done.stderr
    check_harmless((tmp_path / "page.html").read_text())
    assert pq.read_table(tmp_path / "table.parquet").num_rows == 2
    done = outliers("atlas", f"file://{own}", "--reading", "union", "--magnitude", "6,3", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (found["studies"], found["left_out"], found["parquet"]) == (1, 1, None)
    assert found["page"] == str(tmp_path / "atlas.html")
    assert found["groups"][0]["reading"] == "union"
    assert [item["url"] for item in found["skipped"]] == [f"file://{own}/notes.txt"]


@pytest.mark.servers
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "is not there, or is not a folder"),
        (["http://example.org/a"], "is s3://bucket/prefix, hf://datasets/ORG/NAME/prefix or file:///folder"),
        (["STORE", "--reading", "mean"], "--reading mean is not known"),
        (["STORE", "--reading", "pooled,legacy"], "--reading legacy never decides, so no study is of it"),
        (["STORE", "--magnitude", "six"], "'six' is not a magnitude: a number above 0"),
        (["STORE", "--magnitude", "6,nan"], "'nan' is not a magnitude"),
        (["STORE", "--layer-fraction", "25"], "'25' is not a share from 0 to 1, such as 0.25"),
        (["STORE", "--position-fraction=-0.1"], "'-0.1' is not a share from 0 to 1"),
        (["STORE", "--min-tokens=-1"], "'-1' is not a number of tokens, 0 or more"),
        (["STORE", "--dtype", ","], "',' names nothing"),
        (["STORE", "--magn", "6"], "unrecognized arguments: --magn 6"),
        (["STORE", "--magnitude", "7"], "passes --magnitude 7"),
        (["STORE", "--out", "no/such/folder.html"], "there is no folder"),
        (["STORE", "--parquet", "."], "is a folder"),
    ],
)
def test_the_command_refuses(own, tmp_path, arguments, words):
    done = outliers("atlas", *[str(own) if word == "STORE" else word for word in arguments], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert words in " ".join(done.stderr.split())
    assert not list(tmp_path.glob("*.html"))
