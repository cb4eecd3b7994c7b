"""`outliers verify --repair`, then the same command: what was damaged is computed, counted, and must come to the first digest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outliers.store.verify import verify
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.damaged import flip
from tests.support.synthetic import Silent

COMMAND = str(Path(sys.executable).with_name("outliers"))


@pytest.mark.long
@pytest.mark.servers
def test_the_same_command_computes_what_a_repair_took_back(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    made = tiny.spec_for(tiny.make_model(tmp_path / "llama"), text, capture={"batch_sequences": 1})
    made |= {"publish_to": f"file://{tmp_path}/store", "compute": {"workspace": str(tmp_path / "ws")}}
    (tmp_path / "spec.json").write_text(json.dumps(made))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}

    def outliers(*argv):
        done = subprocess.run(
            [COMMAND, *argv],
            env=kept | {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    study = ("study", "--spec", str(tmp_path / "spec.json"), "--json")
    first = outliers(*study)
    workspace = open_workspace(tmp_path / "ws")
    capture = workspace.capture(first["capture_id"])
    manifest = json.loads(Path(first["published"].removeprefix("file://")).read_bytes())
    flip(capture / "activations.zarr" / "mlp_in" / "c.1.2.0.0", 100)
    assert verify(capture, Silent(), repair=True).marked == (2,)
    listed = ("captures", "list", "--workspace", str(workspace.root), "--json")
    assert outliers(*listed)["captures"][0]["done"] == 3
    again = outliers(*study)
    assert not again["cached"]
    assert outliers(*listed)["captures"][0]["done"] == 4
    assert verify(capture, Silent()).sound
    results = json.loads((workspace.study(first["study_id"]) / "manifest.json").read_bytes())
    assert results["results_digest"] == manifest["results_digest"]
    assert outliers(*study)["cached"]
