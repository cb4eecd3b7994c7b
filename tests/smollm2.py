"""The real model, converted once for all tests that read it."""

from __future__ import annotations

import pytest

from outliers.gguf import gguf_weights
from outliers.models import find_model
from outliers.spec import ModelSpec
from outliers.workspace import Workspace, open_workspace


@pytest.fixture(scope="session")
def smollm2_workspace(tmp_path_factory) -> Workspace:
    workspace = open_workspace(tmp_path_factory.mktemp("smollm2") / "work space")
    gguf_weights(find_model(ModelSpec(id="builtin:smollm2"), workspace), workspace)
    return workspace
