"""Parts of a study, extracted and analyzed apart, joined into the exact whole; what does not belong to it is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from outliers.counting.analyze import analyze
from outliers.counting.merge import merge_summaries, parse_sequences
from outliers.counting.summary_files import read_counts, read_summary
from outliers.errors import BadInput, CaptureError, CorruptCapture, SummaryMismatch
from outliers.files.sealed import seal_folder
from outliers.results.write import load_findings
from outliers.spec import StudySpec
from outliers.steps import run_analyze, run_extract, run_report
from outliers.study.prepare import prepare
from outliers.units import format_ranges
from outliers.workspace import open_workspace
from tests.counting.test_counting import BLOCK, random_acts, same_bits
from tests.counting.test_properties import assert_same_counts
from tests.support import synthetic
from tests.support.captured import llama as llama
from tests.support.captured import text as text

COMMAND = str(Path(sys.executable).with_name("outliers"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The whole of a study of seven sequences, and summaries of 0:3, 3:4 and 4:7, each in a workspace of its own."""
    acts, _ = random_acts(9, "bfloat16", sites=(*BLOCK, "resid"), shape=(3, 7, 30), width=32)
    prepared = synthetic.prepared_for(acts, "bfloat16")
    folders = {}
    for name, chosen in (("whole", None), ("a", range(3)), ("b", range(3, 4)), ("c", range(4, 7)), ("d", range(2, 5))):
        workspace = open_workspace(tmp_path_factory.mktemp(name))
        synthetic.write_capture(prepared, workspace, acts)
        folders[name] = analyze(prepared, workspace, synthetic.Silent(), sequences=chosen)
    return prepared, workspace, folders


def test_parts_make_the_whole_in_any_order(parts, tmp_path):
    prepared, _, folders = parts
    workspace = open_workspace(tmp_path)
    merged = merge_summaries([folders["c"], folders["a"], folders["b"]], workspace)
    assert (merged.sequences, merged.missing) == (tuple(range(7)), ())
    whole, found = read_summary(folders["whole"]), read_summary(merged.folder)
    same_bits(whole, found)
    for one, other in zip(
        read_counts(folders["whole"], whole.frame), read_counts(merged.folder, found.frame), strict=True
    ):
        assert_same_counts(one, other)
    merged_shares = load_findings(prepared, merged.folder).per_sequence.legacy_shares
    assert merged_shares == load_findings(prepared, folders["whole"]).per_sequence.legacy_shares


def test_what_is_missing_is_told_and_can_come_later(parts, tmp_path):
    prepared, _, folders = parts
    workspace = open_workspace(tmp_path)
    first = merge_summaries([folders["c"], folders["a"]], workspace)
    assert first.missing == (3,)
    with pytest.raises(CaptureError, match="6 of 7 sequences"):
        load_findings(prepared, first.folder)
    # the workspace's own summary is one of those that are merged
    assert merge_summaries([first.folder, folders["b"]], workspace).missing == ()
    same_bits(read_summary(folders["whole"]), read_summary(first.folder))


def test_a_sequence_that_is_in_two_is_refused(parts, tmp_path):
    _, _, folders = parts
    workspace = open_workspace(tmp_path)
    with pytest.raises(SummaryMismatch, match="sequence 2 is in both"):
        merge_summaries([folders["a"], folders["d"]], workspace)
    assert list(workspace.captures.rglob("*.npz")) == []


def test_totals_without_their_counts_are_refused(parts, tmp_path):
    """Else the whole would say that nothing is missing, with too few votes."""
    _, _, folders = parts
    torn = tmp_path / "torn"
    shutil.copytree(folders["c"], torn)
    (file,) = (torn / "sequences").glob("*.npz")
    whole = file.read_bytes()
    file.unlink()
    workspace = open_workspace(tmp_path / "w")
    given = [folders["a"], folders["b"], torn]
    words = (
        r"the totals in .*torn are of the sequences 4:7, the counts in its folder sequences of none: it is not whole"
    )
    with pytest.raises(CorruptCapture, match="torn is not what was written there: analyze those sequences again"):
        merge_summaries(given, workspace)
    seal_folder(torn)  # as if it had been written so
    with pytest.raises(CorruptCapture, match=words):
        merge_summaries(given, workspace)
    with np.load(folders["a"] / "sequences" / "0.npz") as stored:  # those of 0:3, in the place of 4:7
        np.savez(file, **stored)
    seal_folder(torn)
    with pytest.raises(
        CorruptCapture, match=r"sequences 4:7, the counts in its folder sequences of 0:3: it is not whole"
    ):
        merge_summaries(given, workspace)
    file.write_bytes(whole[:-40])
    seal_folder(torn)
    with pytest.raises(CorruptCapture, match=r"4\.npz can't be read: .*; analyze those sequences again"):
        merge_summaries(given, workspace)
    assert list(workspace.captures.rglob("*.npz")) == []
    file.write_bytes(whole)
    seal_folder(torn)
    assert merge_summaries(given, workspace).missing == ()


def test_two_who_merge_at_once_both_get_the_whole(parts, tmp_path):
    """Each removes what is there and puts its own in the place: one after the other."""
    _, _, folders = parts
    workspace, given = open_workspace(tmp_path), [folders[name] for name in "abc"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: merge_summaries(given, workspace), range(8)))
    assert [merged.missing for merged in found] == [()] * 8
    same_bits(read_summary(folders["whole"]), read_summary(found[0].folder))
    assert not list((tmp_path / "locks").iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"criteria": {"magnitude": 5.0}}, r"magnitude 6\.0 and 5\.0"),
        ({"dtype": "float16"}, "dtype bfloat16 and float16"),
        ({"model": "other"}, "model local:synthetic and local:other"),
    ],
)
def test_another_study_is_refused_and_named(parts, tmp_path, change, words):
    _, _, folders = parts
    other = tmp_path / "other"
    shutil.copytree(folders["b"], other)
    content = json.loads((other / "study.json").read_text())
    content["study_id"] = "f" * 16
    if "dtype" in change:
        content["model"]["dtype"] = change["dtype"]
    if "model" in change:
        content["model"]["source"]["id"] = f"local:{change['model']}"
    content["spec"]["criteria"] |= change.get("criteria", {})
    (other / "study.json").write_text(json.dumps(content))
    seal_folder(other)
    with pytest.raises(SummaryMismatch, match=words):
        merge_summaries([folders["a"], other], open_workspace(tmp_path / "w"))


def test_a_folder_that_is_no_summary(tmp_path):
    with pytest.raises(BadInput, match="holds no summary"):
        merge_summaries([tmp_path], open_workspace(tmp_path / "w"))


@pytest.mark.parametrize(
    ("asked", "batch", "words"),
    [
        ("3", 1, "not a range"),
        ("3:3", 1, "not a range"),
        ("0:9", 1, "not a range"),
        ("-1:2", 1, "not a range"),
        ("1:4", 2, "cuts a batch"),
    ],
)
def test_ranges_that_are_none(asked, batch, words):
    with pytest.raises(BadInput, match=words):
        parse_sequences(asked, 8, batch)


def test_ranges():
    assert parse_sequences("2:7", 7, 2) == range(2, 7)
    assert parse_sequences(None, 7, 2) is None
    assert format_ranges((0, 1, 2, 5, 7, 8), half_open=True) == "0:3, 5:6, 7:9"


class Told(synthetic.Silent):
    """Keeps the progress of the extraction: (done, total) each."""

    def __init__(self):
        self.extract = []

    def progress(self, step, done, total, unit):
        if step == "extract":
            self.extract.append((done, total))


@pytest.mark.servers
@pytest.mark.studies
def test_two_machines_and_one_give_the_same_results(tmp_path, llama, text):
    """A real model: each workspace extracts and counts its own sequences; `outliers merge` writes the whole's results."""
    spec = StudySpec.model_validate(
        {
            "model": str(llama),
            "corpus": {"source": str(text), "num_sequences": 5, "sequence_length": 16},
            "capture": {"sites": ["attn_in", "mlp_in", "resid"], "batch_sequences": 2, "perplexity": True},
            "criteria": {"magnitude": 1.0},
        }
    )
    whole = open_workspace(tmp_path / "whole")
    prepared, silent = prepare(spec, whole), synthetic.Silent()
    run_extract(prepared, whole, silent)
    run_analyze(prepared, whole, silent)
    wanted = run_report(prepared, whole, silent)["results_digest"]
    summaries = []
    for name, chosen in (("a", range(2)), ("b", range(2, 5))):
        workspace = open_workspace(tmp_path / name)
        prepare(spec, workspace)
        told = Told()
        done = run_extract(prepared, workspace, told, sequences=chosen)
        assert done["sequences"] == len(chosen)
        # what other machines have is neither done here nor to do
        assert {total for _, total in told.extract} == {16 * len(chosen)}
        assert told.extract[0][0] < 16 * len(chosen) == told.extract[-1][0]
        run_extract(prepared, workspace, told, sequences=chosen)
        assert told.extract[-1] == (16 * len(chosen), 16 * len(chosen))
        run_analyze(prepared, workspace, silent, sequences=chosen)
        with pytest.raises(CaptureError, match=f"{len(chosen)} of 5 sequences"):
            run_report(prepared, workspace, silent)
        summaries.append(workspace.summary(prepared.capture_id, prepared.study_id))
    here = open_workspace(tmp_path / "here")
    prepare(spec, here)
    command = [COMMAND, "merge", *map(str, reversed(summaries)), "--workspace", str(here.root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["study_id"] == prepared.study_id
    manifest = json.loads((Path(outcome["results"]) / "manifest.json").read_text())
    assert manifest["results_digest"] == wanted
    half = subprocess.run([*command[:3], *command[4:]], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(half.stdout)["missing"] == "0:2"
    again = subprocess.run([*command[:2], command[2], *command[2:]], capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert "is in both" in again.stderr
