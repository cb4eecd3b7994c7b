"""ExpertTotals -> what summary.json says of the experts of a study; `expert_tables` makes the tables of the same findings.

What an expert that no token reached would do is unknown: null, never 0. Knows totals and models of the schema, no capture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outliers.corpus.tokens import Corpus
from outliers.errors import CorruptCapture
from outliers.experts.table import number_of
from outliers.experts.totals import ExpertTotals
from outliers.experts.totals_files import read_totals
from outliers.results.attribution import feature_experts, kinds_of, massive_experts
from outliers.results.routing import (
    CERTAIN,
    Spans,
    entropies,
    routed_tokens,
    spans,
    tokens_to_reach,
)
from outliers.results.schema import MassiveRow, StudySummary
from outliers.results.schema.experts import (
    COVERED,
    MAX_SUPER,
    Coverage,
    ExpertsBlock,
    Reach,
    SuperExpert,
    SuperReading,
)
from outliers.results.super_experts import SuperExperts, as_published, over_all_tokens
from outliers.spec import OWN_WIDTH_SITES
from outliers.study.experts import expert_shapes
from outliers.study.prepare import Prepared

REACHED = (1, 100)
"""Tokens that every expert is to have, for `reach`."""
FEW = 100
"""Tokens with which a calibrator still knows little of an expert: the last of COVERED."""


@dataclass(frozen=True)
class ExpertFindings:
    """What the experts of one study do.

    tokens: (L, E) int64. drawn: None for one sequence. ours, published: None where routing alone is read.
    """

    totals: ExpertTotals
    tokens: NDArray[np.int64]
    drawn: Spans | None
    ours: SuperExperts | None
    published: SuperExperts | None


def read_experts(prepared: Prepared, private: Path) -> ExpertFindings | None:
    """What the private summary in a folder says of the experts; None where the study reads none.

    Raises CaptureError where there are no totals of the experts, CorruptCapture for others.
    """
    shapes = expert_shapes(prepared.spec, prepared.model, prepared.layers)
    if shapes is None:
        return None
    totals = read_totals(private)
    if (totals.study_id, totals.shapes) != (
        prepared.study_id,
        shapes,
    ) or totals.sequences.size != prepared.corpus.num_sequences:
        raise CorruptCapture(f"the totals of experts in {private} are not those of {prepared.study_id}: analyze again")
    return expert_findings(totals, prepared.model.num_layers)


def expert_findings(totals: ExpertTotals, num_layers: int) -> ExpertFindings:
    """Count. num_layers: decoder layers of the model. Raises CorruptCapture where the routing is not of every token."""
    known = totals.sums is not None
    return ExpertFindings(
        totals=totals,
        tokens=routed_tokens(totals),
        drawn=spans(totals),
        ours=over_all_tokens(totals) if known else None,
        published=as_published(totals, num_layers) if known else None,
    )


def experts_block(prepared: Prepared, found: ExpertFindings, content: StudySummary, corpus: Corpus) -> ExpertsBlock:
    """The part `experts` of summary.json. content: the rest of it."""
    totals, shapes, tokens, drawn = found.totals, found.totals.shapes, found.tokens, found.drawn
    entropy = entropies(tokens)
    hidden = prepared.site not in OWN_WIDTH_SITES
    features = [row.feature for row in content.systematic]
    return ExpertsBlock(
        read="routing" if totals.sums is None else "all",
        layers=list(shapes.layers),
        experts=shapes.experts,
        slots=shapes.slots,
        shared=shapes.shared,
        weights_inside=shapes.applied,
        coverage=[Coverage(at_most=most, experts=int((tokens <= most).sum())) for most in COVERED],
        never_reached=int((tokens == 0).sum()) / tokens.size,
        never_reached_ends=None if drawn is None else list(drawn.never),
        entropy=None if shapes.experts < 2 else _mean(entropy),
        entropy_ends=None if drawn is None or shapes.experts < 2 else list(drawn.entropy_mean),
        resamples=None if drawn is None else drawn.resamples,
        reach_probability=CERTAIN,
        reach=[
            Reach(times=times, tokens=tokens_to_reach(tokens, int(totals.lengths.sum()), times)) for times in REACHED
        ],
        largest_output=_largest(prepared, found, content.massive, corpus),
        super_experts=_reading(prepared, found, found.ours, content.massive, corpus, whole=True),
        super_experts_as_published=_reading(prepared, found, found.published, content.massive, corpus, whole=False),
        attribution=feature_experts(totals, features) if hidden else None,
        massive=massive_experts(totals, content.massive),
        kinds=kinds_of(totals),
    )


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of entropies, which have 9 decimals."""
    return round(float(values.mean()), 9)


def _reading(
    prepared: Prepared,
    found: ExpertFindings,
    reading: SuperExperts | None,
    massive: list[MassiveRow] | None,
    corpus: Corpus,
    *,
    whole: bool,
) -> SuperReading | None:
    """whole: whether the reading's values are those of all tokens, whose places are known."""
    if reading is None:
        return None
    places = [(int(layer), int(expert)) for layer, expert in np.argwhere(reading.marks)]
    places.sort(key=lambda at: (-reading.values[at], at))
    return SuperReading(
        layers_below=reading.layers_below,
        population=reading.population,
        unknown=reading.unknown,
        percentile=reading.percentile,
        largest=reading.largest,
        bound=reading.bound,
        at_most=reading.at_most,
        count=len(places),
        none_because=reading.none_because,
        experts=[
            _placed(prepared, found.totals, at, massive, corpus) if whole else _bare(found.totals, at, reading)
            for at in places[:MAX_SUPER]
        ],
    )


def _bare(totals: ExpertTotals, at: tuple[int, int], reading: SuperExperts) -> SuperExpert:
    return SuperExpert(
        layer=totals.shapes.layers[at[0]],
        expert=number_of(at[1], totals.shapes.experts),
        output=float(reading.values[at]),
        channel=None,
        sequence=None,
        position=None,
        token=None,
        massive=None,
    )


def _placed(
    prepared: Prepared, totals: ExpertTotals, at: tuple[int, int], massive: list[MassiveRow] | None, corpus: Corpus
) -> SuperExpert:
    """An expert with the place of its largest output."""
    layer, sequence, position = (
        totals.shapes.layers[at[0]],
        int(totals.output_sequence[at]),
        int(totals.output_position[at]),
    )
    place = (sequence, position, int(totals.output_channel[at]))
    return SuperExpert(
        layer=layer,
        expert=number_of(at[1], totals.shapes.experts),
        output=float(totals.output_max[at]),
        channel=place[2],
        sequence=sequence,
        position=position,
        token=corpus.shown(sequence, position) if prepared.text else None,
        massive=None
        if massive is None
        else any(row.layer >= layer and (row.sequence, row.position, row.feature) == place for row in massive),
    )


def _largest(
    prepared: Prepared, found: ExpertFindings, massive: list[MassiveRow] | None, corpus: Corpus
) -> SuperExpert | None:
    """The routed expert with the largest output; of equals the first."""
    own = found.totals.output_max[:, : found.totals.shapes.experts]
    if found.totals.sums is None or np.isnan(own).all():
        return None
    layer, expert = np.unravel_index(int(np.nanargmax(own)), own.shape)
    return _placed(prepared, found.totals, (int(layer), int(expert)), massive, corpus)


def expert_notes(found: ExpertFindings) -> list[str]:
    """What a reader must know of the experts' numbers, in sentences for summary.json."""
    shapes, tokens = found.totals.shapes, found.tokens
    never, few = int((tokens == 0).sum()), int((tokens <= FEW).sum())
    notes = []
    if never:
        notes.append(
            f"{never:,} of {tokens.size:,} experts were reached by no token: what they do is unknown, and a calibration on this "
            "corpus would know nothing of them"
        )
    if few > never:
        notes.append(
            f"{few:,} of {tokens.size:,} experts have at most {FEW} tokens: their maxima and means are of these alone, and "
            "so is a calibration on this corpus"
        )
    if found.totals.sums is None:
        notes.append("of the experts routing alone was read: their inputs and outputs are unknown")
    elif found.ours is not None and found.ours.none_because == "tie":
        notes.append(
            "no super expert: the largest output is that of several experts, so that none is above P99.5 of all"
        )
    if lost := int(found.totals.weight_lost.sum()):
        notes.append(f"{lost:,} routing weights are not finite: sums of weights that would hold one are unknown")
    if found.totals.sums is not None and (lost := int(found.totals.sums.nonfinite.sum())):
        notes.append(
            f"{lost:,} values of the experts' down_in are not finite: they are in no maximum, sum or count of hits"
        )
    if found.totals.sums is not None and (lost := int(found.totals.sums.nonfinite_outputs.sum())):
        notes.append(
            f"{lost:,} outputs of experts have values that are not finite: their largest is of the finite ones, and shares of a "
            "feature leave them out"
        )
    if found.ours is not None and found.ours.population < shapes.experts * len(shapes.layers) - never:
        notes.append("an expert whose outputs are not finite is unknown, and not in the population of super experts")
    return notes
