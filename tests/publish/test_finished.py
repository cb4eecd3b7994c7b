"""Nothing is answered from files that were not checked: results, summaries, memories of models, jobs that have ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from outliers.counting.analyze import analyze
from outliers.counting.merge import merge_summaries
from outliers.counting.shards import folder_of as folder_of_part
from outliers.counting.shards import is_here, write_record
from outliers.counting.summary_files import has_summary, read_summary
from outliers.dispatch.steps import sync_study
from outliers.dispatch.transfer import send_study
from outliers.errors import BadInput, CorruptCapture, DamagedResults, DigestConflict, PublishRefused
from outliers.files.atomic import sha256_file
from outliers.machines.local import LocalMachine
from outliers.model.source import find_model
from outliers.publish.finished import read_finished
from outliers.publish.manifest import digest_of, dump_manifest, folder_of, read_manifest
from outliers.publish.outcome import find_finished, find_outcome, make_outcome
from outliers.publish.publish import model_slug, publish
from outliers.publish.reporting import known_digest
from outliers.publish.shelf import read_folders, read_store, read_study
from outliers.spec import ModelSpec
from outliers.steps import run_analyze, run_report, run_state
from outliers.store.repair import is_repaired
from outliers.store.verify import verify
from outliers.study.parts import Shard
from outliers.study.prepare import read_prepared
from outliers.workspace import open_workspace
from tests.counting.test_counting import random_acts
from tests.support import gguf_files, synthetic
from tests.support.damaged import flip
from tests.support.runs import quiet_run
from tests.support.synthetic import Silent

FILES = ("summary.json", "tokens.json", "features.parquet", "report.html", "manifest.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished study of synthetic activations: (workspace, study)."""
    acts, _ = random_acts(3, "bfloat16")
    workspace = open_workspace(tmp_path_factory.mktemp("made") / "ws")
    study = synthetic.prepared_for(acts, "bfloat16")
    synthetic.write_capture(study, workspace, acts)
    run_analyze(study, workspace, Silent())
    run_report(study, workspace, Silent())
    return workspace, study


@pytest.fixture
def copy(made, tmp_path):
    """A copy of it to damage: (workspace, study, results folder)."""
    shutil.copytree(made[0].root, tmp_path / "ws")
    workspace = open_workspace(tmp_path / "ws")
    return workspace, made[1], workspace.study(made[1].study_id)


@pytest.fixture
def shelf(copy, tmp_path):
    """The study published in a folder: (study as it is asked for there, target, URL)."""
    _, study, folder = copy
    target = f"file://{tmp_path}/store"
    publish(folder, target, model_slug(study.model.source.id))
    spec = study.spec.model_copy(update={"publish_to": target})
    return (
        study.model_copy(update={"spec": spec}),
        target,
        f"{target}/{model_slug(study.model.source.id)}/{study.study_id}",
    )


def edit(path, old, new):
    content = path.read_bytes()
    assert old in content, path
    path.write_bytes(content.replace(old, new, 1))


def other_numbers(folder):
    """Another summary.json, with a manifest that agrees with it in everything but the digest of the numbers."""
    edit(folder / "summary.json", b'"hits":', b'"hits":1')
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for file in manifest["files"]:
        path = folder / file["path"]
        file |= {"size": path.stat().st_size, "sha256": sha256_file(path)}
    manifest["folder"] = folder_of(manifest["files"])
    (folder / "manifest.json").write_bytes(dump_manifest(manifest))


def other_numbers_throughout(folder):
    """The same, with the digest of the numbers computed anew too: the folder agrees with itself."""
    other_numbers(folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    names = ("summary.json", "tokens.json", "features.parquet")
    manifest["results_digest"] = digest_of({name: (folder / name).read_bytes() for name in names})
    (folder / "manifest.json").write_bytes(dump_manifest(manifest))


def flipped(name):
    return lambda folder: flip(folder / name, 40)


def gone(name):
    return lambda folder: (folder / name).unlink()


DAMAGES = {
    **{f"{name}, flipped": flipped(name) for name in FILES},
    **{f"{name}, gone": gone(name) for name in FILES},
    "torn": lambda folder: (folder / "summary.json").write_bytes((folder / "summary.json").read_bytes()[:500]),
    "zeros": lambda folder: (folder / "manifest.json").write_bytes(bytes(2000)),
    "of another study": lambda folder: edit(folder / "manifest.json", b'"study_id": "', b'"study_id": "0'),
    "a folder": lambda folder: ((folder / "tokens.json").unlink(), (folder / "tokens.json").mkdir()),
    "summary.json, edited": lambda folder: edit(folder / "summary.json", b'"hits":', b'"hits":1'),
    "headline, edited": lambda folder: edit(folder / "manifest.json", b'"num_systematic": ', b'"num_systematic": 1'),
    "other numbers": other_numbers,
}


RENDERED = tuple(how for how in DAMAGES if how.startswith("report.html"))


@pytest.mark.parametrize("how", RENDERED)
def test_damaged_pages_are_rendered_again(copy, how):
    """From numbers that are whole: neither the summary nor a machine is asked."""
    workspace, study, folder = copy
    (workspace.summary(study.capture_id, study.study_id) / "totals.npz").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    DAMAGES[how](folder)
    (folder / "plots" / "heatmap.png").write_bytes(b"noise")
    (folder / "plots" / "other.png").write_bytes(b"noise")
    assert find_outcome(study, workspace) is not None
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("how", [how for how in DAMAGES if how not in RENDERED])
def test_damaged_results_are_never_answered(copy, how):
    """Here without the private summary: nothing is left to answer from, and nothing is a traceback."""
    workspace, study, folder = copy
    (workspace.summary(study.capture_id, study.study_id) / "totals.npz").unlink()
    DAMAGES[how](folder)
    assert find_outcome(study, workspace) is None
    assert find_finished(study, workspace) is None
    assert not run_state(study, workspace, Silent())["results"]
    if how != "manifest.json, gone":
        with pytest.raises(DamagedResults, match="are not whole"):
            make_outcome(study, workspace, published=None, cached=True)
        assert "are not whole" in read_folders(workspace.results).skipped[0].why


def test_damaged_results_are_written_again_from_the_summary(made, copy):
    workspace, study, folder = copy
    told = find_outcome(made[1], made[0])
    edit(folder / "summary.json", b'"hits":', b'"hits":1')
    again = find_outcome(study, workspace)
    kept = {"results", "report", "published_bytes"}
    assert again.model_dump(exclude=kept) == told.model_dump(exclude=kept)
    assert read_manifest(folder)["results_digest"] == read_manifest(made[0].study(study.study_id))["results_digest"]
    assert find_finished(study, workspace) is not None


def test_what_is_in_the_way_of_results_is_left_alone(copy):
    workspace, study, folder = copy
    DAMAGES["a folder"](folder)
    assert find_outcome(study, workspace) is None


def test_results_that_agree_with_themselves_alone_are_not_answered(copy):
    """The digest under which the study was reported is kept apart from the folder."""
    workspace, study, folder = copy
    known = read_manifest(folder)["results_digest"]
    other_numbers_throughout(folder)
    assert read_finished(folder).manifest["results_digest"] != known
    find_outcome(study, workspace)
    assert read_manifest(folder)["results_digest"] == known == known_digest(study, workspace)


def test_edited_results_whose_digest_was_removed_are_not_answered(copy):
    """Only the summary can tell then: what is written from it has other numbers, which is a refusal that names both."""
    workspace, study, folder = copy
    known = read_manifest(folder)["results_digest"]
    other_numbers_throughout(folder)
    summary = workspace.summary(study.capture_id, study.study_id)
    summary.with_name(f"{summary.name}.json").unlink()
    assert find_outcome(study, workspace) is None
    with pytest.raises(DigestConflict, match=known):
        run_report(study, workspace, Silent())


def test_a_study_whose_digest_alone_was_removed_is_written_again(copy):
    workspace, study, folder = copy
    known = read_manifest(folder)["results_digest"]
    summary = workspace.summary(study.capture_id, study.study_id)
    summary.with_name(f"{summary.name}.json").unlink()
    assert find_outcome(study, workspace) is not None
    assert known_digest(study, workspace) == known == read_manifest(folder)["results_digest"]


def test_without_the_summary_damaged_results_are_counted_again(copy):
    workspace, study, folder = copy
    known = read_manifest(folder)["results_digest"]
    flip(folder / "summary.json", 40)
    flip(workspace.summary(study.capture_id, study.study_id) / "totals.npz", 300)
    assert find_outcome(study, workspace) is None
    assert find_finished(study, workspace) is None
    assert run_state(study, workspace, Silent()) == {"capture": True, "summary": False, "results": False}
    run_analyze(study, workspace, Silent())
    run_report(study, workspace, Silent())
    assert read_manifest(folder)["results_digest"] == known


def essence(manifest):
    numbers = [file for file in manifest["files"] if file["path"] in FILES[:3]]
    return manifest | {"files": numbers, "folder": None}


@pytest.mark.parametrize("how", ["summary.json, edited", "headline, edited", "manifest.json, gone", "other numbers"])
def test_of_a_published_study_damaged_results_are_fetched_again(copy, shelf, how):
    workspace, _, folder = copy
    study, _, url = shelf
    DAMAGES[how](folder)
    assert find_outcome(study, workspace).published == f"{url}/manifest.json"
    assert read_manifest(folder) == json.loads((folder / "manifest.json").read_bytes())
    # all but page and plots, which name here what they may not name there
    assert essence(read_finished(folder).manifest) == essence(read_study(url).manifest)


def test_a_publication_that_was_cut_off_is_gone_on_with_in_its_folder(copy, shelf, tmp_path):
    study, _, url = shelf
    shutil.rmtree(tmp_path / "store")
    counted = {"results_digest": read_manifest(copy[2])["results_digest"]}
    for _ in range(2):
        sync_study(quiet_run(study, copy[0]), {"machine": {"provider": "local", "gpus": 0}}, counted)
        place = Path(url.removeprefix("file://"))
        (place / "manifest.json").unlink()  # as if it had ended before that
    assert len(list(place.iterdir())) == 1


def test_a_publication_whose_headline_was_edited_is_refused(copy, shelf):
    """By whoever reads its summary; a study that fetches it checks every file and the digest."""
    workspace, (_, target, url) = copy[0], shelf
    edit(Path(url.removeprefix("file://")) / "manifest.json", b'"num_systematic": ', b'"num_systematic": 1')
    with pytest.raises(BadInput, match=r"says num_systematic 16, its summary\.json says 6"):
        read_store(target, summaries=True)
    with pytest.raises(PublishRefused, match="are not whole"):
        find_outcome(shelf[0], workspace)


# Summaries


@pytest.mark.parametrize("name", ["totals.npz", "study.json", "checksums.json", "sequences"])
@pytest.mark.parametrize("how", ["flipped", "cut", "zeros", "gone"])
def test_a_damaged_summary_is_no_summary(copy, name, how):
    workspace, study, _ = copy
    folder = workspace.summary(study.capture_id, study.study_id)
    path = next((folder / name).glob("*.npz")) if name == "sequences" else folder / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        flip(path, len(content) // 2)
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else bytes(len(content)))
    assert not has_summary(folder)
    if name != "totals.npz" or how != "gone":
        with pytest.raises(CorruptCapture, match="not what was written"):
            read_summary(folder)
        with pytest.raises(CorruptCapture):
            merge_summaries([folder], workspace)


def test_a_damaged_part_is_made_again(copy):
    workspace, study, _ = copy
    part = Shard(1, 1, 0, 3)
    place = folder_of_part(part, study, workspace)
    shutil.copytree(workspace.summary(study.capture_id, study.study_id), place)
    write_record(place, {"sequences": "0:3"})
    assert is_here(part, study, workspace)
    flip(place / "part.json", 12)
    assert not is_here(part, study, workspace)


# A capture that was repaired


def test_after_a_repair_the_study_is_computed_and_compared(copy):
    workspace, study, folder = copy
    capture = workspace.capture(study.capture_id)
    known = read_manifest(folder)["results_digest"]
    journal = (capture / "journal.jsonl").read_bytes()
    chunk = next((capture / "activations.zarr").glob("*/c.1.1.0.0"))
    sound = chunk.read_bytes()
    flip(chunk, 9)
    assert verify(capture, Silent(), repair=True).repaired
    # what is published or in the workspace does not answer any more
    assert find_outcome(study, workspace) is None
    assert find_finished(study, workspace) is None
    assert run_state(study, workspace, Silent()) == {"capture": False, "summary": True, "results": False}
    # as the extraction does it
    chunk.write_bytes(sound)
    (capture / "journal.jsonl").write_bytes(journal)
    assert not run_state(study, workspace, Silent())["results"]
    said = []
    run_analyze(study, workspace, Silent())

    class Heard(Silent):
        def log(self, level, message):
            said.append(message)

    run_report(study, workspace, Heard())
    assert said == [f"the results are what they were: results_digest {known[:12]}"]
    assert not is_repaired(workspace, study.capture_id)
    assert find_outcome(study, workspace).cached


def test_other_numbers_after_a_repair_are_refused_and_overwrite_nothing(made, copy):
    workspace, study, folder = copy
    capture = workspace.capture(study.capture_id)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flip(next((capture / "activations.zarr").glob("*/c.1.1.0.0")), 9)
    verify(capture, Silent(), repair=True)
    # computed again to other values, as other hardware might
    shutil.rmtree(capture / "activations.zarr")
    (capture / "journal.jsonl").unlink()
    (capture / "capture.json").unlink()
    mark = (capture / "repaired.json").read_bytes()
    record = capture / "summaries" / f"{study.study_id}.json"
    kept = record.read_bytes()
    shutil.rmtree(capture)
    acts, _ = random_acts(4, "bfloat16")
    synthetic.write_capture(study, workspace, acts)
    (capture / "repaired.json").write_bytes(mark)
    for known in (kept, None):  # without the record, the results folder says what they were
        analyze(study, workspace, Silent())
        record.unlink(missing_ok=True)
        if known is not None:
            record.write_bytes(known)
        with pytest.raises(DigestConflict, match=read_manifest(folder)["results_digest"]):
            run_report(study, workspace, Silent())
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert find_outcome(study, workspace) is None  # the next run computes, and says it again


# What else a workspace remembers


def test_a_hash_that_was_damaged_is_computed_again(tmp_path):
    workspace, path = open_workspace(tmp_path / "ws"), tmp_path / "model.gguf"
    gguf_files.write_byte_level(path, "smollm")
    spec = ModelSpec(id=str(path))
    revision = find_model(spec, workspace).revision
    (memo,) = (workspace.models / "hashes").iterdir()
    for content in (
        memo.read_bytes().replace(revision[:4].encode(), b"0000"),
        b"",
        bytes(64),
        b"0" * 64,
        json.dumps({"of": "another", "sha256": "0" * 64}).encode(),
    ):
        memo.write_bytes(content)
        assert find_model(spec, workspace).revision == revision == sha256_file(path)
    assert json.loads(memo.read_bytes())["sha256"] == revision


def test_what_a_step_is_given_is_sealed(copy):
    workspace, study, _ = copy
    place = Path(send_study(quiet_run(study, workspace), LocalMachine(workspace.root, "here")))
    assert read_prepared(place, workspace) == study
    whole = place.read_bytes()
    for old, new in ((b'"magnitude": 6.0', b'"magnitude": 7.0'), (b'"num_tokens": ', b'"num_tokens": 1')):
        edit(place, old, new)
        with pytest.raises(BadInput, match="not what was written"):
            read_prepared(place, workspace)
        place.write_bytes(whole)
