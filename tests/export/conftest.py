"""One finished study of a tiny model, captured at every site, for the tests of exports."""

from __future__ import annotations

import pytest

from outliers.workspace import open_workspace
from tests.support import exports


@pytest.fixture(scope="session")
def whole(tmp_path_factory, llama, text):
    """(workspace, the model's folder, its prepared study): three layers in float32, 60 tokens."""
    workspace = open_workspace(tmp_path_factory.mktemp("exports") / "work space")
    return workspace, llama, exports.counted(workspace, llama, text)


@pytest.fixture(scope="session")
def inputs(whole):
    """name -> (token, feature) what every projection received, by hooks of the tests' own."""
    workspace, folder, study = whole
    return exports.inputs_of(folder, study, workspace)


@pytest.fixture
def study(whole):
    workspace, _, prepared = whole
    return exports.opened(workspace, prepared)
