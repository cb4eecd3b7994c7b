"""A model and a data set of the hub, end to end with the real commands: refused, planned, fetched, read, gone on with offline."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import tiny
from tests.support.hub_server import Fault, Repo, client_environment, commit_id, hub_server

pytestmark = pytest.mark.servers

COMMIT, LATER = commit_id("first"), commit_id("second")
BIN = Path(sys.executable).parent


def table():
    buffer = io.BytesIO()
    rows = [{"text": f"Document {n}: " + "call me Ishmael. " * 30} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "model"
    tiny.make_model(folder)
    real = {path.name: path.read_bytes() for path in folder.iterdir()}
    later = real | {"model.safetensors": real["model.safetensors"][:-4] + b"\x00\x00\x80\x3f"}
    data = Repo("datasets", "org/texts", {COMMIT: {"data/train-00000-of-00001.parquet": table()}}, {"main": COMMIT})
    repos = [
        Repo("models", "org/tiny", {COMMIT: real, LATER: later}, {"main": COMMIT}),
        Repo("models", "org/gated", {COMMIT: real}, {"main": COMMIT}, gated="manual"),
        data,
    ]
    with hub_server(*repos) as running:
        yield running


@pytest.mark.studies
def test_a_study_of_the_hub(hub, tmp_path):
    shape = ("--corpus", "org/texts", "--num-sequences", "3", "--sequence-length", "32")
    place = ("--workspace", str(tmp_path / "ws"))

    def run(*command, **environment):
        known = client_environment(hub.url, tmp_path / "home", **environment)
        done = subprocess.run(command, env=known, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    # refused before anything is asked of a machine: not there, gated
    for model, message in (
        ("org/nothing", "no model of the hub"),
        ("org/gated", "org/gated is gated: accept its terms"),
    ):
        for verb in ("study", "plan"):
            refused = run(BIN / "outliers", verb, "--model", model, *shape, *place)
            assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
    # planned and inspected from the config alone: no weight has come
    plan = json.loads(run(BIN / "outliers", "plan", "--model", "org/tiny", *shape, *place, "--json").stdout)
    assert plan["download_bytes"] == plan["checkpoint_bytes"] == plan["total_parameters"] * 4
    assert not hub.requests("GET .*safetensors")
    # the study itself, the weights cut off in the middle once
    spec = tmp_path / "study.json"
    spec.write_text(run(BIN / "outliers", "study", "--model", "org/tiny", *shape, *place, "--print-spec").stdout)
    hub.faults.append(Fault("GET .*model.safetensors", cut_after=50_000))
    step = (sys.executable, "-m", "outliers", "extract", str(spec), *place)
    done = run(*step)
    assert done.returncode == 0, done.stderr
    assert "download" in done.stderr
    assert json.loads(done.stdout)["sequences"] == 3
    # again, without the hub: the same commit and the same ids are here, though the branch has moved
    hub.find("models", "org/tiny").branches["main"] = LATER
    pinned = json.loads(spec.read_text())
    pinned["corpus"]["corpus_revision"] = COMMIT
    pinned["model"]["revision"] = COMMIT
    spec.write_text(json.dumps(pinned))
    hub.forget()
    again = run(*step, HF_HUB_OFFLINE="1")
    assert json.loads(again.stdout)["sequences"] == 0, again.stderr
    assert hub.requests() == []
    for verb in ("analyze", "report"):
        assert run(sys.executable, "-m", "outliers", verb, str(spec), *place, HF_HUB_OFFLINE="1").returncode == 0
    (summary,) = (tmp_path / "ws" / "results").glob("*/summary.json")
    content = json.loads(summary.read_text())
    assert (content["model"]["id"], content["model"]["revision"]) == ("org/tiny", COMMIT)
    assert content["corpus"]["source"] == "org/texts"
    # nothing is run or fetched for a moved branch until it is asked for: then it is another study
    moved = json.loads(run(BIN / "outliers", "models", "inspect", "org/tiny", *place, "--json").stdout)
    assert moved["source"]["revision"] == LATER
