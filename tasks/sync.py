"""Publish the results folder at the artifact store: from the control side, where the store's keys are."""

from __future__ import annotations

from typing import Any

from prefect import task

from outliers.errors import PublishRefused
from outliers.publish.allowlist import check_listing, read_log, read_numbers
from outliers.publish.manifest import read_manifest
from outliers.publish.publish import model_slug, publish_study
from outliers.publish.publishable import Publishable, make_publishable, write_publishable
from outliers.publish.reporting import alone
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace
from tasks.policies import RETRIES, RETRY_SECONDS, is_transient, sync_key


@task(
    name="sync",
    task_run_name="sync {prepared.title}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=True,
    result_serializer="json",
    cache_key_fn=sync_key,
)
def sync(prepared: Prepared, made_on: dict[str, Any], workspace: Workspace, analyzed: dict[str, Any]) -> str | None:
    """The URL of the published manifest, or None where the study has no target.

    `made_on`: what the manifest tells of the machine, or of the parts. `analyzed` shows the order in the run's graph, and
    names the results that are to be published.
    """
    with alone(prepared, workspace):
        study = _written(prepared, made_on, workspace, analyzed)
    if prepared.spec.publish_to is None:
        return None
    check_listing(workspace.study(prepared.study_id))
    return publish_study(study, prepared.spec.publish_to, model_slug(prepared.model.source.id))


def _written(
    prepared: Prepared, made_on: dict[str, Any], workspace: Workspace, analyzed: dict[str, Any]
) -> Publishable:
    """The study with all that its manifest tells, rendered from the numbers in the results folder, and written there."""
    folder = workspace.study(prepared.study_id)
    known = (read_manifest(folder) or {}).get("provenance", {})
    study = make_publishable(
        read_numbers(folder),
        spec=prepared.public_spec(),
        provenance=known | made_on,
        log=read_log(folder) if prepared.spec.publish_log else None,
    )
    if study.manifest["results_digest"] != analyzed["results_digest"]:
        raise PublishRefused(
            f"the results in {folder} have digest {study.manifest['results_digest'][:12]}, the analysis made "
            f"{analyzed['results_digest'][:12]}: they were changed since; run the study again"
        )
    # only now: a manifest vouches for the files
    write_publishable(folder, study)
    return study
