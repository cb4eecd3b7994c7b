"""The id of a probe: what it depends on, and what it does not."""

from __future__ import annotations

import pytest

from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.study.probes import placed_probe, probe_folder, probe_id
from tests.support import tiny


@pytest.fixture
def prepared(tmp_path, workspace, text):
    folder = tiny.make_model(tmp_path / "model")

    def of(**parts):
        spec = tiny.spec_for(folder, text) | {"probe": {"zero": ("3",)}} | parts
        return prepare(StudySpec.model_validate(spec), workspace)

    return of


def test_it_depends_on_the_study_and_on_what_is_asked(prepared):
    first = probe_id(prepared())
    assert len(first) == 16 and first == probe_id(prepared())
    others = [
        prepared(probe={"zero": ("4",)}),
        prepared(probe={"zero": ("3",), "probe_sequences": 2}),
        # the same capture, and other features that a probe of it would name
        prepared(criteria={"magnitude": 5.0}),
        prepared(formats=["nvfp4"]),
        prepared(capture={"batch_sequences": 2}),
    ]
    assert len({first, *map(probe_id, others)}) == 1 + len(others)


def test_it_does_not_depend_on_the_machine_or_the_target(prepared, tmp_path):
    again = prepared(compute={"lease_seconds": 60}, publish_to=f"file://{tmp_path}/store")
    assert probe_id(again) == probe_id(prepared())


def test_it_is_no_part_of_the_study(prepared, workspace):
    probed, plain = prepared(), prepared(probe={})
    assert (probed.study_id, probed.capture_id) == (plain.study_id, plain.capture_id)
    assert placed_probe(probed, workspace).is_relative_to(workspace.study(plain.study_id))
    assert probe_folder(probed, workspace).is_relative_to(workspace.capture(plain.capture_id))
