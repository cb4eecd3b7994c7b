"""The real model, converted once for all tests that read it, in whichever process they run."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from outliers.model.gguf import gguf_weights
from outliers.model.source import find_model
from outliers.spec import ModelSpec
from outliers.workspace import Workspace, open_workspace

MADE = "smollm2-made"


@pytest.fixture(scope="session")
def smollm2_workspace(tmp_path_factory) -> Workspace:
    """A workspace of this process's own. Converting takes half a minute of a processor: the first does it, the others copy."""
    own = tmp_path_factory.mktemp("smollm2") / "work space"
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return _made(own)
    with (base.parent / f"{MADE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        whole = base.parent / MADE
        if not (whole / "done").exists():
            shutil.rmtree(whole, ignore_errors=True)
            _made(whole / "work space")
            (whole / "done").touch()
    # without the name of the disk: a copy is another place
    shutil.copytree(whole / "work space", own, ignore=shutil.ignore_patterns("instance"))
    return open_workspace(own)


def _made(place: Path) -> Workspace:
    workspace = open_workspace(place)
    gguf_weights(find_model(ModelSpec(id="builtin:smollm2"), workspace), workspace)
    return workspace
