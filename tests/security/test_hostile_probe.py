"""A machine that gives something else than the probe that was asked for: refused in words, and nothing is placed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outliers.errors import JobFailed
from outliers.publish.probes import receive_probe
from outliers.results.schema.probes import sensitivity_bytes
from outliers.results.write import json_bytes
from outliers.spec import StudySpec
from outliers.study.prepare import prepare
from outliers.study.probes import placed_probe, probe_id
from tests.support import tiny
from tests.support.probed import change, probes


class Host:
    """A machine that gives what it likes."""

    name = "box"

    def __init__(self, files):
        self.files = files

    def download(self, remote, local, *, max_bytes, max_files, names):
        assert max_files == 2 and max_bytes <= 16_000_000 and set(names) == {"probes.json", "sensitivity.parquet"}
        Path(local).mkdir()
        for name, data in self.files.items():
            (Path(local) / name).write_bytes(data)


@pytest.fixture
def prepared(tmp_path, workspace, text):
    spec = tiny.spec_for(
        tiny.make_model(tmp_path / "model"), text, probe={"zero": ("3",)}, capture={"perplexity": True}
    )
    return prepare(StudySpec.model_validate(spec), workspace)


def given(prepared, **more):
    own = {
        "probe_id": probe_id(prepared),
        "study_id": prepared.study_id,
        "capture_id": prepared.capture_id,
        "model": prepared.model.source.id,
        "corpus": prepared.corpus.source,
        "dtype": prepared.model.dtype,
    }
    made = probes(change("zero 3", "zero", features=[3])).model_dump(mode="json") | own | more
    return {"probes.json": json_bytes(made), "sensitivity.parquet": sensitivity_bytes([])}


def test_what_was_asked_for_is_placed(prepared, workspace):
    found = receive_probe(prepared, Host(given(prepared)), workspace)
    assert found["probe_id"] == probe_id(prepared) and placed_probe(prepared, workspace).is_dir()


@pytest.mark.parametrize(
    "more",
    [
        {"study_id": "e" * 16},
        {"probe_id": "e" * 16},
        {"model": "other/model"},
        {"corpus": "the words of a diary"},
        {"dtype": "float16"},
        {"secret": "x"},
        {"notes": ["x" * 1_001]},
    ],
)
def test_another_probe_is_refused(prepared, workspace, more):
    with pytest.raises(JobFailed, match=r"the probe that box gives of .* is refused"):
        receive_probe(prepared, Host(given(prepared, **more)), workspace)
    assert not placed_probe(prepared, workspace).exists()


@pytest.mark.parametrize(
    "data", [b"", b"[" * 100_000, b'{"probe_id": NaN}', json.dumps({"a": 1}).encode(), b"\xff\xfe"]
)
def test_what_is_no_probe_is_refused(prepared, workspace, data):
    for name in ("probes.json", "sensitivity.parquet"):
        with pytest.raises(JobFailed, match="is refused"):
            receive_probe(prepared, Host(given(prepared) | {name: data}), workspace)
    assert not placed_probe(prepared, workspace).exists()


def test_a_file_that_is_missing_is_refused(prepared, workspace):
    files = given(prepared)
    del files["probes.json"]
    with pytest.raises(JobFailed, match="is refused"):
        receive_probe(prepared, Host(files), workspace)
