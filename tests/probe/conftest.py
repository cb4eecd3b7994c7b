"""A study that probes of these tests are made of."""

from __future__ import annotations

import pytest

from outliers.capture.extract import extract
from outliers.counting.analyze import analyze
from outliers.workspace import open_workspace
from tests.support.probe_oracle import study_of
from tests.support.synthetic import Silent


@pytest.fixture(scope="module")
def world(tmp_path_factory, text, llama):
    """A captured and counted study of a tiny Llama, 5 sequences in batches of 2."""
    workspace = open_workspace(tmp_path_factory.mktemp("world") / "work space")
    study = study_of(workspace, llama, text, {"probe": "check"})
    extract(study, workspace, Silent())
    analyze(study, workspace, Silent())
    return workspace, llama, text
