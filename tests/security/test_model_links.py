"""Links in a model's folder: followed within it alone, so that no other file of this user is read, hashed or sent."""

from __future__ import annotations

import os

import pytest

from outliers.dispatch.transfer import model_files
from outliers.errors import UnknownModel
from outliers.model.source import find_model
from outliers.spec import ModelSpec, StudySpec
from outliers.study.prepare import prepare
from tests.support import tiny

SECRET = "-----BEGIN A KEY-----"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.make_model(folder)
    (tmp_path / "id_rsa").write_text(SECRET)
    return folder


def refused(folder, workspace):
    with pytest.raises(UnknownModel) as caught:
        prepare(StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs")), workspace)
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json", "any", ".hidden"],
)
@pytest.mark.parametrize("target", ["../id_rsa", "../../../../../../../../etc/passwd", "through/id_rsa"])
def test_a_link_out_of_the_folder_is_refused(model, workspace, name, target):
    (model / name).unlink(missing_ok=True)
    if target.startswith("through"):
        (model / "through").symlink_to("..", target_is_directory=True)
    (model / name).symlink_to(target)
    assert "is a link out of its folder" in refused(model, workspace)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_needed_files_too(model, workspace, tmp_path, name):
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    said = refused(model, workspace)
    assert "is a link out of its folder" in said
    assert "Copy the file into the folder" in said


def test_links_to_nothing_and_to_themselves(model, workspace):
    (model / "notes.txt").symlink_to("notes.txt")
    assert "a link to nothing, or to itself" in refused(model, workspace)


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.model"])
def test_a_pipe_is_refused_and_not_waited_for(model, workspace, name):
    os.mkfifo(model / name)
    assert "neither a file nor a folder" in refused(model, workspace)


def test_a_device_is_refused(model, workspace):
    (model / "notes.txt").symlink_to("/dev/zero")
    assert "is a link out of its folder" in refused(model, workspace)


def test_links_within_the_folder_are_followed(model, workspace):
    (model / "real").mkdir()
    (model / "model.safetensors").rename(model / "real" / "weights")
    (model / "model.safetensors").symlink_to("real/weights")
    prepare(StudySpec.model_validate(tiny.spec_for(model, "builtin:python-docs")), workspace)


def test_a_folder_that_is_reached_through_a_link_is_read(model, workspace, tmp_path):
    (tmp_path / "link").symlink_to(model)
    assert find_model(ModelSpec(id=str(tmp_path / "link")), workspace).id.startswith("local:")


def test_a_snapshot_of_the_hubs_cache_is_read(model, workspace, tmp_path):
    """Its files are links into the blobs of the same repository, and to nothing else."""
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    source = find_model(ModelSpec(id=str(snapshot)), workspace)
    assert {path.name for path in model_files(source)} >= {"config.json", "model.safetensors", "tokenizer.json"}
    (snapshot / "notes.txt").symlink_to("../../../id_rsa")
    assert "is a link out of its folder" in refused(snapshot, workspace)
