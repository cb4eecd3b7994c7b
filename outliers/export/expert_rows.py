"""Rows of an importance matrix for a mixture of experts: an expert's own tokens are what its weights are judged by.

    blk.N.ffn_gate_exps, ffn_up_exps    the experts' input, a row an expert
    blk.N.ffn_down_exps                 the input of their second projection
    blk.N.ffn_down_shexp                the same of a shared expert, which every token reaches

Rows are in the order of the checkpoint's experts. An expert that no token reached has the count 0, as llama-imatrix writes it
(save_imatrix of tools/imatrix/imatrix.cpp): llama-quantize takes all of its columns as equally important.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outliers.errors import BadInput, CorruptCapture
from outliers.experts.totals import ExpertTotals
from outliers.export.gguf_names import gguf_names
from outliers.export.source import MOE_SITES, Columns, Study
from outliers.model.readers import Reader
from outliers.units import format_ranges

FEW_TOKENS = 50
"""Experts with fewer tokens are counted in a line: the mean square of n normal values has a relative standard deviation of
sqrt(2/n), which is 20% here."""
EXACT_COUNT = 1 << 24
"""The largest count up to which float32 holds every whole number."""
_AGAIN = f"run it again with {MOE_SITES} --experts all"


@dataclass(frozen=True)
class Rows:
    """Statistics of the inputs of one weight, a row for each of its E matrices (1 but for experts).

    counts: (E,) int64, tokens. squares: (E, W) float64, sums of x^2. total: the same of x; None where a study has none.
    """

    counts: NDArray[np.int64]
    squares: NDArray[np.float64]
    total: NDArray[np.float64] | None

    @classmethod
    def of(cls, columns: Columns) -> Rows:
        """The one row of an input that all tokens share."""
        return cls(np.array([columns.count], np.int64), columns.squares[None], columns.total[None])


def expert_rows(study: Study) -> dict[str, Rows]:
    """Name of each weight of experts in a GGUF file -> its rows, routed and shared; none for a dense model.

    Raises BadInput for what the study did not keep, and for values that are not finite.
    """
    moe = study.prepared.model.anatomy.moe_layers
    if not moe:
        return {}
    totals = _checked(study)
    found: dict[str, Rows] = {}
    for reader in study.readers:
        if reader.kind == "experts":
            names = gguf_names(study, (reader,))[reader.name]
            found |= dict(zip(names, _of_layer(totals, reader.layer), strict=True))
    shared = [reader for reader in study.readers if is_shared_down(reader) and reader.layer in moe]
    for reader in shared:
        (name,) = gguf_names(study, (reader,))[reader.name]
        found[name] = _shared(totals, reader)
    return found


def is_shared_down(reader: Reader) -> bool:
    """Whether a module is the second projection of a shared expert."""
    return reader.site is None and ".shared_expert" in reader.name and reader.name.endswith(".down_proj")


def _of_layer(totals: ExpertTotals, layer: int) -> tuple[Rows, Rows, Rows]:
    """The rows of gate, up and down. The caller has called `_checked`."""
    row, experts = totals.shapes.layers.index(layer), totals.shapes.experts
    sums, inputs = totals.sums, totals.input_squares
    if sums is None or inputs is None:
        raise CorruptCapture("sums of experts that were there are not: analyze again")
    counts = totals.tokens[row, :experts]
    first = Rows(counts, inputs[row], None)
    return first, first, Rows(counts, sums.squares[row], sums.total[row])


def _shared(totals: ExpertTotals, reader: Reader) -> Rows:
    row, sums, shapes = totals.shapes.layers.index(reader.layer), totals.sums, totals.shapes
    if sums is None or shapes.shared != 1:
        raise BadInput(
            f"an importance matrix needs the sums of {reader.name}, and the study has those of {shapes.shared} shared experts "
            "in a layer: make it with llama-imatrix"
        )
    return Rows(totals.tokens[row, shapes.experts :], sums.shared_squares[row], sums.shared_total[row])


def _checked(study: Study) -> ExpertTotals:
    """The totals of the experts, which have all that is needed. Raises BadInput saying which option gives what is missing."""
    totals, moe = study.experts, study.prepared.model.anatomy.moe_layers
    why = f"an importance matrix of {study.name} needs sums for each expert, over the tokens that are routed to it"
    if totals is None:
        raise BadInput(f"{why}, and this study has none: the layers with experts are {format_ranges(moe)}; {_AGAIN}")
    if totals.sums is None:
        known = study.prepared.model.experts
        reason = known.reason if known is not None and known.watch == "routing" else None
        remedy = f"{reason}: make it with llama-imatrix" if reason else _AGAIN
        raise BadInput(f"{why}, and this study read which tokens reach which experts alone: {remedy}")
    if totals.input_squares is None:
        raise BadInput(f"{why}, and the experts' input, mlp_in, was not captured: {_AGAIN}")
    absent = [layer for layer in moe if layer not in totals.shapes.layers]
    if absent:
        raise BadInput(
            f"{why}, and this study captured no experts in layers {format_ranges(absent)}: run it again with --layers all"
        )
    if totals.sequences.size != study.prepared.corpus.num_sequences:
        raise CorruptCapture(
            f"the sums of the experts of {study.prepared.study_id} are of {totals.sequences.size} of "
            f"{study.prepared.corpus.num_sequences} sequences: analyze again"
        )
    _check_values(totals, why)
    return totals


def _check_values(totals: ExpertTotals, why: str) -> None:
    sums = totals.sums
    if sums is None:
        return
    if not np.array_equal(sums.rows, totals.tokens):
        raise CorruptCapture("the sums of the experts and their routing are of other tokens: analyze again")
    layers, experts = np.nonzero(sums.nonfinite)
    if layers.size:
        raise BadInput(
            f"{why}, and {int(sums.nonfinite.sum()):,} values at the second projection are not finite, the first in layer "
            f"{totals.shapes.layers[int(layers[0])]}, expert {int(experts[0])}: run the study again with --dtype float32"
        )
    if totals.input_squares is not None and not np.isfinite(totals.input_squares).all():
        raise BadInput(f"{why}, and values of their input are not finite: run the study again with --dtype float32")


def expert_notes(study: Study, found: dict[str, Rows], *, sums: bool) -> list[str]:
    """What a person must know of the rows of experts, and of the weights that have none."""
    lines = []
    totals = study.experts
    if totals is not None and study.prepared.model.anatomy.moe_layers:
        counts = totals.tokens[:, : totals.shapes.experts]
        none, few = int((counts == 0).sum()), int(((counts > 0) & (counts < FEW_TOKENS)).sum())
        if none:
            lines.append(
                f"{none:,} of {counts.size:,} experts got no token: their count is 0, and llama-quantize takes all of their "
                "columns as equally important"
            )
        if few:
            lines.append(
                f"{few:,} of {counts.size:,} experts got fewer than {FEW_TOKENS} tokens; more sequences reach them"
            )
        if sums:
            lines.append(
                "without sums of x: ffn_gate_exps and ffn_up_exps, for a study keeps the squares of the experts' input"
            )
    missing = [reader for reader in study.readers if reader.site is None and not is_shared_down(reader)]
    dense = _uncaptured_down(study)
    kinds = dict.fromkeys(reader.name.rpartition(".")[2] for reader in (*missing, *dense))
    if kinds:
        layers = format_ranges(sorted({reader.layer for reader in (*missing, *dense)}))
        lines.append(f"without rows, because no site is their input: {', '.join(kinds)} of layers {layers}")
    if any(int(rows.counts.max()) > EXACT_COUNT for rows in found.values()):
        lines.append(f"counts above {EXACT_COUNT:,} are rounded: the format holds them as float32")
    return lines


def _uncaptured_down(study: Study) -> list[Reader]:
    """Second projections of dense layers in a model with experts: a study has down_in in every layer or in none."""
    moe = study.prepared.model.anatomy.moe_layers
    return [
        reader
        for reader in study.readers
        if moe and reader.site == "down_in" and not study.has("down_in", reader.layer)
    ]
