"""Answers of a host that are more than one number: nothing of what is asked for is left out on the way."""

from __future__ import annotations

import json

from outliers.machines.answers import parse_answer
from outliers.store.captures import Held


def test_a_capture_of_a_host_has_every_fact_of_one_here():
    held = Held(
        capture_id="0" * 16, model="m", done=2, counted=3, of_sequences=8, layer_batches=4, of_layer_batches=6, bytes=10
    )
    assert all(held.model_dump().values()), "a fact that is 0 could be left out unseen"
    line = json.dumps({"captures": [held.model_dump()]}).encode()
    (found,) = parse_answer("captures", 0, line, "", "lab")["captures"]
    assert Held.model_validate(found) == held


def test_an_older_program_there_does_not_know_all_of_them():
    old = {"capture_id": "0" * 16, "model": "m", "done": 2, "of_sequences": 8, "bytes": 10}
    (found,) = parse_answer("captures", 0, json.dumps({"captures": [old]}).encode(), "", "lab")["captures"]
    assert Held.model_validate(found) == Held.model_validate(old)
