"""pictures.json against brute force, within its bounds, and refused where it is not the summary's."""

from __future__ import annotations

import json

import numpy as np
import pytest

from outliers.corpus.tokens import load_corpus
from outliers.counting.summary import Summary, merge
from outliers.counting.summary_files import read_summary
from outliers.errors import ForbiddenFile
from outliers.publish.allowlist import NUMBERS, PICTURES, check_numbers
from outliers.publish.manifest import digest_of
from outliers.results.pictures import describe_pictures
from outliers.results.schema import StudySummary
from outliers.steps import run_report
from outliers.workspace import open_workspace
from tests.support import synthetic

LAYERS, SEQUENCES, LENGTH, WIDTH = 4, 2, 40, 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of both sites of the block and resid, reported: feature 1 is systematic, feature 4 is large once."""
    rng = np.random.default_rng(3)
    shape = (LAYERS, SEQUENCES, LENGTH, WIDTH)
    values = {site: rng.normal(0, 1, shape).astype(np.float32) for site in ("attn_in", "mlp_in", "resid")}
    values["attn_in"][:, :, 0:12, 1] = 9.0
    values["mlp_in"][2, 1, 7, 1] = -30.0
    values["mlp_in"][3, 0, 20, 4] = 70.0
    stored = {site: synthetic.store(value, "bfloat16") for site, value in values.items()}
    acts, exact = ({site: pair[k] for site, pair in stored.items()} for k in (0, 1))
    workspace = open_workspace(tmp_path_factory.mktemp("pictures"))
    prepared = synthetic.prepared_for(acts, "bfloat16")
    synthetic.write_capture(prepared, workspace, acts)
    synthetic.study(prepared, workspace)
    run_report(prepared, workspace, synthetic.Silent())
    return prepared, workspace, exact


def files_of(finished):
    prepared, workspace, _ = finished
    folder = workspace.study(prepared.study_id)
    return {name: (folder / name).read_bytes() for name in (*NUMBERS, PICTURES)}


def extreme(values):
    return max(values.ravel().tolist(), key=lambda x: (abs(x), x))


def test_extremes_are_those_of_every_value(finished):
    *_, exact = finished
    found = json.loads(files_of(finished)["pictures.json"])
    for row in found["layers"]:
        own = [(extreme(exact[row["site"]][row["layer"], ..., j]), j) for j in range(WIDTH)]
        wanted = sorted(own, key=lambda pair: (-abs(pair[0]), pair[1]))[:3]
        assert [(item["value"], item["feature"]) for item in row["largest"]] == wanted
    assert [row["feature"] for row in found["features"]][:2] == [1, 4], "systematic first, then the largest"
    assert len(found["features"]) == WIDTH
    for row in found["features"]:
        j = row["feature"]
        for site in ("attn_in", "mlp_in", "resid"):
            assert row["values"][site] == [extreme(exact[site][layer, ..., j]) for layer in range(LAYERS)]
        block = [extreme(np.stack([exact[s][layer, ..., j] for s in ("attn_in", "mlp_in")])) for layer in range(LAYERS)]
        assert row["values"]["block"] == block


def test_kinds_are_those_of_the_corpus(finished):
    """Of 80 tokens `.` is every fifth of a sequence, ids 1 and 3 are special, all others are ` w7`, starts of words."""
    kinds = json.loads(files_of(finished)["pictures.json"])["kinds"]
    assert kinds["tokens"] == 80
    assert kinds["kinds"] == {"delimiter": 16, "special": 2, "digit": 0, "word_start": 62, "word_piece": 0}
    (row,) = kinds["features"]
    assert (row["feature"], row["tokens"]) == (1, 24)
    assert row["kinds"] == {"delimiter": 6, "special": 2, "digit": 0, "word_start": 16, "word_piece": 0}


def test_it_is_no_part_of_the_digest(finished):
    files = files_of(finished)
    before = {name: data for name, data in files.items() if name != "pictures.json"}
    assert digest_of(files) == digest_of(before)
    assert check_numbers(before).files.keys() == before.keys()


def test_a_summary_of_before_has_no_kinds(finished):
    prepared, workspace, _ = finished
    summary = read_summary(workspace.summary(prepared.capture_id, prepared.study_id))
    assert summary.kind_tokens is not None
    summary.kind_tokens = None
    content = StudySummary.model_validate_json(files_of(finished)["summary.json"])
    found = describe_pictures(prepared, summary, content, load_corpus(prepared.corpus, workspace))
    assert found.kinds is None
    assert found.layers
    zero = Summary.zero(summary.frame)
    assert merge(zero, summary).kind_tokens is None, "what was not counted stays unknown"
    assert merge(summary, zero).kind_tokens is None
    assert not merge(zero, zero).kind_tokens.any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(study_id="f" * 16), "of the study"),
        (lambda d: d["layers"].pop(), "not those of summary"),
        (lambda d: d["layers"][0]["largest"][0].update(value=1e6), "summary.json has"),
        (lambda d: d["layers"][0]["largest"].reverse(), "summary.json has"),
        (lambda d: d["features"][0].update(feature=100_000), "of a model with at most"),
        (lambda d: d["layers"][0]["largest"].__setitem__(1, d["layers"][0]["largest"][0]), "there twice"),
        (
            lambda d: d["layers"][0].update(largest=[{"feature": 5, "value": 9.0}, {"feature": 1, "value": 9.0}]),
            "has 9.0",
        ),
        (lambda d: d["features"][0]["values"]["block"].pop(), "other sites or layers"),
        (lambda d: d["features"][0]["values"].pop("block"), "other sites or layers"),
        (lambda d: d["features"].reverse(), "do not begin with the systematic"),
        (lambda d: d["features"].pop(0), "do not begin with the systematic"),
        (lambda d: d["features"][1]["values"]["resid"].__setitem__(2, -1e3), "resid of layer 2, more than any there"),
        (lambda d: d["features"][1]["values"]["block"].__setitem__(0, -70.0), "block of layer 0, more than any there"),
        (lambda d: d["features"][0]["values"].update(block=[9.0] * 4), "9.0 at most, summary.json has 30"),
        (lambda d: d["features"].extend([{"feature": 99, "values": {}}] * 2), "there twice"),
        (lambda d: d["kinds"].update(tokens=81), "other tokens"),
        (lambda d: d["kinds"]["features"][0].update(feature=0), "other tokens or features"),
        (lambda d: d["kinds"]["features"].clear(), "other tokens or features"),
        (lambda d: d["kinds"]["features"][0].update(tokens=25), "more tokens of a kind"),
        (lambda d: d["kinds"]["features"][0]["kinds"].update(digit=3, word_start=13), "more tokens of a kind"),
        (lambda d: d["kinds"]["kinds"].update(delimiter=80), "tokens by kind"),
        (lambda d: d.update(activations=[1.0]), "Extra inputs"),
        (lambda d: d["features"][0]["values"]["block"].__setitem__(0, "x"), "valid number"),
    ],
)
def test_what_is_not_the_summarys_is_refused(finished, change, said):
    files = files_of(finished)
    found = json.loads(files["pictures.json"])
    change(found)
    with pytest.raises(ForbiddenFile, match=said) as error:
        check_numbers(files | {"pictures.json": json.dumps(found).encode()})
    assert "pictures.json" in str(error.value)
