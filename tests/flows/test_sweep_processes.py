"""A sweep's studies as processes: what each says is its own, whatever another sweep of the same name does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.sweep import make_run_folder
from flows.sweep_children import run_studies
from flows.sweep_processes import Processes
from outliers.publish.outcome import Outcome
from outliers.study.prepare import prepare
from outliers.sweep.sweep import make_sweep
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.hub_server import wait_until


class Answering(Processes):
    """Its processes end at once, and print what the test gives for each study."""

    def __init__(self, folder, answers):
        super().__init__(folder, "http://127.0.0.1:1/api")
        self.answers = answers

    def __call__(self, study):
        child = super().__call__(study)
        child.process.kill()
        child.process.wait()
        child.process.returncode = 0
        child._answer.write_text(self.answers[study.name])
        return child


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two studies that could run, and the outcome of each as its process would say it."""
    folder = tmp_path_factory.mktemp("two")
    model = tiny.make_model(folder / "model", "Llama")
    workspace = open_workspace(folder / "ws")
    content = {
        "defaults": {
            "corpus": {"source": "builtin:python-docs", "num_sequences": 2, "sequence_length": 32},
            "compute": {"workspace": str(workspace.root)},
        },
        "study": [{"name": "one", "model": model}, {"name": "two", "model": model, "criteria": {"magnitude": 8}}],
    }
    sweep = make_sweep(content, "two")
    return sweep, {study.name: answer_of(prepare(study.spec, workspace)) for study in sweep.studies}


def answer_of(prepared):
    outcome = Outcome(
        study_id=prepared.study_id, capture_id=prepared.capture_id, title="t", results="r", report="r", published=None,
        published_bytes=0, systematic=[], cached=False,
    )  # fmt: skip
    return json.dumps(outcome.model_dump() | {"capture_bytes": 3})


def ended(sweep, folder, answers):
    return run_studies(sweep, Answering(folder, answers), lambda *_: None, lambda study: None)


def test_an_answer_is_taken_where_it_is_of_the_study_that_was_asked(two, tmp_path):
    sweep, answers = two
    one, other = ended(sweep, tmp_path, answers)
    assert (one.state, other.state) == ("done", "done")
    assert (one.study_id, one.features) == (json.loads(answers["one"])["study_id"], 0)

    one, other = ended(sweep, tmp_path, answers | {"one": answers["two"]})
    asked, given = (json.loads(answers[name])["study_id"] for name in ("one", "two"))
    assert (one.state, other.state) == ("failed", "done")
    assert one.reason == f"its process answered with the study {given}, and {asked} was asked"
    assert one.features is None
    assert one.run == str(tmp_path / "one.log")


@pytest.mark.parametrize("text", ["", "{", "3", "{}", '{"study_id": 3}', "Traceback"])
def test_an_answer_that_can_not_be_read_is_the_end_of_that_study_alone(two, tmp_path, text):
    sweep, answers = two
    one, other = ended(sweep, tmp_path, answers | {"one": text})
    assert (one.state, other.state) == ("failed", "done")
    assert one.reason.startswith(f"what its process answered can't be read ({tmp_path / 'one.json'}): ")


def test_each_run_of_a_sweep_has_a_folder_of_its_own(two):
    """Two sweeps of one name in one workspace: neither writes what the other's children read."""
    sweep, _ = two
    one, other = make_run_folder(sweep), make_run_folder(sweep)
    assert one != other
    root = open_workspace(sweep.studies[0].spec.compute.workspace).root
    assert one.parent == other.parent == root / "sweeps" / sweep.name
    first, second = sweep.studies
    child = Answering(one, {"one": ""})(first)
    Answering(other, {"one": ""})(second.model_copy(update={"name": "one"}))
    spec = json.loads((one / "one.spec.json").read_text())
    assert spec == first.spec.model_dump(mode="json")
    assert child._log.parent == one


def test_a_process_says_why_it_failed_and_is_not_the_sweeps_own_run(tmp_path, monkeypatch):
    """A real `outliers study` that is refused; the run that started it is not mistaken for its own."""
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "not-mine")
    content = {"name": "gone", "model": "./gone", "compute": {"workspace": str(tmp_path / "ws")}}
    sweep = make_sweep({"study": [content]}, "x")
    child = Processes(tmp_path / "said", "http://127.0.0.1:1/api")(sweep.studies[0])
    listed = Path(f"/proc/{child.process.pid}/environ")
    # on a busy machine it is empty until the new program is in place
    wait_until(listed.read_bytes)
    environment = listed.read_bytes().split(b"\0")
    assert b"PREFECT_API_URL=http://127.0.0.1:1/api" in environment
    assert not [name for name in environment if name.startswith(b"PREFECT__")]
    child.process.wait(60)
    end = child.poll()
    assert (end.state, end.reason.splitlines()[0]) == (
        "failed",
        "refused: there is no model at ./gone: not a folder, not a .gguf file",
    )
    assert json.loads((tmp_path / "said" / "gone.spec.json").read_text())["model"]["id"] == "./gone"
