"""What every test starts from: no hub, no telemetry, one torch thread, no workspace or keys of the person who runs it."""

from __future__ import annotations

import os

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
for name in ("OUTLIERS_WORKSPACE", "OUTLIERS_PROVIDER", "OUTLIERS_EVENTS", "OUTLIERS_JOB", "AWS_PROFILE", "HF_TOKEN"):
    os.environ.pop(name, None)

import pytest

from outliers.workspace import Workspace, open_workspace
from tests.captured import llama, text
from tests.prefect_home import prefect_home
from tests.s3 import s3_server
from tests.smollm2 import smollm2_workspace

__all__ = ["llama", "prefect_home", "s3_server", "smollm2_workspace", "text"]


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    # a space in the path: whoever keeps things in "My Studies" must not be the one to find out
    return open_workspace(tmp_path / "work space")
