"""A run of a study for tests that need one and look at nothing that it says."""

from __future__ import annotations

from outliers.dispatch.study_run import StudyRun
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace
from tests.support.synthetic import Silent


def quiet_run(prepared: Prepared, workspace: Workspace, holder: str = "run") -> StudyRun:
    return StudyRun(prepared, workspace, holder, Silent())
