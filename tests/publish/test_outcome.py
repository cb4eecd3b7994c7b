"""When nothing but publishing is left of a study: its results are home, every file of them as their manifest says."""

from __future__ import annotations

from pathlib import Path

import pytest

from outliers.files.atomic import held_bytes
from outliers.publish.outcome import find_finished
from outliers.workspace import open_workspace
from tests.support.results_folder import STUDY_ID, make_results
from tests.tasks.test_shards import prepared_of


@pytest.fixture
def study(tmp_path):
    """A prepared study, its workspace, and the folder of its finished results."""
    workspace = open_workspace(tmp_path)
    folder = make_results(workspace.study(STUDY_ID), log=True)
    return prepared_of(4, 1).model_copy(update={"study_id": STUDY_ID}), workspace, folder


def test_results_that_are_whole_are_found_whatever_the_log_says_since(study):
    prepared, workspace, folder = study
    (folder / "run.log").write_text("another run has said more")
    assert find_finished(prepared, workspace)["study_id"] == STUDY_ID
    assert find_finished(prepared.model_copy(update={"study_id": "c" * 24}), workspace) is None


@pytest.mark.parametrize("name", ["summary.json", "features.parquet", "tokens.json"])
def test_results_of_which_a_file_is_missing_or_another_are_not(study, name, caplog):
    """As when a download was killed: the manifest may have come before the others."""
    prepared, workspace, folder = study
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert find_finished(prepared, workspace) is None
    (folder / name).unlink()
    assert find_finished(prepared, workspace) is None
    assert f"{folder} are not whole" in caplog.text


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 9}'])
def test_results_whose_manifest_cannot_be_read_are_not(study, text):
    prepared, workspace, folder = study
    (folder / "manifest.json").write_text(text)
    assert find_finished(prepared, workspace) is None
    (folder / "manifest.json").unlink()
    assert find_finished(prepared, workspace) is None


def test_bytes_are_counted_while_a_job_writes(tmp_path):
    """`captures list` while a job runs: a chunk gets its name between the list of a folder and the look at a file."""

    class Moving(type(tmp_path)):
        """A path whose unfinished file is moved on as soon as it has been seen."""

        def stat(self, **given):
            found = super().stat(**given)
            if self.name == "chunk.tmp":
                Path(self).rename(self.with_name("chunk"))
            return found

    (tmp_path / "kept").write_bytes(b"x" * 7)
    (tmp_path / "chunk.tmp").write_bytes(b"x" * 5)
    assert held_bytes(Moving(tmp_path)) == 12
