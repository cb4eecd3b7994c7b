"""A finished study at a tracking server: a real MLflow file store, a server that is not there, one that says nothing."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outliers.errors import BadInput
from outliers.publish.manifest import read_manifest
from outliers.publish.probes import place_probe
from outliers.publish.tracking import Tracked, track, tracking_uri
from tests.support.probed import change, probes
from tests.support.results_folder import STUDY_ID, make_results

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow-skinny is not installed")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder that MLflow keeps runs in: its client refuses that unless it is told so."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path}/runs"


@pytest.fixture
def results(tmp_path):
    return make_results(tmp_path / "home of a person" / "results")


def runs_of(store, experiment="outliers"):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else client.search_runs([found.experiment_id])


def test_a_run_has_what_was_asked_the_answer_and_the_page(store, results):
    done = track(results, store, "https://atlas.example/a")
    assert done.why is None
    (run,) = runs_of(store)
    manifest = read_manifest(results)
    assert run.info.status == "FINISHED"
    assert done.url.endswith(f"/{run.info.run_id}")
    assert run.data.tags["study_id"] == STUDY_ID
    assert run.data.tags["results_digest"] == manifest["results_digest"]
    assert run.data.tags["published"] == "https://atlas.example/a"
    assert "## Activation outliers" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics["systematic_features"] == manifest["headline"]["num_systematic"]
    assert run.data.metrics["tokens"] == manifest["headline"]["num_tokens"]
    place = Path(run.info.artifact_uri.removeprefix("file://"))
    assert {path.name for path in place.iterdir()} == {"report.html", "summary.json", "card.md"}
    assert (place / "summary.json").read_bytes() == (results / "summary.json").read_bytes()
    assert (place / "report.html").read_bytes() == (results / "report.html").read_bytes()
    # nothing of where the study lies on this machine
    for path in place.iterdir():
        assert "home of a person" not in path.read_text()


@pytest.mark.parametrize(
    ("published", "tag", "link"),
    [
        ("file:///home/anna/atlas/m/s/manifest.json", None, None),
        ("s3://bucket/atlas/m/s/manifest.json", "s3://bucket/atlas/m/s/manifest.json", None),
        (
            "hf://datasets/lab/a/m/s/manifest.json",
            "hf://datasets/lab/a/m/s/manifest.json",
            "<https://huggingface.co/datasets/lab/a/tree/main/m/s>",
        ),
    ],
)
def test_where_a_study_is_published_is_logged_and_no_folder_of_this_machine(store, results, published, tag, link):
    track(results, store, published)
    (run,) = runs_of(store)
    assert run.data.tags.get("published") == tag
    assert "/home/anna" not in str(run.data.tags)
    card = (Path(run.info.artifact_uri.removeprefix("file://")) / "card.md").read_text()
    assert ("The whole study: " in card) == (link is not None)
    assert link is None or link in card


def test_a_study_that_is_there_is_not_logged_again(store, results):
    first = track(results, store, None)
    assert track(results, store, None) == first
    assert len(runs_of(store)) == 1


def test_another_experiment_and_other_numbers(store, results, tmp_path, monkeypatch):
    track(results, store, None)
    track(make_results(tmp_path / "other", seed=1), store, None)
    assert len(runs_of(store)) == 2
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    track(results, store, None)
    assert len(runs_of(store, "mine")) == 1


def test_a_study_that_is_probed_later_is_logged_with_its_verdict(store, results, workspace):
    """Its numbers are the same: results_digest does not cover a probe."""
    track(results, store, None)
    probed = probes(change("int8", format="int8_token", kl=0.03), study_id=STUDY_ID)
    place_probe(probed, [], results / "probes" / probed.probe_id, workspace)
    assert track(results, store, None) == track(results, store, None)
    newest, first = runs_of(store)
    assert newest.data.metrics["kl.int8_token"] == 0.03
    assert newest.data.tags["probe_id"] == probed.probe_id
    assert "kl.int8_token" not in first.data.metrics
    assert first.data.tags["probe_id"] == "none"


def test_the_probe_of_another_study_is_not_logged(store, results, workspace):
    other = probes(change("int8", format="int8_token"))
    place_probe(other, [], results / "probes" / other.probe_id, workspace)
    track(results, store, None)
    (run,) = runs_of(store)
    assert "kl.int8_token" not in run.data.metrics
    assert "What can be quantized" not in run.data.tags["mlflow.note.content"]


def test_a_file_store_that_the_client_refuses_is_a_warning(store, results, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    done = track(results, store, None)
    assert done.url is None
    assert "MLFLOW_ALLOW_FILE_STORE" in done.why
    assert "\n" not in done.why


def test_a_server_that_is_not_there(results, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "theSecretOfThisTest")
    done = track(results, "http://127.0.0.1:9", None)
    assert done.url is None
    assert "127.0.0.1" in done.why
    assert "theSecret" not in done.why


def test_a_server_that_says_nothing_is_waited_for_within_bounds(results):
    import mlflow  # noqa: F401 - its import takes seconds, which are not the server's

    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        done = track(results, f"http://127.0.0.1:{silent.getsockname()[1]}", None, seconds=1.0)
    assert done == Tracked(None, "the tracking server did not answer within 1 s")
    assert time.monotonic() - began < 30


def test_results_that_are_damaged_are_not_logged(store, results):
    (results / "summary.json").write_text("{}")
    done = track(results, store, None)
    assert done.url is None
    assert runs_of(store) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("https://host", "--track takes mlflow:URI"),
        ("mlflow:host:5000", "--track takes mlflow:URI"),
        ("mlflow:", "--track takes mlflow:URI"),
        ("mlflow:file://host/x", "--track takes mlflow:URI"),
        ("mlflow:sqlite:///x.db", "--track takes mlflow:URI"),
        ("wandb:https://host", "--track takes mlflow:URI"),
        ("mlflow:https://anna:theSecret@host", "MLFLOW_TRACKING_USERNAME"),
        ("mlflow:https://host/?token=theSecret", "query or fragment"),
    ],
)
def test_what_is_refused_before_a_study_begins(given, said):
    with pytest.raises(BadInput) as caught:
        tracking_uri(given)
    assert said in str(caught.value)
    assert "theSecret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "https://mlflow.example/base", "file:///folder"])
def test_what_is_taken(uri):
    assert tracking_uri(f"mlflow:{uri}") == uri


def test_the_tracker_is_imported_for_tracking_alone():
    script = "import sys; import flows.cli.command, outliers.publish.tracking; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
