"""The deployment, as its users use it: a real server, a real worker, a real S3 server, `prefect deployment run`, Retry."""

from __future__ import annotations

import json

import pytest
import s3fs

from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.cases import first_here
from tests.support.held_job import until

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny model with a planted feature, its text, and a workspace: parameters of the flow."""
    folder = tmp_path_factory.mktemp("my study")
    model = tiny.make_model(folder / "model", "Llama", dtype="bfloat16")
    (folder / "book.txt").write_text("All that is gold does not glitter, not all those who wander are lost. " * 60)
    return folder, {
        "model": model,
        "corpus": {"source": str(folder / "book.txt"), "num_sequences": 3, "sequence_length": 32},
        "compute": {"workspace": str(folder / "workspace")},
    }


@pytest.fixture(scope="module")
def bucket(s3_server):
    keys = s3_server.writer
    return s3fs.S3FileSystem(
        key=keys.access_key,
        secret=keys.secret_key,
        client_kwargs={"endpoint_url": s3_server.endpoint, "region_name": "us-east-1"},
        skip_instance_cache=True,
        use_listings_cache=False,
    )


def extractions(folder, capture_id):
    """What each extraction of a capture did, from the machine's own record."""
    path = folder / "workspace" / "captures" / capture_id / "extractions.jsonl"
    return [json.loads(line)["sequences"] for line in path.read_text().splitlines()]


def ids(folder, parameters):
    """(capture_id, study_id), known before anything runs."""
    spec = StudySpec.model_validate(parameters)
    prepared = prepare(spec, open_workspace(folder / "workspace"))
    return prepared.capture_id, prepared.study_id


def test_a_deployed_study_is_published_and_a_second_run_is_answered_at_once(prefect_home, study, bucket):
    from tests.support.s3 import BUCKET

    folder, parameters = study
    parameters = parameters | {"publish_to": f"s3://{BUCKET}/atlas"}
    capture_id, study_id = ids(folder, parameters)
    flow_run = prefect_home.run_typed(**parameters)
    done = prefect_home.wait(flow_run, "Completed", "Failed", "Crashed")
    assert done["state_name"] == "Completed", prefect_home.logs(flow_run)
    assert done["name"] == "study model 3x32 book.txt"

    (slug,) = bucket.ls(f"{BUCKET}/atlas", detail=False)
    manifest = json.loads(bucket.cat(f"{slug}/{study_id}/manifest.json"))
    summary = json.loads(bucket.cat(f"{slug}/{study_id}/{manifest['folder']}/summary.json"))
    assert [feature["feature"] for feature in summary["systematic"]] == [tiny.PLANTED]
    stored = {
        path.split(f"{manifest['folder']}/")[1] for path in bucket.find(f"{slug}/{study_id}/{manifest['folder']}")
    }
    assert stored == {item["path"] for item in manifest["files"]}
    assert stored >= {"summary.json", "features.parquet", "tokens.json", "report.html", "plots/heatmap.png"}
    assert str(folder) not in json.dumps(manifest)

    tasks = prefect_home.task_runs(flow_run)
    assert set(tasks) == {"prepare", "provision", "extract", "analyze", "sync"}
    assert tasks["prepare"]["name"] == "prepare model 3x32 book.txt"
    assert tasks["extract"]["name"] == "extract model 3x32"
    log = prefect_home.logs(flow_run)
    assert "one pass over 3 sequences" in log, "the job's own lines belong in the run's log"
    assert "tokens of" in log, "the preparing says what it does"
    kinds = {(a["type"], a["key"]) for a in prefect_home.artifacts(flow_run) if a["key"]}
    assert ("progress", f"extract-{study_id}") in kinds
    assert [kind for kind in kinds if kind[0] != "progress"] == [
        ("markdown", page := f"model-3x32-book-txt-{study_id}")
    ]
    assert extractions(folder, capture_id) == [3]

    again = prefect_home.run(name="again, by hand", **parameters)
    done = prefect_home.wait(again, "Completed", "Failed", "Crashed")
    assert (done["state_name"], done["name"]) == ("Completed", "again, by hand"), "a name that was given stays"
    assert set(prefect_home.task_runs(again)) == {"prepare"}, "a published study asks for no machine"
    assert page in {a["key"] for a in prefect_home.artifacts(again)}, "a second version of the same page"
    assert extractions(folder, capture_id) == [3]


def test_retry_goes_on_without_extracting_again(prefect_home, study):
    """analyze fails for real (its plots have no place), the run fails, the cause is removed, Retry completes it."""
    folder, parameters = study
    parameters = parameters | {"corpus": parameters["corpus"] | {"num_sequences": 4}}
    capture_id, study_id = ids(folder, parameters)
    obstacle = folder / "workspace" / "results" / study_id / "plots"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")

    flow_run = prefect_home.run(**parameters)
    failed = prefect_home.wait(flow_run, "Completed", "Failed", "Crashed")
    assert failed["state_name"] == "Failed"
    assert prefect_home.task_runs(flow_run)["analyze"]["state_name"] == "Failed"
    assert prefect_home.task_runs(flow_run)["analyze"]["run_count"] == 1, "a permanent error is not tried again"
    assert extractions(folder, capture_id) == [4]

    obstacle.unlink()
    prefect_home.prefect("flow-run", "retry", flow_run)
    done = prefect_home.wait(flow_run, "Completed", "Crashed")
    assert done["state_name"] == "Completed", prefect_home.logs(flow_run)
    assert done["id"] == flow_run
    assert extractions(folder, capture_id) == [4]
    attempts = sorted((folder / "workspace" / "jobs" / f"extract-{capture_id}").glob("[0-9]*"))
    assert len(attempts) == 1, "the extraction's job was not started again"
    assert (folder / "workspace" / "results" / study_id / "manifest.json").exists()


def test_bad_parameters_are_refused_before_a_run_exists(prefect_home, study):
    _, parameters = study
    before = len(prefect_home.flow_runs())
    bad = parameters | {"corpus": parameters["corpus"] | {"num_sequences": 0}}
    options = [part for name, value in bad.items() for part in ("-p", f"{name}={json.dumps(value)}")]
    said = prefect_home.prefect("deployment", "run", "study/study", *options, check=False)
    assert "num_sequences" in said
    assert len(prefect_home.flow_runs()) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    first_here(
        [
            ({"model": "builtin:nosuch"}, "'builtin:nosuch' is not built in; built in: builtin:smollm2"),
            # what only the sections together can say, which no schema of a form does
            (
                {"capture": {"disk_window": 3}},
                "the parameters: capture: --disk-window 3 is the window of --store rolling",
            ),
        ]
    ),
)
def test_a_mistake_that_only_the_run_can_see_is_one_line(prefect_home, study, changes, words):
    _, parameters = study
    flow_run = prefect_home.run(**(parameters | changes))
    failed = prefect_home.wait(flow_run, "Completed", "Failed", "Crashed")
    assert failed["state_name"] == "Failed"
    assert failed["state"]["message"].startswith(words)
    # lines are sent now and then: the last one is there with all before it
    until(
        lambda: "Finished in state Failed" in prefect_home.logs(flow_run).rpartition("\n")[2],
        "the last line of the log",
    )
    log = prefect_home.logs(flow_run)
    assert words in log
    assert "Traceback" not in log
    assert "exception during execution" not in log
    assert "unexpected exception" not in log
