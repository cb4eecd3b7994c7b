"""The results of a probe: what is kept beside a study, what is refused, and what is published once."""

from __future__ import annotations

import json
import shutil

import pytest

from outliers.errors import DamagedResults, DigestConflict, PublishRefused
from outliers.publish.allowlist import check_listing
from outliers.publish.contents import NotAllowedError, check_probes, check_sensitivity
from outliers.publish.probes import newest_probe, place_probe, publish_probe, read_probe
from outliers.results.schema.probes import sensitivity_bytes
from outliers.results.write import json_bytes
from tests.support.probed import PROBE, STUDY, change, probes, row

ROWS = [row("attn_in", 0, "int8_token", 0.03, kl=0.03), row("mlp_in", 1, "nvfp4", 0.2)]


@pytest.fixture
def placed(workspace):
    folder = workspace.study(STUDY) / "probes" / PROBE
    place_probe(probes(change("int8_token", format="int8_token")), ROWS, folder, workspace)
    return folder


def test_a_probe_is_read_as_it_was_placed(placed, workspace):
    found = read_probe(placed)
    assert found.probes.probe_id == PROBE
    assert found.sensitivity == ROWS
    assert found.advice.formats[0].format == "int8_token"
    assert newest_probe(workspace.study(STUDY)).folder == placed
    assert read_probe(placed.parent / "other") is None
    check_listing(workspace.study(STUDY))


@pytest.mark.parametrize("name", ["probes.json", "sensitivity.parquet", "advice.json", "probe.html"])
def test_a_changed_file_of_a_probe_is_found(placed, name):
    (placed / name).write_bytes((placed / name).read_bytes() + b" ")
    with pytest.raises(DamagedResults, match=name):
        read_probe(placed)


def test_a_manifest_of_another_probe_is_found(placed):
    manifest = json.loads((placed / "manifest.json").read_text())
    (placed / "manifest.json").write_text(json.dumps(manifest | {"probe_id": "e" * 16}))
    with pytest.raises(DamagedResults, match="of another probe"):
        read_probe(placed)


def test_a_probe_is_published_once_beside_its_study(placed, tmp_path, workspace):
    target = f"file://{tmp_path}/store"
    url = publish_probe(placed, target, "hub--model")
    there = tmp_path / "store" / "hub--model" / STUDY / "probes" / PROBE
    assert url == f"file://{there}/manifest.json"
    assert sorted(path.name for path in there.iterdir()) == sorted(path.name for path in placed.iterdir())
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    assert publish_probe(placed, target, "hub--model") == url
    place_probe(probes(change("int8_token", kl=0.02, format="int8_token")), ROWS, placed, workspace)
    with pytest.raises(DigestConflict, match="published with other numbers"):
        publish_probe(placed, target, "hub--model")
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before


def test_an_unfinished_probe_is_not_published(placed, tmp_path):
    (placed / "manifest.json").unlink()
    with pytest.raises(PublishRefused, match="not finished"):
        publish_probe(placed, f"file://{tmp_path}/store", "hub--model")
    assert not (tmp_path / "store").exists() or not any((tmp_path / "store").rglob("*.json"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "/home/me/model"}, "model"),
        ({"extra": 1}, "extra"),
        ({"tokens": -1}, "tokens"),
        ({"probe_id": "../x"}, "probe_id"),
    ],
)
def test_other_json_is_refused(more, message):
    made = probes(change("a", "zero", features=[1])).model_dump(mode="json")
    check_probes(json_bytes(made))
    with pytest.raises(NotAllowedError, match=message):
        check_probes(json.dumps(made | more).encode())


@pytest.mark.parametrize("field", ["format", "weights"])
def test_a_format_that_is_none_is_refused(field):
    made = probes(change("a", format="nvfp4")).model_dump(mode="json")
    made["changes"][0][field] = "nvfp4\u001b[31m"
    with pytest.raises(NotAllowedError, match="is not a format"):
        check_probes(json.dumps(made).encode())


def test_what_acts_on_a_terminal_is_shown():
    made = probes(change("a\u001b[31m\u202e", "zero", features=[1]), notes=["\u0007"]).model_dump(mode="json")
    found = check_probes(json_bytes(made))
    assert "\u001b" not in found.changes[0].name and "\u202e" not in found.changes[0].name
    assert found.notes != ["\u0007"]


def test_two_changes_of_one_name_are_refused():
    with pytest.raises(NotAllowedError, match="there twice"):
        check_probes(json_bytes(probes(change("a"), change("a")).model_dump(mode="json")))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], ROWS[0]], "there twice"),
        ([ROWS[0] | {"site": "o_in"}], "rows of the site o_in"),
        ([ROWS[0] | {"site": "nowhere"}], "a row that is not one"),
        ([ROWS[0] | {"squared_error": -1.0}], "a row that is not one"),
        ([ROWS[0] | {"kl": float("nan")}], "a row that is not one"),
        ([ROWS[0] | {"format": "fp3"}], "is not a format"),
    ],
)
def test_other_rows_are_refused(rows, message):
    made = probes(change("a"))
    assert check_sensitivity(sensitivity_bytes(ROWS), made) == ROWS
    with pytest.raises(NotAllowedError, match=message):
        check_sensitivity(sensitivity_bytes(rows), made)
    with pytest.raises(NotAllowedError, match="not readable Parquet"):
        check_sensitivity(b"PAR1 nothing", made)


def test_a_link_in_the_place_of_a_file_is_not_read(placed, tmp_path):
    away = tmp_path / "away.json"
    shutil.move(placed / "probes.json", away)
    (placed / "probes.json").symlink_to(away)
    with pytest.raises(DamagedResults, match=r"probes\.json can't be read"):
        read_probe(placed)
