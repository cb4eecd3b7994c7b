"""The atlas columns of a probe: which verdict counts, and that one which is not understood leaves the study where it is."""

from __future__ import annotations

import json

from outliers.advice.advise import advise
from outliers.atlas.verdict import verdict_columns
from tests.support.probed import STUDY, change, probes


def verdict(*changes, **more):
    return advise(probes(*changes, **more), [], 0.05).model_dump(mode="json")


BOTH = (
    change("int8", format="int8_token", kl=0.03),
    change("fp4", format="nvfp4", kl=0.04),
    change("zero", "zero", group="systematic", features=[1], perplexity=99.0),
)


def columns(*verdicts):
    return verdict_columns([json.dumps(one).encode() for one in verdicts], STUDY)


def test_the_fewest_bits_within_the_budget_win():
    found = columns(verdict(*BOTH))
    assert (found["best_format"], found["int8_kl"], found["nvfp4_kl"]) == ("nvfp4", 0.03, 0.04)
    assert found["perplexity_without_features"] == 99.0
    assert columns(verdict(BOTH[0], change("fp4", format="nvfp4", kl=0.4)))["best_format"] == "int8_token"


def test_of_several_probes_the_one_that_tried_most_counts():
    assert columns(verdict(BOTH[0], probe_id="e" * 16), verdict(*BOTH))["probe_id"] == "b" * 16


def test_what_is_not_understood_is_passed_over():
    newer = verdict(*BOTH)
    newer["formats"][0]["format"] = "fp3_someday"
    assert columns(newer | {"newer": 1})["best_format"] in ("int8_token", "nvfp4")
    assert columns({"a": 1}) == columns(verdict(*BOTH) | {"study_id": "e" * 16}) == {}
