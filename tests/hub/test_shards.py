"""Weights of the hub file by file: each is here while a layer needs it, in a folder of our own, and the capture is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.support import tiny
from tests.support.hub_server import Fault, Repo, client_environment, commit_id, hub_server
from tests.support.layered import files_of, study_of

pytestmark = pytest.mark.servers

COMMIT = commit_id("first")
RUN = """
import json, sys
from pathlib import Path
from outliers.capture.extract import extract
from outliers.workspace import open_workspace
from tests.support.layered import study_of, files_of, stop_at
from tests.support.synthetic import Silent
root, text, stop = sys.argv[1:]
own = open_workspace(root)
study = study_of(own, "org/tiny", text, "layers", no_keep_weights=True)
most, held = 0, own.models / study.model.source.key / "shards"
stopping = stop_at(stop) if stop else lambda done: None
def step(done):
    global most
    most = max(most, sum(path.stat().st_size for path in held.rglob("*.safetensors") if not path.is_symlink() or path.exists()))
    stopping(done)
extract(study, own, Silent(), on_step=step)
left = [str(path) for path in held.rglob("*.safetensors")]
print(json.dumps({"most": most, "left": left, "capture": str(own.capture(study.capture_id))}))
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The files of a model of eight layers in shards of about one layer."""
    folder = tmp_path_factory.mktemp("model")
    tiny.make_model(folder, "Qwen3Moe", num_hidden_layers=8)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 6
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(real):
    with hub_server(Repo("models", "org/tiny", {COMMIT: real}, {"main": COMMIT})) as running:
        yield running


def run(hub, tmp_path, text, stop=""):
    known = client_environment(hub.url, tmp_path / "home")
    command = [sys.executable, "-c", RUN, str(tmp_path / "ws"), str(text), stop]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, env=known, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.studies
def test_a_disk_of_a_few_files_is_enough(hub, tmp_path, text, real, workspace):
    hub.faults.append(Fault("GET .*model-00003.*safetensors", cut_after=20_000))
    stopped = run(hub, tmp_path, text, stop="layer 3 is done")
    assert "Stopped: layer 3 is done" in stopped.stderr
    first = {asked.path for asked in hub.requests("GET .*safetensors$")}
    hub.forget()
    done = run(hub, tmp_path, text)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    weights = {name: len(data) for name, data in real.items() if name.endswith(".safetensors")}
    # the files with the embedding and the head, of this layer and of the next one: not half of the model
    assert 0 < found["most"] <= sum(weights.values()) // 2
    assert found["left"] == []
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    # what the first call had no more use for is not fetched again
    again = {asked.path for asked in hub.requests("GET .*safetensors$")}
    assert first - again
    # the same files as a whole capture of a folder with these weights makes
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in real.items():
        (folder / name).write_bytes(data)
    from outliers.capture.extract import extract
    from tests.support.synthetic import Silent

    study = study_of(workspace, folder, text, "whole")
    extract(study, workspace, Silent())
    whole = files_of(workspace, study)
    root = Path(found["capture"])
    for name in whole.keys() - {"capture.json"}:
        found_lines, lines = ((root / name).read_bytes(), whole[name])
        if name == "journal.jsonl":  # two writers finish the sequences of a batch in either order
            found_lines, lines = (sorted(data.splitlines()) for data in (found_lines, lines))
        assert found_lines == lines, name


def test_offline_nothing_is_fetched_file_by_file(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from outliers.errors import UnknownModel
    from outliers.hub.shards import Shards

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownModel, match=r"fetched file by file .* the hub is switched off"):
        Shards("org/tiny", COMMIT, tmp_path)
