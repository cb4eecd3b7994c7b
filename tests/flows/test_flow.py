"""What the flow adds to the steps: retries of the right errors, a cancel that ends the job, a cache that believes the world."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.held_job import held_until_cancelled, until
from tests.support.prefect_home import ROOT

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    model = tiny.make_model(
        folder / "model", "Llama", hidden_size=64, num_hidden_layers=8, max_position_embeddings=2048
    )
    return folder, {
        "model": model,
        "corpus": {"source": "builtin:python-docs", "num_sequences": 3, "sequence_length": 32},
        "compute": {"workspace": str(folder / "workspace")},
    }


def settle(folder, parameters):
    return prepare(StudySpec.model_validate(parameters), open_workspace(folder / "workspace"))


@pytest.mark.long
def test_cancel_ends_the_job_and_a_new_run_goes_on(prefect_home, study):
    folder, parameters = study
    parameters = parameters | {"corpus": parameters["corpus"] | {"num_sequences": 100, "sequence_length": 512}}
    prepared = settle(folder, parameters)
    workspace = open_workspace(folder / "workspace")
    journal = workspace.capture(prepared.capture_id) / "journal.jsonl"
    flow_run = prefect_home.run(**parameters)
    with held_until_cancelled(workspace.root, f"extract-{prepared.capture_id}", journal):
        prefect_home.prefect("flow-run", "cancel", flow_run)
    prefect_home.wait(flow_run, "Cancelled", seconds=60)
    done = len(journal.read_text().splitlines())
    assert 0 < done < 100, "cancelled too late to show anything"

    again = prefect_home.run(**parameters)
    assert prefect_home.wait(again, "Completed", "Failed", "Crashed")["state_name"] == "Completed", prefect_home.logs(
        again
    )
    record = workspace.capture(prepared.capture_id) / "extractions.jsonl"
    assert [json.loads(line)["sequences"] for line in record.read_text().splitlines()] == [100 - done]


_IMPATIENT = """
import sys
import flows.hooks.cancelled
flows.hooks.cancelled.LOOK_SECONDS, flows.hooks.cancelled.PATIENCE_SECONDS = 0.2, 0.5
from flows.cli.command import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.studies
def test_a_run_of_a_command_that_is_cancelled_in_the_ui_ends_itself(prefect_home, study, tmp_path):
    """No worker began it, so none ends it: left alone it would go on, and be called Cancelled after five minutes."""
    _, parameters = study
    workspace = open_workspace(tmp_path / "workspace")
    corpus = {"source": "builtin:python-docs", "num_sequences": 100, "sequence_length": 512}
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"model": parameters["model"], "corpus": corpus}))
    prepared = prepare(StudySpec.model_validate_json(spec.read_text()), workspace)
    journal = workspace.capture(prepared.capture_id) / "journal.jsonl"
    before = {run["id"] for run in prefect_home.flow_runs()}
    argv = [sys.executable, "-c", _IMPATIENT, "study", "--spec", str(spec), "--workspace", str(workspace.root)]
    with (tmp_path / "said").open("wb") as said:
        command = subprocess.Popen(argv, cwd=ROOT, env=prefect_home.environment, stdout=said, stderr=said)
    try:
        with held_until_cancelled(workspace.root, f"extract-{prepared.capture_id}", journal):
            (run,) = {run["id"] for run in prefect_home.flow_runs()} - before
            prefect_home.call("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
        assert command.wait(60) == 130, (tmp_path / "said").read_text()
    finally:
        command.kill()
        command.wait()
    assert "the same command goes on" in (tmp_path / "said").read_text()
    state = prefect_home.wait(run, "Cancelled", seconds=10)["state"]
    assert state["message"] == "The run was cancelled; it ended itself."
    assert 0 < len(journal.read_text().splitlines()) < 100, "ended too late to show anything"
    assert not list((workspace.root / "runs").iterdir())


@pytest.mark.long
def test_one_of_two_runs_is_cancelled_and_the_other_goes_on(prefect_home, study):
    """They share a job, which ends with the one; the other begins it again, from what it had done."""
    folder, parameters = study
    parameters = parameters | {"corpus": parameters["corpus"] | {"num_sequences": 100, "sequence_length": 500}}
    prepared = settle(folder, parameters)
    workspace = open_workspace(folder / "workspace")
    journal = workspace.capture(prepared.capture_id) / "journal.jsonl"
    first = prefect_home.run(**parameters)
    with held_until_cancelled(workspace.root, f"extract-{prepared.capture_id}", journal) as job:
        second = prefect_home.run(**parameters)
        # it hears what the job has said
        until(lambda: "one pass over" in prefect_home.logs(second), "the second run", poll_seconds=0.5)
        prefect_home.prefect("flow-run", "cancel", first)
    prefect_home.wait(first, "Cancelled", seconds=60)
    assert prefect_home.wait(second, "Completed", "Failed", "Crashed")["state_name"] == "Completed", prefect_home.logs(
        second
    )
    assert "was cancelled by another run that shared it" in prefect_home.logs(second)
    record = workspace.capture(prepared.capture_id) / "extractions.jsonl"
    (rest,) = [json.loads(line)["sequences"] for line in record.read_text().splitlines()]
    assert 0 < rest < 100
    assert [path.name for path in sorted(job.folder.parent.glob("[0-9]*"))] == ["0001", "0002"]


@pytest.mark.long
def test_a_cached_extraction_does_not_outlive_its_capture(prefect_home, study):
    """The capture and the results are gone, Prefect still remembers both: the world is believed, not the memory."""
    folder, parameters = study
    prepared = settle(folder, parameters)
    workspace = open_workspace(folder / "workspace")
    first = prefect_home.run(**parameters)
    assert prefect_home.wait(first, "Completed", "Failed", "Crashed")["state_name"] == "Completed", prefect_home.logs(
        first
    )
    summary = (workspace.study(prepared.study_id) / "summary.json").read_bytes()

    # without its results the study is answered from what was counted; without that it is counted again
    shutil.rmtree(workspace.study(prepared.study_id))
    answered = prefect_home.run(**parameters)
    assert prefect_home.wait(answered, "Completed", "Failed", "Crashed")["state_name"] == "Completed"
    assert set(prefect_home.task_runs(answered)) == {"prepare"}
    assert (workspace.study(prepared.study_id) / "summary.json").read_bytes() == summary
    shutil.rmtree(workspace.study(prepared.study_id))
    shutil.rmtree(workspace.summary(prepared.capture_id, prepared.study_id))
    second = prefect_home.run(**parameters)
    assert prefect_home.wait(second, "Completed", "Failed", "Crashed")["state_name"] == "Completed", prefect_home.logs(
        second
    )
    states = {name: run["state_name"] for name, run in prefect_home.task_runs(second).items()}
    done = dict.fromkeys(("prepare", "provision", "analyze", "sync"), "Completed")
    assert states == done | {"extract": "Cached"}

    shutil.rmtree(workspace.study(prepared.study_id))
    shutil.rmtree(workspace.capture(prepared.capture_id))
    third = prefect_home.run(**parameters)
    assert prefect_home.wait(third, "Completed", "Failed", "Crashed")["state_name"] == "Completed", prefect_home.logs(
        third
    )
    assert prefect_home.task_runs(third)["extract"]["state_name"] == "Completed"
    assert (workspace.study(prepared.study_id) / "summary.json").read_bytes() == summary


def test_transient_errors_are_tried_again_and_others_are_not(prefect_home):
    """The policy on a real task in a real flow: two StoreUnavailable, then success; one AccessDenied, then the end."""
    import subprocess
    import sys

    script = """
from prefect import flow, task
from outliers.errors import AccessDenied, StoreUnavailable
from tasks.policies import RETRIES, is_transient

tries = {"transient": 0, "permanent": 0}

@task(retries=RETRIES, retry_delay_seconds=[0, 0, 0], retry_condition_fn=is_transient)
def transient():
    tries["transient"] += 1
    if tries["transient"] < 3:
        raise StoreUnavailable("not yet")

@task(retries=RETRIES, retry_delay_seconds=[0, 0, 0], retry_condition_fn=is_transient)
def permanent():
    tries["permanent"] += 1
    raise AccessDenied("never")

@flow
def both():
    transient()
    permanent(return_state=True)

both(return_state=True)
print(tries)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=prefect_home.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.strip().splitlines()[-1:] == ["{'transient': 3, 'permanent': 1}"], done.stderr
