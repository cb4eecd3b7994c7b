"""`outliers runs show`: a finished study read back from the workspace, a folder, and where it is published."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from outliers.analyze import analyze
from outliers.publish import model_slug, publish
from outliers.steps import run_report
from outliers.workspace import open_workspace
from tests import synthetic

COMMAND = str(Path(sys.executable).with_name("outliers"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study in a workspace, and its published URL; feature 3 is systematic, feature 1 is hit in layer 2 alone."""
    values = np.full((4, 2, 10, 6), 0.5, np.float32)
    values[..., 3] = -9.0
    values[2, :, 4, 1] = 7.0
    acts = {site: synthetic.store(values * scale, "bfloat16")[0] for site, scale in (("attn_in", 1), ("mlp_in", 0.8))}
    place = tmp_path_factory.mktemp("runs")
    workspace = open_workspace(place / "workspace")
    prepared = synthetic.prepared_for(acts, "bfloat16")
    synthetic.write_capture(prepared, workspace, acts)
    analyze(prepared, workspace, synthetic.Silent())
    run_report(prepared, workspace, synthetic.Silent())
    target, slug = f"file://{place}/atlas", model_slug(prepared.model.source.id)
    publish(workspace.study(prepared.study_id), target, slug)
    return workspace, prepared, f"{target}/{slug}/{prepared.study_id}"


def show(workspace, *arguments):
    return subprocess.run(
        [COMMAND, "runs", "show", *arguments, "--workspace", str(workspace.root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.servers
def test_a_study_is_shown_from_wherever_it_is(finished, tmp_path):
    workspace, prepared, url = finished
    folder = str(workspace.study(prepared.study_id))
    elsewhere = open_workspace(tmp_path)
    shown = [
        show(workspace),
        show(workspace, prepared.study_id),
        show(elsewhere, folder),
        show(elsewhere, url),
        show(elsewhere, f"{url}/manifest.json"),
    ]
    for done in shown:
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
    assert len({done.stderr for done in shown}) == 1
    said = " ".join(shown[0].stderr.split())
    assert "1 systematic outlier feature (95% interval over sequences: 1 to 1) by pooled at block" in said
    assert "block 0 3 20 2 -9 -7.188" in said


@pytest.mark.servers
def test_one_feature_layer_by_layer(finished):
    workspace, prepared, _ = finished
    done = show(workspace, prepared.study_id, "--feature", "1", "--json")
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert [(row["site"], row["layer"], row["feature"], row["hits"]) for row in found["features"]] == [
        ("attn_in", 2, 1, 2),
        ("block", 2, 1, 2),
    ]
    assert found["summary"]["study_id"] == prepared.study_id
    only = json.loads(show(workspace, prepared.study_id, "--site", "mlp_in", "--layer", "3", "--json").stdout)
    assert [(row["feature"], row["max"]) for row in only["features"]] == [(3, -7.1875)]
    nothing = show(workspace, prepared.study_id, "--feature", "5")
    assert "no row with a hit for feature 5" in nothing.stderr


@pytest.mark.servers
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "there is no study nothing"),
        (["../results"], "there is no study"),
        (["--site", "resid"], "--site resid was not captured; there is: attn_in, mlp_in, block"),
        (["s3://bucket"], "is not TARGET/<model>/<study_id>"),
    ],
)
def test_what_is_not_there_is_refused(finished, arguments, words):
    done = show(finished[0], *arguments)
    assert done.returncode == 2, done.stderr
    assert words in " ".join(done.stderr.split())


@pytest.mark.servers
def test_an_empty_workspace_has_no_newest(tmp_path):
    done = show(open_workspace(tmp_path))
    assert done.returncode == 2
    assert "there is no finished study" in done.stderr
