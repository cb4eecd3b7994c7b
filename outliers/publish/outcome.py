"""How a study ended, and whether it was there before anything ran.

`find_outcome` looks at the artifact store first (or at the workspace, where nothing is published) and answers before
a machine is asked for; `find_finished` says whether nothing but publishing is left. Both answer only from files that were
checked (`finished`): damaged pages and pictures are rendered again, damaged numbers are fetched, or written from the private
summary. A capture that was repaired is computed before anything answers. It decides nothing about machines.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from outliers.counting.summary_files import has_summary
from outliers.errors import DamagedResults, OutliersError, WorkspaceError
from outliers.events.stream import Lines
from outliers.publish.allowlist import NUMBERS, OPTIONAL, SUMMARY
from outliers.publish.finished import Finished, read_finished
from outliers.publish.own import is_shown, own_verdict, show_own
from outliers.publish.probes import PAGE, find_probe, name_probes, read_probe
from outliers.publish.publish import fetch, model_slug, published_manifest
from outliers.publish.reporting import alone, known_digest, render_again, write_study
from outliers.results.answer import (
    crowded,
    disagreement,
    massive_words,
    perplexity_words,
    range_words,
    reading_counts,
    resampled,
)
from outliers.results.expert_words import expert_lines
from outliers.results.schema import Perplexity, StudySummary, first_error
from outliers.store.repair import is_repaired
from outliers.study.prepare import Prepared
from outliers.study.probes import placed_probe
from outliers.workspace import Workspace

log = logging.getLogger(__name__)


class Outcome(BaseModel):
    """A finished study: where its results are, and its answer."""

    model_config = ConfigDict(frozen=True)

    study_id: str
    capture_id: str
    title: str
    """Model and shape, by the names that they have on this machine."""
    model: str = ""
    corpus: str = ""
    """What the corpus is called on this machine, as the model."""
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
    """Activations that are not finite, over all sites and layers."""
    perplexity: Perplexity | None = None
    """As in summary.json, where it was asked for."""
    interval: tuple[int, int] | None = None
    """Range over resamples of the sequences of how many features are systematic; None for a single sequence."""
    readings: dict[str, int] = {}
    """How many features pass each of the four readings at the deciding site."""
    massive: str | None = None
    """The massive activations in one line, where `resid` was read."""
    experts: list[str] = []
    """Lines about the experts of a mixture: super experts, and how many have few tokens."""
    crowded: str | None = None
    """A warning where most features of a site are systematic."""
    verdict: str | None = None
    """What can be quantized, in words, where the study was probed."""
    probe: str | None = None
    """Page of the probe."""

    @property
    def disagreement(self) -> str:
        """All four readings, where they disagree: part of the headline."""
        return disagreement(self.readings)

    def remarks(self) -> list[str]:
        """Sentences that go with the answer: massive activations, how stable it is, perplexity, values that are not finite."""
        found = [text for text in (self.crowded, self.massive) if text is not None]
        if self.interval is not None:
            found.append(range_words(*self.interval))
        if self.perplexity is not None:
            found.append(perplexity_words(self.perplexity))
        found += self.experts
        if self.nonfinite:
            found.append(
                f"{self.nonfinite:,} activations are not finite: they count as no hit, and their tokens stay in N, see the report"
            )
        return found


def find_outcome(prepared: Prepared, workspace: Workspace) -> Outcome | None:
    """The outcome of a study that is published at its target already, or, without a target, finished in the workspace.

    The few published kilobytes are fetched where the workspace doesn't have them, whole and the same. Raises AccessDenied,
    StoreUnavailable, PublishRefused where what is published is damaged.
    """
    if is_repaired(workspace, prepared.capture_id):
        log.warning("the capture %s was repaired: what is missing of it is computed again", prepared.capture_id)
        return None
    target = prepared.spec.publish_to
    slug = model_slug(prepared.model.source.id)
    if not find_probe(prepared, workspace, target, slug):
        return None
    published = None if target is None else published_manifest(target, slug, prepared.study_id)
    if target is None or published is None:
        local = _local(prepared, workspace)
        return _outcome(prepared, workspace, local, published=None, cached=True) if local and target is None else None
    found = _whole(prepared, workspace)
    if found is None or _essence(found.manifest) != _essence(published):
        log.warning("fetching the published results of %s into %s", prepared.title, workspace.study(prepared.study_id))
        found = _fetched(prepared, workspace, target, slug)
    url = f"{target}/{slug}/{prepared.study_id}/manifest.json"
    return _outcome(prepared, workspace, found, published=url, cached=True)


def _essence(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without what is rendered: other versions of matplotlib draw the same pictures in other bytes."""
    numbers = (*NUMBERS, *OPTIONAL)
    return manifest | {"folder": None, "files": [file for file in manifest["files"] if file["path"] in numbers]}


def find_finished(prepared: Prepared, workspace: Workspace) -> dict[str, Any] | None:
    """The manifest of a study whose results are in the workspace, whole; None where they are not, or are to be made again.

    A folder may be half there: the manifest comes home with the other files, in no order. Damaged results of a study whose
    private summary is here are written again from that.
    """
    if is_repaired(workspace, prepared.capture_id):
        return None
    found = _local(prepared, workspace)
    return None if found is None else found.manifest


def make_outcome(prepared: Prepared, workspace: Workspace, *, published: str | None, cached: bool) -> Outcome:
    """The outcome of a study whose results folder is finished. Raises DamagedResults where it is not what was written."""
    folder = workspace.study(prepared.study_id)
    found = _read(prepared, workspace)
    if found is None:
        raise DamagedResults(f"{folder} has no manifest.json: that study is not finished; run the same study again")
    return _outcome(prepared, workspace, found, published=published, cached=cached)


def _read(prepared: Prepared, workspace: Workspace) -> Finished | None:
    """The results in the workspace, read while no process writes them. Raises DamagedResults."""
    with alone(prepared, workspace):
        return read_finished(workspace.study(prepared.study_id), prepared.study_id)


def _whole(prepared: Prepared, workspace: Workspace) -> Finished | None:
    """The results in the workspace, where their numbers are whole; the log says what of them is damaged."""
    try:
        return _read(prepared, workspace)
    except DamagedResults as error:
        log.warning("%s", error)
    if not render_again(prepared, workspace):
        return None
    log.warning("its numbers are whole: page and pictures are rendered again")
    try:
        return _read(prepared, workspace)
    except DamagedResults:
        return None


def _local(prepared: Prepared, workspace: Workspace) -> Finished | None:
    """The results in the workspace, where they are known to be what was counted; else written again from the summary.

    Without the digest that is kept apart, only the summary can say so: results that agree with themselves prove nothing.
    """
    found, known = _whole(prepared, workspace), known_digest(prepared, workspace)
    counted = has_summary(workspace.summary(prepared.capture_id, prepared.study_id))
    if found is not None and (known == found.manifest["results_digest"] or (known is None and not counted)):
        return found
    if not counted or (found is None and known is None):
        return None
    folder = workspace.study(prepared.study_id)
    log.warning("the results in %s are written again, from the summary of the capture", folder)
    try:
        write_study(prepared, workspace, Lines(log))
        return _read(prepared, workspace)
    except (OutliersError, OSError) as error:
        log.warning("they can't be written from the summary: %s", error)
        return None


def _fetched(prepared: Prepared, workspace: Workspace, target: str, slug: str) -> Finished:
    """The published results, in the workspace and checked."""
    folder = workspace.study(prepared.study_id)
    try:
        with alone(prepared, workspace):
            show = functools.partial(show_own, prepared, workspace)
            fetch(target, slug, prepared.study_id, folder, show)
    except OSError as error:
        raise WorkspaceError(f"the results can't be written into {folder}: {error}; move that folder away") from error
    found = _read(prepared, workspace)
    if found is None:
        raise DamagedResults(f"{folder} was removed while it was written; run the same study again")
    return found


def _outcome(
    prepared: Prepared, workspace: Workspace, found: Finished, *, published: str | None, cached: bool
) -> Outcome:
    found = _named(prepared, workspace, found)
    summary = _summary(found)
    probe = read_probe(placed_probe(prepared, workspace)) if prepared.spec.probe.asked else None
    return Outcome(
        study_id=prepared.study_id,
        capture_id=prepared.capture_id,
        title=prepared.title,
        model=prepared.model_name,
        corpus=prepared.corpus_name,
        results=str(found.folder),
        report=str(found.folder / "report.html"),
        published=published,
        published_bytes=sum(int(item["size"]) for item in found.manifest["files"]),
        systematic=found.summary["systematic"],
        cached=cached,
        nonfinite=sum(row.nonfinite for row in summary.layers),
        perplexity=summary.perplexity,
        interval=resampled(summary),
        readings=reading_counts(summary),
        massive=massive_words(summary),
        experts=expert_lines(summary.experts),
        crowded=crowded(summary),
        verdict=None if probe is None else own_verdict(prepared, probe.probes, probe.advice),
        probe=None if probe is None else str(probe.folder / PAGE),
    )


def _named(prepared: Prepared, workspace: Workspace, found: Finished) -> Finished:
    """The results with a page that has the names and the text of this machine: one of before, or fetched, is rendered again."""
    if is_shown(prepared, workspace) or not render_again(prepared, workspace):
        return found
    name_probes(prepared, workspace)
    return _read(prepared, workspace) or found


def _summary(found: Finished) -> StudySummary:
    """summary.json by its model. Raises DamagedResults where it is not a study's."""
    try:
        return StudySummary.model_validate_json(found.files[SUMMARY], extra="ignore")
    except ValidationError as error:
        raise DamagedResults(f"the results in {found.folder} are not whole: {SUMMARY}: {first_error(error)}") from error
