"""Sweeps that run: the command over the offline file, the deployment on a real server and worker, cancels of both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.server.served import SEED
from outliers.study.prepare import prepare
from outliers.sweep.sweep import make_sweep, read_sweep
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.cases import first_here
from tests.support.held_job import held_until_cancelled, until
from tests.support.offline_models import make_models

pytestmark = pytest.mark.servers

ROOT = Path(__file__).resolve().parents[2]
OUTLIERS = str(Path(sys.executable).with_name("outliers"))
OVER = ("Completed", "Failed", "Crashed", "Cancelled")


def extracted(workspace, capture_id):
    """Sequences that each extraction of a capture read, from the machine's own record."""
    record = workspace.capture(capture_id) / "extractions.jsonl"
    return [json.loads(line)["sequences"] for line in record.read_text().splitlines()] if record.exists() else []


def systematic(report):
    """The systematic features of a study, from the summary beside its report."""
    summary = json.loads(Path(report).with_name("summary.json").read_text())
    return {row["feature"] for row in summary["systematic"]}


def command(folder, *arguments, server=None):
    """argv and environment of `outliers sweep ...` with a home and a workspace of its own; `server`: address of Prefect's."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k == SEED or not k.startswith(("AWS_", "PREFECT_", "OUTLIERS_", "HF_TOKEN"))
    }
    home = {"HOME": str(folder / "home"), "OUTLIERS_WORKSPACE": str(folder / "ws")}
    home |= {"PREFECT_API_URL": server} if server else {}
    return [OUTLIERS, "sweep", *map(str, arguments)], clean | home


def run(folder, *arguments, server=None):
    argv, environment = command(folder, *arguments, server=server)
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.studies
def test_the_offline_sweep_and_a_second_run_that_does_only_what_is_missing(tmp_path, smollm2_workspace, prefect_home):
    """One model is not there yet: the others are done, the sweep failed. With it, the same command runs it alone."""
    place = tmp_path / "my sweeps"
    place.mkdir()
    shutil.copy(ROOT / "sweeps" / "offline.toml", place)
    make_models(place / "offline-models", smollm2_workspace)
    late = place / "offline-models" / "tiny-gpt-oss"
    late.rename(place / "not yet")
    atlas = f"file://{place}/atlas"
    asked = ("offline.toml", "--publish-to", atlas, "--workspace", smollm2_workspace.root)

    planned = json.loads(run(place, *asked, "--dry-run", "--json").stdout)
    refused = {study["name"]: study["refused"] for study in planned["studies"]}
    assert {name for name, text in refused.items() if text} == {"tiny-gpt-oss"}
    assert not (place / "atlas").exists()

    done = run(place, *asked)
    assert done.returncode == 1, done.stderr
    said = done.stderr
    assert "tiny-gpt-oss: failed: refused: there is no model at" in said
    assert done.stdout.rstrip().endswith("1 of 5 studies failed: tiny-gpt-oss")
    assert "first       make offline-models, in the checkout (for tiny-gpt-oss)\n" in done.stdout
    assert said.count(": started\n") == 4
    assert said.count(": done in ") == 4
    assert "Traceback" not in said

    (place / "not yet").rename(late)
    sweep = read_sweep(place / "offline.toml", {"publish_to": atlas})
    prepared = {study.name: prepare(study.spec, smollm2_workspace) for study in sweep.studies}
    before = {name: extracted(smollm2_workspace, one.capture_id) for name, one in prepared.items()}
    once = {name: [2] for name in prepared}
    assert before == once | {"tiny-gpt-oss": []}
    # the first run had a server of its own; this one finds one that is there
    again = run(place, *asked, "--json", server=prefect_home.api)
    assert again.returncode == 0, again.stderr
    found = {study["name"]: study for study in json.loads(again.stdout)["studies"]}
    assert {name for name, study in found.items() if not study["cached"]} == {"tiny-gpt-oss"}
    assert {name: extracted(smollm2_workspace, one.capture_id) for name, one in prepared.items()} == once
    assert all(study["published"].startswith(atlas) for study in found.values())
    # the MoE computes what SmolLM2 computes: whichever experts are chosen, they are its own MLP
    features = {name: systematic(study["report"]) for name, study in found.items()}
    assert features["smollm2-moe"] == features["smollm2-bfloat16"] != set()

    # all there: no server is started, nothing is written
    last = run(place, *asked)
    assert (last.returncode, "starting Prefect" in last.stderr) == (0, False)
    assert "5 of 5 studies are done, 5 were there already" in last.stdout


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A study that takes a while: (folder, its entry)."""
    folder = tmp_path_factory.mktemp("slow")
    model = tiny.make_model(
        folder / "model", "Llama", hidden_size=64, num_hidden_layers=8, max_position_embeddings=2048
    )
    corpus = {"source": "builtin:python-docs", "num_sequences": 100, "sequence_length": 512}
    return folder, {"name": "slow", "model": model, "corpus": corpus}


@pytest.mark.studies
def test_a_sweep_that_is_killed_leaves_no_child_and_no_job(prefect_home, slow):
    """SIGKILL of the command: its study's process hears of it, and takes the job along as Ctrl-C does."""
    folder, entry = slow
    (folder / "slow.toml").write_text(
        f"[[study]]\nname = 'slow'\nmodel = '{entry['model']}'\n"
        "corpus = {source = 'builtin:python-docs', num_sequences = 100, sequence_length = 512}\n"
    )
    workspace = open_workspace(folder / "ws")
    prepared = prepare(read_sweep(folder / "slow.toml").studies[0].spec, workspace)
    journal = workspace.capture(prepared.capture_id) / "journal.jsonl"
    argv, environment = command(folder, "slow.toml", server=prefect_home.api)
    with (
        (folder / "said").open("wb") as said,
        subprocess.Popen(argv, cwd=folder, env=environment, stderr=said) as sweep,
        held_until_cancelled(workspace.root, f"extract-{prepared.capture_id}", journal),
    ):
        sweep.send_signal(signal.SIGKILL)
        assert sweep.wait(20) == -signal.SIGKILL
    assert 0 < len(journal.read_text().splitlines()) < 100
    (log,) = (workspace.root / "sweeps" / "slow").glob("*/slow.log")
    until(lambda: "interrupted: the same command goes on" in log.read_text(), "its last words", 30)


# the deployment


def start(prefect_home, **parameters):
    """`prefect deployment run sweep/sweep`; the id of the flow run."""
    before = {one["id"] for one in sweeps(prefect_home)}
    options = [part for name, value in parameters.items() for part in ("-p", f"{name}={json.dumps(value)}")]
    prefect_home.prefect("deployment", "run", "sweep/sweep", *options)
    (made,) = {one["id"] for one in sweeps(prefect_home)} - before
    return made


def sweeps(prefect_home):
    return prefect_home.post("/flow_runs/filter", {"flows": {"name": {"any_": ["sweep"]}}})


def children(prefect_home, flow_run):
    """Flow runs that a sweep started."""
    return prefect_home.post("/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [flow_run]}}})


def newest_table(prefect_home, flow_run):
    tables = [one for one in prefect_home.artifacts(flow_run) if one["type"] == "table"]
    return {row["study"]: row for row in json.loads(max(tables, key=lambda one: one["created"])["data"])}


@pytest.mark.long
def test_the_deployment_runs_a_child_each_and_says_which_failed(prefect_home, tmp_path):
    """One of three fails for real (its plots have no place); without the obstacle a second run does that one alone."""
    workspace = open_workspace(tmp_path / "ws")
    model = tiny.make_model(tmp_path / "model", "Llama", dtype="bfloat16")
    asked = {
        "study": [{"name": "tiny", "model": model}],
        "defaults": {"corpus": {"source": "builtin:python-docs", "sequence_length": 32}},
        "matrix": {"num_sequences": [3, 4, 5]},
        "parallel": 2,
        "workspace": str(workspace.root),
    }
    content = {name: asked[name] for name in ("study", "defaults", "matrix")}
    changes = {"compute": {"workspace": str(workspace.root)}}
    prepared = {s.name: prepare(s.spec, workspace) for s in make_sweep(content, "x", None, changes).studies}
    obstacle = workspace.study(prepared["tiny-4"].study_id) / "plots"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")

    first = start(prefect_home, **asked)
    ended = prefect_home.wait(first, *OVER)
    assert ended["state_name"] == "Failed", prefect_home.logs(first)
    assert "1 of 3 studies failed: tiny-4: " in ended["state"]["message"]
    assert "Done: tiny-3, tiny-5" in ended["state"]["message"]
    assert sorted(one["state_name"] for one in children(prefect_home, first)) == ["Completed", "Completed", "Failed"]
    rows = newest_table(prefect_home, first)
    assert {name: (row["state"], row["features"]) for name, row in rows.items()} == {
        "tiny-3": ("done", 1),
        "tiny-4": ("failed", None),
        "tiny-5": ("done", 1),
    }
    (progress,) = [one for one in prefect_home.artifacts(first) if one["type"] == "progress"]
    assert float(progress["data"]) == 100.0
    counts = {name: extracted(workspace, one.capture_id) for name, one in prepared.items()}
    assert counts == {"tiny-3": [3], "tiny-4": [4], "tiny-5": [5]}

    obstacle.unlink()
    # what was counted of it is gone too: otherwise its results would be written from that, without a run
    shutil.rmtree(workspace.summary(prepared["tiny-4"].capture_id, prepared["tiny-4"].study_id))
    second = start(prefect_home, **asked)
    ended = prefect_home.wait(second, *OVER)
    assert ended["state_name"] == "Completed", prefect_home.logs(second)
    assert len(children(prefect_home, second)) == 1, "what is there is answered without a run"
    assert {name: extracted(workspace, one.capture_id) for name, one in prepared.items()} == counts
    states = {name: row["state"] for name, row in newest_table(prefect_home, second).items()}
    assert states == {"tiny-3": "there already", "tiny-4": "done", "tiny-5": "there already"}


@pytest.mark.long
def test_a_cancelled_sweep_cancels_its_children(prefect_home, slow):
    folder, entry = slow
    workspace = open_workspace(folder / "deployed")
    sweep = make_sweep({"study": [entry]}, "x", None, {"compute": {"workspace": str(workspace.root)}})
    prepared = prepare(sweep.studies[0].spec, workspace)
    journal = workspace.capture(prepared.capture_id) / "journal.jsonl"
    flow_run = start(prefect_home, study=[entry], workspace=str(workspace.root))
    with held_until_cancelled(workspace.root, f"extract-{prepared.capture_id}", journal):
        prefect_home.prefect("flow-run", "cancel", flow_run)
    prefect_home.wait(flow_run, "Cancelled", seconds=60)
    (child,) = children(prefect_home, flow_run)
    prefect_home.wait(child["id"], "Cancelled", seconds=60)
    assert 0 < len(journal.read_text().splitlines()) < 100


@pytest.mark.studies
def test_a_sweep_that_can_not_be_understood_fails_before_any_child(prefect_home):
    flow_run = start(prefect_home, study=[{"model": "a/b", "corpuss": "x"}])
    ended = prefect_home.wait(flow_run, *OVER)
    assert ended["state_name"] == "Failed"
    assert "study 1: corpuss is not a field (did you mean corpus?)" in ended["state"]["message"]
    assert children(prefect_home, flow_run) == []


@pytest.mark.parametrize(
    ("parameter", "words"),
    first_here(
        [
            ("publish_to=s3://me:secret@bucket/atlas", "publish_to"),
            ("parallel=0", "0 is less than the minimum of 1"),
            ("stagger_seconds=3601", "3601 is greater than the maximum of 3600"),
            ('study=[{"model": "a/b"}, {"model": "c/d", "publish_to": "s3://me:secret@b/x"}]', "study[1].publish_to"),
            ('defaults={"publish_to": "s3://me:secret@b/x"}', "defaults.publish_to"),
            ('matrix={"publish_to": ["s3://b/x", "s3://me:secret@b/x"]}', "matrix.publish_to[1]"),
        ],
    ),
)
def test_what_breaks_a_bound_is_refused_before_there_is_a_run(prefect_home, parameter, words):
    """A run's page would show the password."""
    before = {one["id"] for one in sweeps(prefect_home)}
    options = ("-p", 'study=[{"model": "a/b"}]', "-p", parameter)
    said = prefect_home.prefect("deployment", "run", "sweep/sweep", *options, check=False)
    assert words in " ".join(said.split())
    assert {one["id"] for one in sweeps(prefect_home)} == before
