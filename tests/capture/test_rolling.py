"""--store rolling with real models: the results of the full store, from a bounded disk, killed anywhere and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from outliers.errors import CaptureError
from outliers.spec import StudySpec
from outliers.steps import capture_exists, run_analyze, run_extract, run_report, run_state
from outliers.store.captures import list_captures
from outliers.store.journal import Journal
from outliers.store.verify import verify
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.synthetic import Silent

SEQUENCES = 9
CAPTURE = {"sites": ("attn_in", "mlp_in", "resid"), "batch_sequences": 2, "perplexity": True}
ONE_BATCH = {"store": "rolling", "store_sequences": 2, "disk_window": 1e-9}
"""The smallest window, and one batch that stays."""


class Killed(Exception):
    """The end of a process."""


def spec_of(model, text, *, packing="joined", **capture):
    return tiny.spec_for(
        model, text, sequences=SEQUENCES, length=12, capture=CAPTURE | capture, criteria={"magnitude": 1.0},
        corpus={"packing": packing},
    )  # fmt: skip


def made_in(folder, spec):
    workspace = open_workspace(folder)
    return prepare(StudySpec.model_validate(spec), workspace), workspace


def finish(prepared, workspace, pause=lambda point: None):
    """All steps of a study; the digest of its results."""
    run_extract(prepared, workspace, Silent(), pause=pause)
    run_analyze(prepared, workspace, Silent())
    return run_report(prepared, workspace, Silent())["results_digest"]


def sequences_there(prepared, workspace):
    """Every sequence that has a chunk of activations or of the experts' table."""
    chunks = (workspace.capture(prepared.capture_id) / "activations.zarr").glob("*/c.*")
    return {int(path.name.split(".")[2]) for path in chunks}


def files_of(prepared, workspace):
    """The results, byte for byte."""
    folder = workspace.study(prepared.study_id)
    names = ("summary.json", "tokens.json", "features.parquet", "experts.parquet", "router.parquet", "pictures.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


@pytest.fixture(scope="module", params=[pytest.param("Llama", marks=pytest.mark.studies), "Qwen3Moe"])
def study(request, tmp_path_factory):
    """(model, text, the digest of the full store's results, its files) of a dense model, and of one with experts."""
    place = tmp_path_factory.mktemp("rolling")
    (place / "text").mkdir()
    for number in range(12):
        (place / "text" / f"{number}.txt").write_text(
            f"Document {number}: the quick brown fox, twice.\n"[: 8 + 3 * number]
        )
    model = tiny.make_model(place / "model", request.param)
    prepared, workspace = made_in(place / "full", spec_of(model, place / "text", packing="documents"))
    return model, place / "text", finish(prepared, workspace), files_of(prepared, workspace)


def rolling_in(folder, study, **capture):
    model, text, _, _ = study
    return made_in(folder, spec_of(model, text, packing="documents", **(ONE_BATCH | capture)))


def test_the_results_are_those_of_the_full_store(study, tmp_path):
    prepared, workspace = rolling_in(tmp_path, study)
    most = []
    digest = finish(prepared, workspace, lambda point: most.append(len(sequences_there(prepared, workspace))))
    assert digest == study[2]
    assert files_of(prepared, workspace) == study[3]
    assert max(most) <= 2 + 2
    assert sequences_there(prepared, workspace) == {0, 1}
    assert run_state(prepared, workspace, Silent()) == {"capture": True, "summary": True, "results": True}
    # everything that reads a capture knows what is gone
    (held,) = list_captures(workspace)
    assert (held.done, held.counted, held.of_sequences) == (2, SEQUENCES - 2, SEQUENCES)
    checked = verify(workspace.capture(prepared.capture_id), Silent())
    assert (checked.sound, checked.done, checked.counted, checked.left, checked.unfinished) == (True, 2, 7, 0, 0)
    assert run_extract(prepared, workspace, Silent())["sequences"] == 0


def test_a_study_that_is_killed_anywhere_goes_on(study, tmp_path):
    """Each process of the study lasts one point longer than the one before; the last one comes to the end."""
    prepared, workspace = rolling_in(tmp_path, study)
    lasted, deaths, digest = 0, 0, None
    while digest is None:
        left = iter(range(lasted, -1, -1))

        def pause(point, left=left):
            if next(left, 0) == 0:
                raise Killed(point)

        try:
            digest = finish(prepared, workspace, pause)
        except Killed:
            deaths, lasted = deaths + 1, lasted + 2
            assert (
                len(sequences_there(prepared, workspace)) <= 2 + 2 + 2
            )  # what stays, a window, one that is being freed
    assert deaths > 4
    assert digest == study[2]
    assert files_of(prepared, workspace) == study[3]
    assert sequences_there(prepared, workspace) == {0, 1}
    assert verify(workspace.capture(prepared.capture_id), Silent()).sound


def test_parts_of_a_study_roll_each(study, tmp_path):
    """As --shards do: each part counts its windows in a workspace of its own, and the summaries make the whole."""
    from outliers.counting.merge import merge_summaries

    summaries = []
    for name, part in (("a", range(4)), ("b", range(4, SEQUENCES))):
        prepared, workspace = rolling_in(tmp_path / name, study)
        run_extract(prepared, workspace, Silent(), sequences=part)
        run_analyze(prepared, workspace, Silent(), sequences=part)
        summaries.append(workspace.summary(prepared.capture_id, prepared.study_id))
        assert sequences_there(prepared, workspace) == ({0, 1} if name == "a" else set())
    prepared, workspace = rolling_in(tmp_path / "whole", study)
    merge_summaries(summaries, workspace)
    assert run_report(prepared, workspace, Silent())["results_digest"] == study[2]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """(model, text) of a dense model."""
    place = tmp_path_factory.mktemp("dense")
    (place / "text.txt").write_text("The quick brown fox jumps over the lazy dog, twice.\n" * 20)
    return tiny.make_model(place / "model", "Llama"), place / "text.txt"


@pytest.mark.studies
def test_a_full_capture_goes_on_as_rolling_and_the_other_way_round(dense, tmp_path):
    full, workspace = made_in(tmp_path, spec_of(*dense))
    rolling, _ = made_in(tmp_path, spec_of(*dense, **ONE_BATCH))
    assert (full.capture_id, full.study_id) == (rolling.capture_id, rolling.study_id)
    run_extract(full, workspace, Silent(), sequences=range(4))
    digest = finish(rolling, workspace)
    assert sequences_there(rolling, workspace) == {0, 1}
    assert not capture_exists(full, workspace)
    # what was freed is captured again, and all of it stays
    assert run_extract(full, workspace, Silent())["sequences"] == SEQUENCES - 2
    assert sequences_there(full, workspace) == set(range(SEQUENCES))
    run_analyze(full, workspace, Silent())
    assert run_report(full, workspace, Silent())["results_digest"] == digest


def test_a_roll_that_was_begun_ends_where_all_is_kept(dense, tmp_path):
    """What is counted of it is withdrawn: the full capture is counted as ever."""
    rolling, workspace = made_in(tmp_path / "ws", spec_of(*dense, **ONE_BATCH))
    full, _ = made_in(tmp_path / "ws", spec_of(*dense))
    points = iter(["captured"] * 2)

    def pause(point):
        if point == "captured" and next(points, None) is None:
            raise Killed(point)

    with pytest.raises(Killed):
        run_extract(rolling, workspace, Silent(), pause=pause)
    assert sequences_there(rolling, workspace) == {0, 1, 4, 5}
    assert not capture_exists(rolling, workspace)
    digest = finish(full, workspace)
    assert sequences_there(full, workspace) == set(range(SEQUENCES))
    assert not any((workspace.capture(full.capture_id) / "rolling").iterdir())
    # the roll finds all of it there, and frees nothing
    assert capture_exists(rolling, workspace)
    assert finish(rolling, workspace) == digest
    assert sequences_there(full, workspace) == set(range(SEQUENCES))


@pytest.mark.studies
def test_other_criteria_capture_again_what_was_freed(dense, tmp_path):
    first, workspace = made_in(tmp_path / "ws", spec_of(*dense, **ONE_BATCH))
    finish(first, workspace)
    other, _ = made_in(tmp_path / "ws", spec_of(*dense, **ONE_BATCH) | {"criteria": {"magnitude": 2.0}})
    assert other.capture_id == first.capture_id
    assert not capture_exists(other, workspace)
    digest = finish(other, workspace)
    alone, elsewhere = made_in(tmp_path / "alone", spec_of(*dense) | {"criteria": {"magnitude": 2.0}})
    assert digest == finish(alone, elsewhere)
    assert capture_exists(first, workspace)
    assert sequences_there(other, workspace) == {0, 1}


def test_what_stays_and_was_damaged_is_captured_again_alone(dense, tmp_path):
    prepared, workspace = made_in(tmp_path, spec_of(*dense, **ONE_BATCH))
    digest, folder = finish(prepared, workspace), workspace.capture(prepared.capture_id)
    chunk = folder / "activations.zarr" / "resid" / "c.1.1.0.0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    found = verify(folder, Silent(), repair=True)
    assert (found.marked, found.left) == ((1,), 2)
    assert not capture_exists(prepared, workspace)
    assert run_extract(prepared, workspace, Silent())["sequences"] == 2
    run_analyze(prepared, workspace, Silent())
    assert run_report(prepared, workspace, Silent())["results_digest"] == digest


def test_counts_that_were_damaged_are_found_and_made_anew(dense, tmp_path):
    prepared, workspace = made_in(tmp_path, spec_of(*dense, **ONE_BATCH))
    digest, folder = finish(prepared, workspace), workspace.capture(prepared.capture_id)
    (totals,) = folder.glob("rolling/*/*/totals.npz")
    totals.write_bytes(totals.read_bytes()[:-1])
    found = verify(folder, Silent(), repair=True)
    assert [damage.problem for damage in found.damage] == ["is not what was counted"]
    assert not capture_exists(prepared, workspace)
    assert finish(prepared, workspace) == digest
    assert verify(folder, Silent()).sound


def test_a_sequence_that_was_freed_is_named_where_it_is_read(dense, tmp_path):
    pytest.importorskip("xarray")
    from outliers.api.captures import open_capture

    prepared, workspace = made_in(tmp_path, spec_of(*dense, **ONE_BATCH))
    finish(prepared, workspace)
    opened = open_capture(prepared.capture_id, workspace.root)
    assert opened.attrs["freed_sequences"] == f"2:{SEQUENCES}"
    assert opened.sizes["sequence"] == SEQUENCES
    assert bool(opened["resid"][:, :2].notnull().all())
    with pytest.raises(CaptureError, match=r"sequence 5 was counted and is not stored \(--store\), and 0:2 are there"):
        opened["resid"][0, 5].load()


def test_the_journal_does_not_grow_with_the_corpus(dense, tmp_path):
    lines = []
    prepared, workspace = made_in(tmp_path, spec_of(*dense, **ONE_BATCH))
    path = workspace.capture(prepared.capture_id) / "journal.jsonl"
    finish(prepared, workspace, lambda point: lines.append(len(path.read_bytes().splitlines())))
    assert max(lines) <= 2 + 2 + 1  # what stays, a window, how far it is counted
    assert len(Journal.open(path).freed) == SEQUENCES - 2


RUN = """
import json, sys
from outliers.spec import StudySpec
from outliers.steps import run_analyze, run_extract, run_report
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support.synthetic import Silent
workspace = open_workspace(sys.argv[1])
prepared = prepare(StudySpec.model_validate(json.loads(sys.argv[2])), workspace)
print("begun", flush=True)
run_extract(prepared, workspace, Silent())
run_analyze(prepared, workspace, Silent())
print(run_report(prepared, workspace, Silent())["results_digest"], flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_twenty_kills_at_random_leave_the_same_bits_and_no_chunk(tmp_path, family):
    """SIGKILL of the whole process, twenty times or until it is done, at instants that a seed draws."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, twice.\n" * 400)
    model = tiny.make_model(tmp_path / "model", family)
    spec = spec_of(model, tmp_path / "text.txt")
    spec["corpus"] |= {"num_sequences": 120, "sequence_length": 64}
    wanted = finish(*made_in(tmp_path / "full", spec))
    spec["capture"] |= ONE_BATCH
    prepared, workspace = made_in(tmp_path / "rolling", spec)
    draw, kills, digest = random.Random(0), 0, None
    while digest is None:
        command = [sys.executable, "-c", RUN, str(workspace.root), json.dumps(spec)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            if kills < 20:
                time.sleep(draw.uniform(0.5, 6))
                os.killpg(process.pid, signal.SIGKILL)
                kills += process.poll() is None or process.wait() < 0
            said = process.stdout.read().split()
            digest = said[-1] if said else None
    assert kills > 5
    assert digest == wanted
    assert sequences_there(prepared, workspace) == {0, 1}
    assert verify(workspace.capture(prepared.capture_id), Silent()).sound
    leftovers = [path for path in workspace.capture(prepared.capture_id).rglob(".*") if path.is_file()]
    assert leftovers == []
