"""The step `prepare` as a Prefect task: the model and the text are found, and the text becomes token ids.

Never cached by Prefect: what it makes lies in the workspace under its own hash, and a second look at that takes no time.
"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from outliers.spec import StudySpec, digest
from outliers.study.prepare import Prepared
from outliers.study.prepare import prepare as prepare_study
from outliers.workspace import Workspace
from tasks.policies import RETRIES, RETRY_SECONDS, is_transient
from tasks.progress import TaskReporter


@task(
    name="prepare",
    task_run_name="prepare {title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=False,
    cache_policy=NO_CACHE,
)
def prepare(spec: StudySpec, workspace: Workspace, title: str) -> Prepared:
    """As `outliers.study.prepare.prepare`. `title`: the study for a person, before anything of it is looked up."""
    key = digest(spec.model_dump(mode="json", include={"model", "corpus"}))[:16]
    with TaskReporter(title, key) as reporter:
        return prepare_study(spec, workspace, reporter)
