"""A probe around its engine: in the run of a study, afterwards on the kept capture, published, answered at once, refused."""

from __future__ import annotations

import json

import pytest

from outliers.dispatch.study import dispatch_study
from outliers.errors import BadInput
from outliers.publish.outcome import find_outcome
from outliers.publish.probes import is_probed, newest_probe, read_probe
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.study.probes import placed_probe
from tests.support import tiny
from tests.support.runs import quiet_run

SITES = ("attn_in", "mlp_in", "o_in", "down_in")


def study_of(tmp_path, workspace, text, probe, **more):
    folder = tmp_path / "model"
    if not folder.exists():
        tiny.make_model(folder)
    parts = {"capture": {"sites": SITES, "perplexity": True}, "probe": probe} | more
    return prepare(StudySpec.model_validate(tiny.spec_for(str(folder), text, sequences=3, **parts)), workspace)


def run(prepared, workspace):
    heard = []
    run = quiet_run(prepared, workspace, "run")
    run.listen(lambda step, event: heard.append(step))
    return dispatch_study(run), heard


@pytest.mark.servers
@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.studies)])
def test_a_study_is_probed_in_its_run_and_again_on_its_kept_capture(tmp_path, workspace, text, again):
    """`again`: another probe follows on the kept capture, and then the same, whose numbers were damaged."""
    target = f"file://{tmp_path}/store"
    first = study_of(tmp_path, workspace, text, {"zero": ("random=1",)}, publish_to=target)
    outcome, heard = run(first, workspace)
    assert {"extract", "analyze", "report", "probe"} <= set(heard)
    assert "tokens of 3 sequences" in outcome.verdict and outcome.probe.endswith("probe.html")
    found = read_probe(placed_probe(first, workspace))
    assert found.probes.gates.reference.compared and found.probes.gates.identity.value == 0
    # published beside the study, whose manifest and id are those of a study without a probe
    there = next((tmp_path / "store").glob(f"*/{first.study_id}/probes/*/manifest.json"))
    assert json.loads(there.read_text())["probe_id"] == found.probes.probe_id
    assert first.study_id == study_of(tmp_path, workspace, text, {}, publish_to=target).study_id
    # answered at once
    answered = find_outcome(first, workspace)
    assert answered.cached and answered.verdict == outcome.verdict
    if not again:
        return
    # another probe of the same study: nothing is read or counted again
    second = study_of(tmp_path, workspace, text, {"quantize": ("int8_token",)}, publish_to=target)
    assert find_outcome(second, workspace) is None
    outcome, heard = run(second, workspace)
    assert "probe" in heard and not {"extract", "analyze", "report"} & set(heard)
    assert "int8_token" in outcome.verdict
    assert len(list((tmp_path / "store").glob(f"*/{first.study_id}/probes/*/manifest.json"))) == 2
    assert newest_probe(workspace.study(first.study_id)).probes.probe_id != found.probes.probe_id
    # a damaged one is made anew, from its numbers
    (placed_probe(second, workspace) / "probes.json").write_text("{}")
    assert not is_probed(second, workspace)
    anew, _ = run(second, workspace)
    assert anew.verdict == outcome.verdict and is_probed(second, workspace)


@pytest.mark.parametrize(
    ("probe", "capture", "message"),
    [
        ({"zero": ("99",)}, {}, "has the features 0 to 31"),
        ({"zero": ("3",)}, {"perplexity": False}, "add --perplexity"),
        ({"quantize": ("had64+nvfp4",)}, {}, "rotates blocks of 64 features"),
    ],
)
def test_what_can_not_be_probed_is_refused_before_anything_runs(tmp_path, workspace, text, probe, capture, message):
    capture = {"sites": SITES, "perplexity": True} | capture
    prepared = study_of(tmp_path, workspace, text, probe, capture=capture)
    with pytest.raises(BadInput, match=message):
        run(prepared, workspace)
    assert not (workspace.root / "jobs").exists()


def test_a_probe_of_shards_is_refused_by_the_spec(tmp_path, workspace, text):
    with pytest.raises(ValueError, match="a probe reads the whole model on one machine"):
        study_of(tmp_path, workspace, text, {"zero": ("3",)}, compute={"shards": 2})
