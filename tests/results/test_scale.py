"""Magnitudes in standard deviations against brute force; what the report and notes say of scale, readings and losses."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from outliers.counting.analyze import analyze
from outliers.publish.allowlist import read_numbers
from outliers.publish.manifest import results_digest
from outliers.report.report import write_report
from outliers.results.schema import Perplexity
from outliers.results.write import perplexity, write_results
from outliers.steps import run_report
from tests.counting.test_counting import BLOCK, DTYPES, random_acts
from tests.support import results_folder, synthetic
from tests.support.cases import first_here
from tests.support.html_page import Page
from tests.support.planted import page_of

STEPS = (3.0, 6.0, 10.0, 20.0, 50.0)


def spread_of(values):
    """Standard deviation about the mean, by two plain passes."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))


@pytest.fixture(params=DTYPES)
def scaled(request, workspace):
    """A study with resid, features of 80 deviations and values that are not finite: (results folder, table, exact)."""
    acts, exact = random_acts(3, request.param, sites=(*BLOCK, "resid"), shape=(4, 3, 100), width=8)
    for site in exact:
        exact[site][1:, 0, 7, 2] = -400.0 if request.param == "float16" else -4e4
        exact[site][0, 1, 5, 3] = 30.0
    exact["resid"][3] = 2.5  # one value alone has no spread
    for site in exact:
        acts[site], exact[site] = synthetic.store(exact[site].astype(np.float32), request.param)
    prepared = synthetic.prepared_for(acts, request.param, {"site": "block", "layer_fraction": 0.5})
    synthetic.write_capture(prepared, workspace, acts)
    private = analyze(prepared, workspace, synthetic.Silent())
    return write_results(prepared, workspace), pq.read_table(private / "features.parquet").to_pylist(), exact


def test_deviations_equal_brute_force(scaled):
    folder, table, exact = scaled
    summary = json.loads((folder / "summary.json").read_text())
    float32 = summary["model"]["dtype"] == "float32"
    units = {site: np.full((4, 8), np.nan) for site in exact}
    for row in summary["layers"]:
        values = exact[row["site"]][row["layer"]]
        finite = values[np.isfinite(values)].tolist()
        if row["site"] == "resid" and row["layer"] == 3:
            assert row["standard_deviation"] is row["sd_hits"] is row["sd_features"] is None
            continue
        spread = spread_of(finite)
        assert row["standard_deviation"] == pytest.approx(spread, rel=1e-6 if float32 else 1e-13)
        if not float32:
            assert row["sd_hits"] == [sum(abs(x) >= step * spread for x in finite) for step in STEPS]
        for j in range(8):
            own = values[..., j][np.isfinite(values[..., j])]
            units[row["site"]][row["layer"], j] = np.abs(own).max() / spread
        assert row["sd_features"] == [int((units[row["site"]][row["layer"]] >= step).sum()) for step in STEPS]
    units["block"] = np.fmax(units["attn_in"], units["mlp_in"])
    assert summary["sd_ladder"]["multiples"] == list(STEPS)
    for site, own in units.items():
        reached = [(own >= step).sum(axis=0) for step in STEPS]
        assert summary["sd_ladder"]["features"][site] == [int((n >= 1).sum()) for n in reached]
        assert summary["sd_ladder"]["features_in_layers"][site] == [int((n >= 2).sum()) for n in reached]
    assert 0 < summary["sd_ladder"]["features_in_layers"]["block"][2] < summary["sd_ladder"]["features"]["block"][0]
    for row in table:
        wanted = units[row["site"]][row["layer"], row["feature"]]
        assert row["max_sd"] is None if np.isnan(wanted) else row["max_sd"] == pytest.approx(wanted, rel=1e-6)
    for row in summary["systematic"]:
        assert row["max_sd"] == pytest.approx(np.nanmax(units["block"][:, row["feature"]]), rel=1e-6)


def test_the_page_and_the_notes_say_it(scaled):
    folder, _, exact = scaled
    summary = json.loads((folder / "summary.json").read_text())
    notes = " | ".join(summary["notes"])
    assert "only add to: studies of different numbers of tokens do not compare by them; per_layer does" in notes
    assert "resid: the residual stream grows with depth, so that magnitude 6 says nothing there" in notes
    wild = sum(int((~np.isfinite(values)).sum()) for values in exact.values())
    assert f"{wild:,} values are not finite" in notes and "their tokens stay in N" in notes
    assert "3 sequences: beside a share of tokens stand the least and the largest" in notes
    text = re.sub(r"\s+", " ", Page(page_of(folder).decode()).text)
    assert "≥ 50 sd" in text and "standard deviations of a layer" in text
    assert "so that every share of tokens is lower for them" in text
    assert "by per_layer they do" in text and "bitsandbytes takes only what is above" in text
    assert "95% interval" not in text and "is no confidence interval" in text
    counts = summary["reading_counts"]["block"]
    if len(set(counts.values())) > 1:
        assert ", ".join(f"{name} {counts[name]}" for name in ("pooled", "union", "per_layer", "affected")) in text
    read_numbers(folder)


def test_where_all_features_pass_their_number_is_said_once(workspace):
    """40 features of resid: the lists end after 16, the page has one cell in the place of four."""
    values = np.random.default_rng(0).choice([-9.0, 9.0, 30.0], (4, 2, 20, 40)).astype(np.float32)
    stored = synthetic.store(values, "bfloat16")[0]
    prepared = synthetic.prepared_for({"resid": stored, "mlp_in": stored // 2}, "bfloat16", {"site": "resid"})
    synthetic.write_capture(prepared, workspace, {"resid": stored, "mlp_in": stored // 2})
    analyze(prepared, workspace, synthetic.Silent())
    folder = write_results(prepared, workspace)
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["systematic"]) == 40
    assert {how: len(rows) for how, rows in summary["readings"]["resid"].items()} == {
        "pooled": 40, "union": 16, "per_layer": 16, "affected": 16,
    }  # fmt: skip
    assert any("union at resid, per_layer at resid, affected at resid" in note for note in summary["notes"])
    write_report(folder, {})
    page = Page((folder / "report.html").read_text())
    (row,) = [row for row in page.rows if row[0] == "resid" and "by every reading" in " ".join(row)]
    assert row[1].startswith("40 of 40")
    assert "40 of the 40 features of resid pass: abs(x) >= 6 is no exception there" in page.text


def test_results_of_before_are_still_allowed(tmp_path):
    """Without the keys and the column that this version adds, and with those that it left: ends of a share of layers."""
    folder = results_folder.make_results(tmp_path, manifest=False)
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("sd_ladder", "massive_undecided"):
        del summary[key]
    del summary["intervals"]["shares"]
    lists = [summary["systematic"], *(rows for own in summary["readings"].values() for rows in own.values())]
    for rows in lists:
        for row in rows["features"] if isinstance(rows, dict) else rows:
            row.pop("max_sd", None)
            row["interval"] = {"layer_fraction": [0.5, 0.75], "position_fraction": [0.2, 0.3], "passes": 0.98}
    for row in summary["layers"]:
        for key in ("standard_deviation", "sd_hits", "sd_features"):
            del row[key]
    (folder / "summary.json").write_text(json.dumps(summary))
    table = pq.read_table(folder / "features.parquet").drop_columns(["max_sd"])
    pq.write_table(table, folder / "features.parquet", compression="zstd")
    read_numbers(folder)
    text = Page(page_of(folder).decode()).text
    assert "range over resamples of the share of tokens" in text and "95% interval" not in text
    assert "sd" not in re.findall(r"[a-z]+", text)


@pytest.mark.parametrize(
    ("nll", "tokens", "value", "loss"),
    [
        (2.5 * 400, 400, math.exp(2.5), 2.5),
        (712.25 * 8, 8, None, 712.25),  # exp would leave float64: the loss is still a number
        (math.inf, 8, None, None),
        (math.nan, 8, None, None),
    ],
)
def test_a_loss_is_kept_where_it_is_a_number(nll, tokens, value, loss):
    assert perplexity(nll, tokens).model_dump() == {"value": value, "loss": loss, "tokens": tokens}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            {"value": 17.421293, "loss": 2.857693204},
            "perplexity 17.4213 (mean loss 2.857693 nats a token), over 8 tokens",
        ),
        ({"value": None, "loss": 712.25}, "beyond float64: exp of a mean loss of 712.250000 nats"),
        ({"value": None, "loss": None}, "not a number"),
    ],
)
def test_perplexity_in_words(found, words):
    from outliers.results.answer import perplexity_words

    assert words in perplexity_words(Perplexity(**found, tokens=8))


COUNTS = {"pooled": 1, "union": 1, "per_layer": 0, "affected": 1}
SAID = "the readings disagree: pooled 1, union 1, per_layer 0, affected 1"


@pytest.mark.parametrize(
    ("counts", "said"), first_here([(COUNTS, True), (dict.fromkeys(COUNTS, 1), False), ({}, False)])
)
def test_every_headline_names_the_readings_where_they_disagree(tmp_path, counts, said):
    """The terminal, Prefect's page, `runs show` and the report; where they agree nothing is added."""
    import argparse
    import contextlib
    import io

    from rich.console import Console

    from flows.artifacts import markdown
    from flows.cli.answers import Answers
    from flows.cli.console import show_outcome
    from flows.cli.run_show import show_command
    from outliers.publish.outcome import Outcome
    from outliers.workspace import open_workspace

    row = results_folder.feature(7, 33.75)
    outcome = Outcome(
        study_id="s", capture_id="c", title="t", results="r", report="p", published=None, published_bytes=0,
        systematic=[row], cached=False, readings=counts, interval=(0, 2),
    )  # fmt: skip
    shown = io.StringIO()
    show_outcome(Answers(file=shown), outcome, 0, "by the reading pooled at block")
    head = next(line for line in shown.getvalue().splitlines() if "1 systematic outlier feature" in line)
    assert (SAID in head) == said
    assert "range over resamples of the sequences: 0 to 2" in shown.getvalue()
    assert (f"**T{SAID[1:]}**" in markdown(outcome)) == said
    folder = results_folder.make_results(tmp_path / "results" / results_folder.STUDY_ID, manifest=False)
    summary = json.loads((folder / "summary.json").read_text())
    summary["reading_counts"]["block"] = counts | {"legacy": 2}
    for reading, rows in summary["readings"]["block"].items():
        if reading != "legacy":
            summary["readings"]["block"][reading] = rows[: counts.get(reading, 1)]
    summary["systematic"] = summary["systematic"][:1]
    (folder / "summary.json").write_text(json.dumps(summary))
    results_folder.finish(folder)
    assert (SAID[1:] in Page((folder / "report.html").read_text()).text) == said
    printed = io.StringIO()
    arguments = argparse.Namespace(run=results_folder.STUDY_ID, feature=None, site=None, layer=None, json=False)
    with contextlib.redirect_stdout(printed):
        show_command(open_workspace(tmp_path), arguments, Console(stderr=True))
    assert (SAID in printed.getvalue()) == said


def test_a_layer_whose_values_are_all_equal_has_results(workspace):
    """It has no deviation, and so no magnitude in deviations: null in the table, and the study is whole."""
    values = np.full((2, 2, 5, 4), 7.0, np.float32)
    values[1, 0, 0, 0] = 6.0
    acts = {"mlp_in": synthetic.store(values, "bfloat16")[0]}
    prepared = synthetic.prepared_for(acts, "bfloat16")
    synthetic.write_capture(prepared, workspace, acts)
    analyze(prepared, workspace, synthetic.Silent())
    told = run_report(prepared, workspace, synthetic.Silent())
    folder = workspace.study(prepared.study_id)
    rows = pq.read_table(folder / "features.parquet").to_pylist()
    assert {row["layer"]: row["max_sd"] is None for row in rows} == {0: True, 1: False}
    assert told["results_digest"] == results_digest(folder)
