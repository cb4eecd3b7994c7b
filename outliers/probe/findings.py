"""What a study found that a probe needs: its systematic features, ranges and means of features, the largest massive activation.

Read from the study's private summary where it is on this machine, else its list alone from the results folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from outliers.corpus.tokens import Corpus
from outliers.counting.massive import massive_activations
from outliers.counting.summary import Summary
from outliers.counting.summary_files import has_summary, read_summary
from outliers.errors import BadInput
from outliers.experts.totals import ExpertTotals
from outliers.experts.totals_files import has_totals, read_totals
from outliers.results.criteria import judge
from outliers.results.lists import rules_of
from outliers.results.super_experts import over_all_tokens
from outliers.study.prepare import Prepared
from outliers.workspace import Workspace

STUDY, OWN = "study", "probe"
"""Where a range or a mean comes from: all sequences of the study, or those that the probe reads."""


@dataclass(frozen=True)
class Findings:
    """Of one study. systematic: by magnitude, largest first; None where the study was not counted here.

    largest, means: site -> (layer, feature) float64 of the captured layers, empty where only the list is known. massive_token:
    the id of the token with the largest massive activation at resid. super_experts: (layer, expert) of the routed ones, the
    largest output first; None where the study says nothing of them here.
    """

    systematic: tuple[int, ...] | None = None
    largest: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    means: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    massive_token: int | None = None
    super_experts: tuple[tuple[int, int], ...] | None = None


def find_findings(prepared: Prepared, workspace: Workspace, corpus: Corpus) -> Findings:
    """What is known here of a prepared study. Raises CorruptCapture for a damaged summary."""
    private = workspace.summary(prepared.capture_id, prepared.study_id)
    if has_summary(private):
        summary = read_summary(private)
        if summary.sequences.size == prepared.corpus.num_sequences:
            found = _from_summary(prepared, summary, corpus)
            return replace(found, super_experts=_super_experts(prepared, workspace))
    return Findings(systematic=_from_results(prepared, workspace), super_experts=_super_experts(prepared, workspace))


def _from_summary(prepared: Prepared, summary: Summary, corpus: Corpus) -> Findings:
    frame = summary.frame
    totals = summary.sites[prepared.site]
    verdict = judge(*totals.counts(frame.deciding_step), summary.tokens, rules_of(prepared))[
        prepared.spec.criteria.reading
    ]
    sizes = np.maximum(np.abs(totals.max), np.abs(totals.min)).max(axis=0)
    features = sorted(np.flatnonzero(verdict.passes).tolist(), key=lambda feature: (-float(sizes[feature]), feature))
    largest, means = {}, {}
    for site in frame.captured:
        own = summary.sites[site]
        high = np.maximum(np.abs(own.max), np.abs(own.min)).astype(np.float64)
        largest[site] = np.where(np.isfinite(high), high, 0.0)
        means[site] = own.moments[0] / np.maximum(1, own.finite)
    return Findings(tuple(features), largest, means, _massive_token(summary, corpus))


def _massive_token(summary: Summary, corpus: Corpus) -> int | None:
    massive = massive_activations(summary)
    if massive is None or not massive.cells:
        return None
    top = max(massive.cells, key=lambda cell: abs(cell["value"]))
    return corpus.token_id(int(top["sequence"]), int(top["position"]))


def _from_results(prepared: Prepared, workspace: Workspace) -> tuple[int, ...] | None:
    path = workspace.study(prepared.study_id) / "summary.json"
    try:
        content = json.loads(path.read_bytes())
        if content["study_id"] != prepared.study_id:
            return None
        return tuple(int(row["feature"]) for row in content["systematic"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _super_experts(prepared: Prepared, workspace: Workspace) -> tuple[tuple[int, int], ...] | None:
    """The routed super experts of a study, over all routed tokens; None for a dense model, and where they are not known."""
    if not prepared.model.anatomy.moe_layers:
        return None
    private = workspace.summary(prepared.capture_id, prepared.study_id)
    if has_totals(private):
        totals = read_totals(private)
        if totals.sequences.size == prepared.corpus.num_sequences:
            return _super_of(totals)
    path = workspace.study(prepared.study_id) / "summary.json"
    try:
        content = json.loads(path.read_bytes())
        if content["study_id"] != prepared.study_id:
            return None
        rows = content["experts"]["super_experts"]["experts"]
        found = [(int(row["layer"]), int(row["expert"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tuple(at for at in found if at[1] >= 0)


def _super_of(totals: ExpertTotals) -> tuple[tuple[int, int], ...] | None:
    """Of the totals; None where routing alone was read."""
    if totals.sums is None:
        return None
    found = over_all_tokens(totals)
    places = sorted(map(tuple, np.argwhere(found.marks).tolist()), key=lambda at: (-found.values[at], at))
    return tuple((totals.shapes.layers[layer], expert) for layer, expert in places if expert < totals.shapes.experts)


def require_findings(found: Findings, prepared: Prepared) -> tuple[int, ...]:
    """The systematic features. Raises BadInput where the study was not counted here."""
    if found.systematic is None:
        raise BadInput(
            f"the study {prepared.study_id} has no results on this machine, and the probe asks for features that it found: run "
            "the study first, or name features by their numbers"
        )
    return found.systematic
