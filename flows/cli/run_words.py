"""What a finished study is called at the terminal, and what its probe says in words."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outliers.publish.probes import Probed
    from outliers.workspace import Workspace


def names_of(folder: Path, workspace: Workspace) -> tuple[str, str] | None:
    """What model and corpus of a results folder are called here; None where it is not one, which its reader says better."""
    from outliers.errors import PublishRefused
    from outliers.publish.manifest import read_manifest
    from outliers.publish.own import names_here

    with contextlib.suppress(PublishRefused):
        manifest = read_manifest(folder)
        return None if manifest is None else names_here(workspace, manifest)
    return None


def verdict_here(folder: Path, study_id: str, names: tuple[str, str]) -> str | None:
    """The verdict of the newest probe in a results folder, with these names. BadInput where the probe is not what was written."""
    from outliers.advice.advise import verdict_words
    from outliers.untrusted.visible import visible

    found = _newest_probe(folder)
    if found is None or found.probes.study_id != study_id:
        return None
    return visible(verdict_words(found.probes, found.advice, names))


def own_verdict(folder: Path) -> tuple[bytes, ...]:
    """advice.json of the newest probe in a results folder. Raises BadInput where it is not what was written there."""
    from outliers.publish.allowlist import ADVICE

    found = _newest_probe(folder)
    return () if found is None else (found.files[ADVICE],)


def _newest_probe(folder: Path) -> Probed | None:
    from outliers.errors import BadInput, DamagedResults
    from outliers.publish.probes import newest_probe

    try:
        return newest_probe(folder)
    except DamagedResults as error:
        raise BadInput(str(error)) from error


def verdict_words(verdicts: Sequence[bytes], study_id: str) -> str | None:
    """The paragraph of the last verdict that is one of this study; others can write to a store."""
    from pydantic import ValidationError

    from outliers.results.schema import Advice
    from outliers.untrusted.visible import visible

    for data in reversed(verdicts):
        with contextlib.suppress(ValidationError):
            advice = Advice.model_validate_json(data, extra="ignore")
            if advice.study_id == study_id:
                return visible(advice.paragraph)
    return None
