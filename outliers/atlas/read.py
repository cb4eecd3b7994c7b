"""summary.json of a published study, read by the models of `results.schema`.

Unknown keys are passed over: what a newer program adds to schema_version 1 must not take its studies out of the atlas.
"""

from __future__ import annotations

from pydantic import ValidationError

from outliers.errors import PublishRefused
from outliers.publish.shelf import Published
from outliers.results.schema import StudySummary, first_error, other_version


def read_summary(study: Published) -> StudySummary:
    """summary.json of a study that was read with it.

    Raises PublishRefused, which names the study, for a newer format, a malformed summary, and that of another study.
    """
    url = study.url
    try:
        found = StudySummary.model_validate_json(study.summary or b"", extra="ignore")
    except ValidationError as error:
        version = other_version(error)
        if version is not None:
            raise PublishRefused(
                f"summary.json of {url} has schema_version {version}, this program reads 1; update outlier-features"
            ) from error
        raise PublishRefused(f"summary.json of {url} is malformed: {first_error(error)}") from error
    if found.study_id != study.manifest["study_id"]:
        raise PublishRefused(f"summary.json of {url} is of the study {found.study_id}; remove it and publish again")
    return found
