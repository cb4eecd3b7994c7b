"""Formats of a study in parts, by the commands that docs/quantization.md names: the files are those of one machine."""

from __future__ import annotations

import json
import os

import pytest

from outliers.study.prepare import parse_spec, prepare
from outliers.workspace import open_workspace
from tests.support import tiny
from tests.support.commands import run_command, run_step

PARTS = {"a": "0:2", "b": "2:6"}


def step(verb, spec, place, *more):
    done = run_step(verb, spec, "--workspace", place, *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.servers
@pytest.mark.studies
def test_three_merges_give_what_one_machine_gives(tmp_path):
    model = tiny.make_model(tmp_path / "model", "Llama")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten eleven. " * 80)
    content = tiny.spec_for(model, tmp_path / "text.txt", 6, 16) | {"formats": {"formats": ["int8_tensor", "nvfp4"]}}
    spec, home = tmp_path / "study.json", open_workspace(tmp_path / "home")
    spec.write_text(json.dumps(content))
    for verb in ("extract", "analyze", "report"):
        step(verb, spec, tmp_path / "one")
    study = prepare(parse_spec(content, "the test"), home)
    for name, span in PARTS.items():
        for verb in ("extract", "analyze"):
            step(verb, spec, tmp_path / name, "--sequences", span)
    summaries = [open_workspace(tmp_path / name).summary(study.capture_id, study.study_id) for name in PARTS]
    merged = home.summary(study.capture_id, study.study_id)

    def merge():
        return run_command(tmp_path, "merge", *summaries, "--workspace", home.root, environment=os.environ)

    for missing in ("ranges", "errors"):
        done = merge()
        assert (done.returncode, f"the {missing} of formats of some parts" in done.stdout) == (0, True), done.stderr
        for name, span in PARTS.items():
            made = step("formats", spec, tmp_path / name, "--sequences", span, "--summary", merged)
            assert made["measured"] == missing
    done = merge()
    assert done.returncode == 0, done.stderr
    here, there = home.study(study.study_id), open_workspace(tmp_path / "one").study(study.study_id)
    assert (here / "quantization.parquet").read_bytes() == (there / "quantization.parquet").read_bytes()
    digests = [json.loads((folder / "manifest.json").read_text())["results_digest"] for folder in (here, there)]
    assert digests[0] == digests[1]
