"""A finished capture and copies of it to damage.

After it: `test_damage`, `test_other_conditions`, `test_full_disk`, which import the fixtures by name.
"""

from __future__ import annotations

import shutil

import pytest

from outliers.capture.extract import extract
from outliers.workspace import open_workspace
from tests.support.captured import prepared
from tests.support.synthetic import Silent

SITES = ("attn_in", "mlp_in", "resid")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, llama, text):
    """A finished capture of 4 sequences, 3 layers and 3 sites, in batches of 2: (workspace, study)."""
    workspace = open_workspace(tmp_path_factory.mktemp("whole") / "ws")
    study = prepared(workspace, llama, text, capture={"sites": SITES, "batch_sequences": 2})
    extract(study, workspace, Silent())
    return workspace, study


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it to damage: (workspace, study, folder)."""
    workspace, study = whole
    shutil.copytree(workspace.root, tmp_path / "ws")
    other = open_workspace(tmp_path / "ws")
    return other, study, other.capture(study.capture_id)


def flip(path, at, bit=4):
    raw = bytearray(path.read_bytes())
    raw[at] ^= bit
    path.write_bytes(raw)
