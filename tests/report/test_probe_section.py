"""What the study's report says of its newest probe: from the probe's own numbers, without touching the study's."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from outliers.publish.outcome import find_finished
from outliers.publish.probes import newest_probe, place_probe
from outliers.publish.publish import fetch, publish
from outliers.publish.publishable import read_publishable
from outliers.publish.reporting import render_again, write_study
from outliers.report.probe_page import ProbeSection, prefix_rows, probe_section
from outliers.results.schema import Advice, FormatVerdict, Repair
from outliers.steps import run_analyze
from tests.quantization.test_measure import made
from tests.support import synthetic
from tests.support.html_page import Page, check_harmless
from tests.support.probed import change, probes, row

HEADING = "What can be quantized"
ROWS = [row("attn_in", 0, "int8_token", 0.03, kl=0.03)]
CHANGES = (
    change("zero 3 <b>", kind="zero", kl=2.5, group="systematic", features=[3]),
    change("zero 7", kind="zero", kl=0.02, group="random", features=[7]),
    change("int8_tensor", format="int8_tensor", kl=0.9),
    change("int8_tensor, prefix", format="int8_tensor", kl=0.2, prefix=[0]),
    change("int8_tensor, held", format="int8_tensor", kl=0.5, held=[3]),
    change("prefix", kind="prefix", kl=0.001, prefix=[0]),
)


@pytest.fixture
def study(tmp_path):
    prepared, workspace, _, _ = made(tmp_path, formats=("int8_token",))
    run_analyze(prepared, workspace, synthetic.Silent())
    write_study(prepared, workspace, synthetic.Silent())
    return prepared, workspace, workspace.study(prepared.study_id)


def place(study, number, *changes, study_id=None):
    prepared, workspace, folder = study
    own = {"study_id": study_id or prepared.study_id, "probe_id": f"{number}" * 16}
    placed = folder / "probes" / own["probe_id"]
    place_probe(probes(*changes, **own), ROWS, placed, workspace)
    os.utime(placed / "manifest.json", (number, number))
    return placed


def page_of(folder):
    html = (folder / "report.html").read_text()
    check_harmless(html)
    return html, Page(html)


def facts_of(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    numbers = {item["path"]: item["sha256"] for item in manifest["files"] if item["path"] != "report.html"}
    return {name: manifest[name] for name in ("study_id", "results_digest", "headline")} | numbers


def test_the_report_has_the_verdict_the_bars_and_what_a_prefix_does(study):
    prepared, workspace, folder = study
    before, plain = facts_of(folder), (folder / "report.html").read_bytes()
    assert HEADING not in page_of(folder)[0]
    placed = place(study, 1, *CHANGES)
    assert (folder / "report.html").read_bytes() == plain  # until it is rendered again
    assert render_again(prepared, workspace)
    html, page = page_of(folder)
    advice = json.loads((placed / "advice.json").read_text())
    assert advice["paragraph"].startswith("Measured on hub/model in float32, builtin:python-docs, ")
    # the page of the owner names the model and the corpus as he does
    own = (
        advice["paragraph"].replace("hub/model", "synthetic", 1).replace("builtin:python-docs", prepared.corpus_name, 1)
    )
    assert HEADING in page.text and " ".join(own.split()) in page.text
    assert f"{HEADING}: no format alone is within 0.05 nats a token." in page.text
    assert f"probes/{'1' * 16}/probe.html" in page.text and "more probe" not in page.text
    (verdict,) = [cells for cells in page.rows if cells and cells[0] == "int8_tensor" and "beyond" in cells[1]]
    assert verdict[2] == "0.9"
    header = next(number for number, cells in enumerate(page.rows) if "ids of the tokens" in cells)
    assert page.rows[header + 1 : header + 3] == [
        ["int8_tensor", "0", "0.9", "0.2", "30.4", "19.2"],
        ["nothing else", "0", "", "0.001", "16", "16.02"],
    ]
    # the title of a picture is the name on the page
    found = newest_probe(folder)
    named = found.probes.model_copy(update={"model": "synthetic"})
    drawn = [data for _, _, data in probe_section(named, found.advice).plots]
    assert drawn and all(data in html for data in drawn)
    assert not any(data in html for _, _, data in probe_section(found.probes, found.advice).plots)
    images = [own["alt"] for tag, own in page.tags if tag == "img"]
    assert [alt for alt in images if alt.startswith(("Bars of 2", "Bars of 3"))] == [
        "Bars of 2 changes; the largest perplexity is 56, zero 3 <b>.",
        "Bars of 3 formats; the costliest is int8_tensor with KL 0.9.",
    ]
    assert "<b>" not in html.split("</style>")[1]
    # the numbers, the ids and the digest are what they were, and the folder is whole
    assert facts_of(folder) == before
    assert find_finished(prepared, workspace)["results_digest"] == before["results_digest"]


def test_the_newest_is_shown_and_the_others_are_counted(study):
    prepared, workspace, folder = study
    place(study, 1, *CHANGES)
    place(study, 2, change("fp8_token", format="fp8_token", kl=0.004))
    render_again(prepared, workspace)
    text = page_of(folder)[1].text
    assert f"probes/{'2' * 16}/probe.html, and 1 more probe beside it." in text
    assert f"{HEADING}: fp8_token within 0.05 nats a token, all that were tried." in text
    assert "What a prefix does" not in text
    # written again from the summary it says the same
    page = (folder / "report.html").read_bytes()
    write_study(prepared, workspace, synthetic.Silent())
    assert HEADING in page_of(folder)[1].text
    shutil.rmtree(folder / "probes")
    render_again(prepared, workspace)
    assert HEADING not in page_of(folder)[1].text and (folder / "report.html").read_bytes() != page


@pytest.mark.parametrize("fault", ["changed", "another study's"])
def test_a_probe_that_can_not_be_believed_is_not_shown(study, fault, caplog):
    prepared, workspace, folder = study
    placed = place(study, 1, *CHANGES, study_id="e" * 16 if fault != "changed" else None)
    if fault == "changed":
        (placed / "advice.json").write_text("{}")
    assert render_again(prepared, workspace)
    assert HEADING not in page_of(folder)[1].text
    assert ("the report says nothing of a probe" in caplog.text) == (fault == "changed")


def test_a_publication_stays_what_it_is(study, tmp_path):
    prepared, _, folder = study
    target = f"file://{tmp_path}/store"
    publish(folder, target, "hub--model")
    there = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    place(study, 1, *CHANGES)
    publish(folder, target, "hub--model")
    assert HEADING in page_of(folder)[1].text
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == there
    # fetched into the folder that has the probe, the page is rendered with it
    fetch(target, "hub--model", prepared.study_id, folder)
    assert HEADING in page_of(folder)[1].text
    assert read_publishable(folder).manifest["results_digest"] == facts_of(folder)["results_digest"]


def test_a_prefix_is_compared_with_the_same_change_without_it():
    found = probes(
        change("nvfp4", format="nvfp4", kl=0.3, weights="nvfp4"),
        change(
            "nvfp4, prefix", format="nvfp4", kl=0.1, prefix=[5, 6]
        ),  # its weights are as they were: nothing to compare
        change("nvfp4 w", format="nvfp4", kl=0.2, weights="nvfp4", prefix=[5, 6]),
    )
    rows = prefix_rows(found)
    assert [(one.name, one.tokens, one.kl) for one in rows] == [("nvfp4", "5, 6", (0.3, 0.2))]


def verdict(name, kl, said, *repairs):
    """A format as a verdict has it. repairs: (what, KL, verdict)."""
    facts = {"kl_interval": None, "perplexity": 20.0, "helps": True}
    tried = [Repair(kind="rotate", what=what, kl=lower, verdict=how, **facts) for what, lower, how in repairs]
    parts = {"weights": None, "predicted_kl": None, "confirmed_interval": None, "perplexity": 20.0, "leave_alone": None}
    return FormatVerdict(format=name, confirmed_kl=kl, verdict=said, repairs=tried, **parts)


@pytest.mark.parametrize(
    ("formats", "line"),
    [
        ([], "no format was tried at all sites together."),
        ([verdict("a", None, None)], "no format was tried at all sites together."),
        ([verdict("a", 0.01, "within")], "a within 0.05 nats a token, all that were tried."),
        (
            [verdict("a", 0.01, "within"), verdict("b", 0.05, "unclear"), verdict("c", 0.9, "beyond")],
            "a within 0.05 nats a token; 1 more is beyond it; 1 too close to tell.",
        ),
        ([verdict("a", 0.05, "unclear")], "no format alone is within 0.05 nats a token; 1 too close to tell."),
        (
            [verdict("a", 0.9, "beyond", ("had64+a", 0.01, "within"), ("other", 0.02, "within"))],
            "no format alone is within 0.05 nats a token; a is with had64+a.",
        ),
        # what a repair brings within the budget is not said to be beyond it as well
        (
            [
                verdict("a", 0.01, "within"),
                verdict("b", 0.9, "beyond", ("had64+b", 0.01, "within")),
                verdict("c", 0.05, "unclear", ("had64+c", 0.01, "within")),
                verdict("d", 0.9, "beyond", ("had64+d", 0.5, "beyond")),
            ],
            "a within 0.05 nats a token; b is with had64+b; c is with had64+c; 1 more is beyond it.",
        ),
        ([verdict("a", 0.9, "beyond", ("had64+a", 0.2, "beyond"))], "no format alone is within 0.05 nats a token."),
        # what can't be told from rounding is within the budget only where its KL is
        ([verdict("a", 0.001, "indistinguishable")], "a within 0.05 nats a token, all that were tried."),
        (
            [verdict("a", 0.06, "indistinguishable")],
            "no format alone is within 0.05 nats a token; 1 too close to tell.",
        ),
        (
            [verdict(name, 0.01, "within") for name in "abcdef"]
            + [verdict("g", 1.0, "beyond"), verdict("h", 1.0, "beyond")],
            "a, b, c, d and 2 more within 0.05 nats a token; 2 more are beyond it.",
        ),
    ],
)
def test_the_answer_in_one_line(formats, line):
    advice = Advice.model_construct(formats=formats, budget=0.05)
    assert ProbeSection(None, advice, (), (), 0).line == line
