"""How a study ended, and whether it was there before anything ran.

`find_outcome` looks at the artifact store first (or at the workspace, where nothing is published) and answers before
a machine is asked for; `find_finished` says whether nothing but publishing is left. It decides nothing about machines.
Before it: `prepare`. After it: the command and the flow.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from outliers.allowlist import LOG
from outliers.answer import crowded, disagreement, perplexity_words, range_words, reading_counts, resampled
from outliers.errors import PublishRefused
from outliers.files import sha256_file, size_of
from outliers.manifest import read_manifest
from outliers.prepare import Prepared
from outliers.publish import fetch, model_slug, published_manifest
from outliers.workspace import Workspace

log = logging.getLogger(__name__)


class Outcome(BaseModel):
    """A finished study: where its results are, and its answer."""

    model_config = ConfigDict(frozen=True)

    study_id: str
    capture_id: str
    title: str
    results: str
    """Folder in the workspace."""
    report: str
    published: str | None
    """URL of the published manifest."""
    published_bytes: int
    """Of all files the manifest names."""
    systematic: list[dict[str, Any]]
    cached: bool
    """The study was there already: nothing ran."""
    nonfinite: int = 0
    """Activations that are no finite number, over all sites and layers."""
    perplexity: dict[str, Any] | None = None
    """As in summary.json, where it was asked for."""
    interval: tuple[int, int] | None = None
    """Range over resamples of the sequences of how many features are systematic; None for a single sequence."""
    readings: dict[str, int] = {}
    """How many features pass each of the four readings at the deciding site."""
    crowded: str | None = None
    """Where most features of a site are systematic: what that says of the magnitude."""

    @property
    def disagreement(self) -> str:
        """All four readings, where they disagree: part of the headline."""
        return disagreement(self.readings)

    def remarks(self) -> list[str]:
        """What belongs beside the answer: how sure it is, perplexity, and values that are no numbers."""
        found = [] if self.crowded is None else [self.crowded]
        if self.interval is not None:
            found.append(range_words(*self.interval))
        if self.perplexity is not None:
            found.append(perplexity_words(self.perplexity))
        if self.nonfinite:
            found.append(
                f"{self.nonfinite:,} activations are not finite: they count as no hit, and their tokens stay in N, see the report"
            )
        return found


def find_outcome(prepared: Prepared, workspace: Workspace) -> Outcome | None:
    """The outcome of a study that is published at its target already, or, without a target, finished in the workspace.

    The few published kilobytes are fetched where the workspace doesn't have them. Raises AccessDenied, StoreUnavailable.
    """
    folder = workspace.study(prepared.study_id)
    local = read_manifest(folder)
    target = prepared.spec.publish_to
    if target is None:
        return make_outcome(prepared, workspace, published=None, cached=True) if local else None
    slug = model_slug(prepared.model.source.id)
    found = published_manifest(target, slug, prepared.study_id)
    if found is None:
        return None
    if local is None or local["results_digest"] != found["results_digest"]:
        log.info("fetching the published results of %s", prepared.title)
        fetch(target, slug, prepared.study_id, folder)
    return make_outcome(
        prepared, workspace, published=f"{target}/{slug}/{prepared.study_id}/manifest.json", cached=True
    )


def find_finished(prepared: Prepared, workspace: Workspace) -> dict[str, Any] | None:
    """The manifest of a study whose results are in the workspace, whole; None where anything of them is not as it says.

    A folder may be half there: the manifest comes home with the other files, in no order. The log is none of the results.
    """
    folder = workspace.study(prepared.study_id)
    try:
        manifest = read_manifest(folder)
        if manifest is None or manifest["study_id"] != prepared.study_id:
            return None
        files = [file for file in manifest["files"] if file["path"] != LOG]
        whole = all(sha256_file(folder / file["path"]) == file["sha256"] for file in files)
    except (PublishRefused, OSError) as error:
        log.warning("the results in %s are not whole: %s", folder, error)
        return None
    if not whole:
        log.warning("the results in %s are not whole: they are not what their manifest says", folder)
    return manifest if whole else None


def make_outcome(prepared: Prepared, workspace: Workspace, *, published: str | None, cached: bool) -> Outcome:
    """The outcome of a study whose results folder is finished."""
    folder = workspace.study(prepared.study_id)
    summary = json.loads((folder / "summary.json").read_text())
    manifest = read_manifest(folder) or {"files": []}
    return Outcome(
        study_id=prepared.study_id,
        capture_id=prepared.capture_id,
        title=prepared.title,
        results=str(folder),
        report=str(folder / "report.html"),
        published=published,
        published_bytes=sum(int(item["size"]) for item in manifest["files"]),
        systematic=summary["systematic"],
        cached=cached,
        nonfinite=sum(int(layer["nonfinite"]) for layer in summary["layers"]),
        perplexity=summary.get("perplexity"),
        interval=resampled(summary),
        readings=reading_counts(summary),
        crowded=crowded(summary),
    )


def held_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, in which a job may be writing."""
    return sum(size_of(Path(place) / name) for place, _, names in os.walk(folder) for name in names)
