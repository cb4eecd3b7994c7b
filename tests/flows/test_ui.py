"""`make ui` and what a person does with it: the form starts a study, its page is live, artifacts, Retry; slots; results on S3.

The parts in a browser need Chromium. All is one server, started by the very command, on ports and in folders of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import s3fs

from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.cases import first_here
from tests.support.prefect_home import ROOT
from tests.support.prefect_ui import BROWSER, Page, Ui, in_browser
from tests.support.s3 import BUCKET

pytestmark = pytest.mark.servers
STORAGE = "remote-file-system/outliers-results"
RENTS = """
import time
from types import SimpleNamespace
from prefect import flow
from tasks.limits import machine_slot

def check():
    pass

@flow
def rents(seconds):
    class Says:
        def log(self, level, message):
            print(message, flush=True)

    def run_on(name):
        compute = SimpleNamespace(provider=name)
        return SimpleNamespace(check=check, prepared=SimpleNamespace(spec=SimpleNamespace(compute=compute)))

    with machine_slot(run_on("local"), Says()):
        print("local does not wait")
    with machine_slot(run_on("ssh"), Says()):
        print("has a slot")
        time.sleep(seconds)

"""


@pytest.fixture(scope="module")
def ui(tmp_path_factory, s3_server):
    """The command, with results on the S3 server."""
    settings = s3_server.environment() | {"PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK": STORAGE}
    with Ui(tmp_path_factory.mktemp("prefect ui"), settings) as running:
        block = f"RemoteFileSystem(basepath='s3://{BUCKET}/prefect-results').save('outliers-results')"
        assert running.python(f"from prefect.filesystems import RemoteFileSystem\n{block}").wait(120) == 0
        yield running


@pytest.fixture(scope="module")
def killed_and_waiting(ui):
    """One run that held the only slot and was killed, and one that waits for it: begun early, for a lease lasts a minute."""
    limit = ui.python("import sys; from flows.server.settle import main; sys.exit(main(['--machines', '1']))")
    assert limit.wait(120) == 0, limit.communicate()
    with contextlib.ExitStack() as stack:

        def script(text: str) -> subprocess.Popen[str]:
            process = stack.enter_context(ui.python(RENTS + text))
            stack.callback(process.kill)
            return process

        holder = script("rents(1000)")
        assert read_until(holder, "has a slot")
        waiter = script("rents(0)")
        stopped = script("check = lambda: 1 / 0\nrents(0)")
        for process in (waiter, stopped):
            seen = read_until(process, "waiting: every slot of outliers-machines is taken")
            assert "local does not wait" in seen
            assert "has a slot" not in seen
        # a study that was cancelled, or spent its budget, meanwhile
        read_until(stopped, "ZeroDivisionError")  # not `communicate`, which does not see what was read ahead
        holder.kill()
        holder.wait()
        began = time.monotonic()
        yield waiter, began


def read_until(process, text: str, seconds: float = 120) -> str:
    """What a script said, up to that text."""
    said, deadline = "", time.monotonic() + seconds
    for line in process.stdout:
        said += line
        if text in line:
            return said
        assert time.monotonic() < deadline, said
    raise AssertionError(f"it ended without saying '{text}': {said}")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    model = tiny.make_model(folder / "model", "Llama", dtype="bfloat16", hidden_size=64, num_hidden_layers=8)
    return folder, {
        "model": model,
        "corpus": {"source": "builtin:python-docs", "num_sequences": 150, "sequence_length": 64},
        "compute": {"workspace": str(folder / "workspace")},
    }


@pytest.mark.studies
def test_it_says_what_to_open_and_a_second_one_that_it_runs(ui, killed_and_waiting):
    said = ui.said.read_text()
    assert f"open        {ui.url}" in said
    assert f"{ui.url}/deployments/deployment/" in said
    assert len(ui.pids()) == 2
    again = subprocess.run(ui.command(), env=ui.environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "it runs already" in again.stdout
    assert ui.url in again.stdout
    settings = ui.post("/work_pools/filter", {})
    assert [(pool["name"], pool["type"]) for pool in settings] == [("outliers", "process")]


@pytest.mark.studies
def test_another_program_on_the_port_is_not_taken_for_prefect(ui, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "flows.server.ui", "--port", str(port), "--home", str(tmp_path / "home")]
        done = subprocess.run(command, env=ui.environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--port" in done.stderr


@pytest.mark.parametrize(
    ("option", "words"),
    first_here(
        [
            ("--port=99999", "'99999' is not a port: 1 to 65535"),
            ("--port=-1", "'-1' is not a port"),
            ("--port=ui", "'ui' is not a port"),
            ("--machines=0", "'0' is not a number of machines, 1 or more"),
        ]
    ),
)
def test_what_is_no_port_is_refused_in_words(tmp_path, option, words):
    command = [sys.executable, "-m", "flows.server.ui", option, "--home", str(tmp_path / "home")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.studies
def test_a_url_with_a_password_is_refused_before_a_run_shows_it(ui, study):
    _, parameters = study
    said = ui.prefect(
        "deployment",
        "run",
        "study/study",
        "-p",
        f"model={parameters['model']}",
        "-p",
        "publish_to=s3://me:secret@b/x",
        check=False,
    )
    assert "publish_to" in said
    assert ui.flow_runs() == []


@pytest.mark.long
def test_retry_with_results_on_s3_does_not_extract_again(ui, study, s3_server, request):
    """A step fails, the worker's own storage is lost, its cause is removed; Retry, from the page where there is a browser."""
    folder, parameters = study
    parameters = parameters | {"corpus": parameters["corpus"] | {"num_sequences": 4}}
    prepared = prepare(StudySpec.model_validate(parameters), open_workspace(folder / "workspace"))
    keys = {"key": s3_server.writer.access_key, "secret": s3_server.writer.secret_key}
    where = {"endpoint_url": s3_server.endpoint, "region_name": "us-east-1"}
    bucket = s3fs.S3FileSystem(**keys, client_kwargs=where, skip_instance_cache=True, use_listings_cache=False)
    obstacle = folder / "workspace" / "results" / prepared.study_id / "plots"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    flow_run = ui.run(**parameters)
    assert ui.wait(flow_run, "Completed", "Failed", "Crashed")["state_name"] == "Failed", ui.logs(flow_run)

    assert bucket.ls(f"{BUCKET}/prefect-results"), "results are on S3"
    assert not list((ui.folder / "home" / "storage").glob("*")), "and none on the worker"
    shutil.rmtree(ui.folder / "home" / "storage", ignore_errors=True)
    obstacle.unlink()
    if not BROWSER:
        ui.prefect("flow-run", "retry", flow_run)
    else:
        page = Page(request.getfixturevalue("logged_in"), f"{ui.url}/runs/flow-run/{flow_run}")
        page.see("Failed", "analyze")
        page.click("Retry", "button")
        page.see("Retry")
        page.click("Retry", "[role=dialog] button, .p-modal button")
        page.see("Completed", seconds=120)
        page.close()
    assert ui.wait(flow_run, "Completed", "Crashed")["state_name"] == "Completed", ui.logs(flow_run)
    done = folder / "workspace" / "captures" / prepared.capture_id / "extractions.jsonl"
    assert [json.loads(line)["sequences"] for line in done.read_text().splitlines()] == [4]
    attempts = list((folder / "workspace" / "jobs" / f"extract-{prepared.capture_id}").glob("[0-9]*"))
    assert len(attempts) == 1, "the extraction's job was not started again"


@in_browser
def test_the_form_starts_a_study_and_its_pages_show_it(ui, study, logged_in):
    _, parameters = study
    form = next(word for word in ui.said.read_text().split() if word.endswith("/run"))
    page = Page(logged_in, form)
    # groups, descriptions, bounds
    page.see("model", "corpus", "capture", "criteria", "compute", "publish_to", "sequences to read; 1 to 1,000,000")
    assert "lease_seconds" not in page.text(), "the sections that are seldom needed are folded"
    page.fill("model", parameters["model"])
    page.fill("source", parameters["corpus"]["source"])
    page.fill("num_sequences", parameters["corpus"]["num_sequences"])
    page.fill("sequence_length", parameters["corpus"]["sequence_length"])
    known = {run["id"] for run in ui.flow_runs()}
    page.click("Submit")
    page.see("scheduled to start now")
    (flow_run,) = {run["id"] for run in ui.flow_runs()} - known
    asked = set(page.requests)
    page.close()

    live = Page(logged_in, f"{ui.url}/runs/flow-run/{flow_run}")
    live.see("one pass over 150 sequences", seconds=120)
    live.see("model:model", "provider:local")
    live.click("Artifacts")
    live.see("PROGRESS", "extract-")
    live.see("Completed", seconds=120)
    run = ui.wait(flow_run, "Completed", "Failed", "Crashed")
    assert run["parameters"]["corpus"]["num_sequences"] == 150
    found = ui.post("/flow_runs/filter", {"flow_runs": {"tags": {"all_": ["model:model", "provider:local"]}}})
    assert flow_run in {item["id"] for item in found}

    assert ui.wait(flow_run, "Completed")["name"] == "study model 150x64 python-docs", "not the form's proposal"
    artifacts = [item for item in ui.artifacts(flow_run) if item["key"]]
    (answer,) = [item for item in artifacts if item["type"] == "markdown"]
    page = Page(logged_in, f"{ui.url}/artifacts/artifact/{answer['id']}")
    page.see("systematic outlier feature", "max magnitude", "What was looked for", "What was read", "report.html")
    assert page.value("document.querySelectorAll('table td').length") >= 7
    shown = "[...document.images].filter(i => i.src.startsWith('data:image/png') && i.naturalWidth > 300).length"
    page.until(f"{shown} === 2", "pictures in the page")
    every = Page(logged_in, next(word for word in ui.said.read_text().split() if word.endswith("/artifacts")))
    every.see("model-150x64-python-docs-", *(item["key"] for item in artifacts))
    asked |= {url for one in (page, live, every) for url in one.requests}
    assert all(url.startswith((ui.url, "data:", "blob:")) for url in asked), "the pages tell nobody"
    said = [event for one in (page, live, every) for event in one.said]
    assert "Content Security Policy" not in json.dumps(said), "what the pages need they may do"


@pytest.mark.studies
def test_a_killed_run_gives_its_slot_back(ui, killed_and_waiting):
    waiter, began = killed_and_waiting
    read_until(waiter, "has a slot", 120)
    assert waiter.wait(60) == 0
    assert time.monotonic() - began < 300
    (limit,) = ui.post("/v2/concurrency_limits/filter", {})
    assert (limit["limit"], limit["active_slots"]) == (1, 0)


@pytest.mark.long
def test_ctrl_c_ends_all_and_it_starts_a_second_time(ui, study):
    _, parameters = study
    (limit,) = ui.post("/v2/concurrency_limits/filter", {})
    ui.call("PATCH", f"/v2/concurrency_limits/{limit['id']}", {"limit": 1})
    long = parameters | {"corpus": parameters["corpus"] | {"num_sequences": 4000}}
    flow_run = ui.run(**long)
    ui.wait(flow_run, "Running")
    before = {run["id"] for run in ui.flow_runs()}
    pids = ui.pids()
    ui.__exit__()
    assert ui._processes[0].returncode == 0, ui.said.read_text()
    assert "cancelling study model 4000x64" in ui.said.read_text()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", ui.port)) != 0

    ui.__enter__()
    assert "concurrency limit outliers-machines is there: 1 " in ui.said.read_text(), "what a person set stays"
    assert {run["id"] for run in ui.flow_runs()} == before
    assert ui.wait(flow_run, "Cancelled", "Running", "Crashed")["state_name"] == "Cancelled"
