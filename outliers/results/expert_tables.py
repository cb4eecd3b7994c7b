"""The findings of a study's experts -> experts.parquet and router.parquet.

What an expert that no token reached would do is unknown: null in every column but the counts of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from outliers.experts.sums import LADDER
from outliers.experts.table import number_of
from outliers.experts.totals import KINDS, ExpertTotals
from outliers.results.attribution import outputs_floor
from outliers.results.experts import ExpertFindings
from outliers.results.routing import entropies, loads, margin_quantiles, mean_weight_sums, weight_sums
from outliers.results.schema.experts import COVERED, EXPERTS_SCHEMA, MARGIN_LEVELS, ROUTER_SCHEMA
from outliers.results.super_experts import SuperExperts


def experts_table(found: ExpertFindings, magnitude: float) -> pa.Table:
    """experts.parquet: the routed experts of a layer by number, then its shared ones. magnitude: the deciding one."""
    totals, shapes = found.totals, found.totals.shapes
    layers, everyone = len(shapes.layers), shapes.all_experts
    tokens = totals.tokens
    never = tokens == 0
    numbers = np.array([number_of(index, shapes.experts) for index in range(everyone)], np.int32)
    columns: dict[str, Any] = {
        "layer": np.repeat(np.array(shapes.layers, np.int32), everyone),
        "expert": np.tile(numbers, layers),
        "tokens": tokens,
        "weight_sum": weight_sums(totals),
        "output_first": totals.first_row,
        "hits": _hits(totals, magnitude),
    }
    columns |= {f"{kind}_tokens": totals.by_kind[number] for number, kind in enumerate(KINDS)}
    for name, values in _load_columns(found):
        columns[name] = np.full((layers, everyone), np.nan)
        columns[name][:, : shapes.experts] = np.where(never[:, : shapes.experts], np.nan, values)
    for name in ("down_in", "output"):
        largest = getattr(totals, f"{name}_max")
        columns[f"{name}_max"] = largest
        for place in ("column" if name == "down_in" else "channel", "sequence", "position"):
            own = getattr(totals, f"{name}_{place}")
            columns[f"{name}_{place}"] = np.ma.masked_array(own, np.isnan(largest))
    for name, reading in (("super_expert", found.ours), ("super_expert_as_published", found.published)):
        columns[name] = _marks(found, reading, whole=reading is found.published)
    return _table(columns, EXPERTS_SCHEMA)


def _load_columns(found: ExpertFindings) -> Iterator[tuple[str, NDArray[np.float64]]]:
    ends = (np.full(found.tokens.shape, np.nan),) * 2 if found.drawn is None else found.drawn.load
    yield from zip(("load", "load_low", "load_high"), (loads(found.tokens), *ends), strict=True)


def _hits(totals: ExpertTotals, magnitude: float) -> Any:
    """(L, A) masked int64, hits of `down_in` at the deciding magnitude; masked where unknown."""
    if totals.sums is None or magnitude not in LADDER:
        return np.ma.masked_array(np.zeros(totals.tokens.shape, np.int64), True)
    return np.ma.masked_array(totals.sums.hits[LADDER.index(magnitude)], totals.tokens == 0)


def _marks(found: ExpertFindings, reading: SuperExperts | None, *, whole: bool) -> Any:
    """(L, A) masked bool. whole: whether every expert is judged, also one without a value."""
    shape = found.totals.tokens.shape
    if reading is None:
        return np.ma.masked_array(np.zeros(shape, np.bool_), True)
    return np.ma.masked_array(reading.marks, np.zeros(shape, np.bool_) if whole else np.isnan(reading.values))


def router_table(found: ExpertFindings) -> pa.Table:
    """router.parquet."""
    totals, tokens, drawn = found.totals, found.tokens, found.drawn
    layers = len(totals.shapes.layers)
    unknown = np.full(layers, np.nan)
    load = loads(tokens)
    busiest = tokens.argmax(axis=1)
    margins = [margin_quantiles(row, MARGIN_LEVELS) for row in totals.margins]
    floors = [None if totals.sums is None else outputs_floor(totals, layer) for layer in range(layers)]
    columns: dict[str, Any] = {
        "layer": np.array(totals.shapes.layers, np.int32),
        "tokens": np.full(layers, int(totals.lengths.sum()), np.int64),
        "entropy": entropies(tokens),
        "entropy_low": unknown if drawn is None else drawn.entropy[0],
        "entropy_high": unknown if drawn is None else drawn.entropy[1],
        "busiest_expert": busiest.astype(np.int32),
        "busiest_load": load[np.arange(layers), busiest],
        "mean_weight_sum": mean_weight_sums(totals),
        "margin_tokens": np.array([count for count, _ in margins], np.int64),
        "outputs_floor": np.array([np.nan if floor is None else floor for floor in floors], np.float32),
    }
    columns |= {f"at_most_{most}": (tokens <= most).sum(axis=1) for most in COVERED}
    for number, level in enumerate(MARGIN_LEVELS):
        values = [quantiles[number] for _, quantiles in margins]
        columns[f"margin_p{round(100 * level):02d}"] = np.array([np.nan if v is None else v for v in values])
    return _table(columns, ROUTER_SCHEMA)


def _table(columns: dict[str, Any], schema: Any) -> pa.Table:
    return pa.Table.from_arrays([_column(columns[field.name], field.type) for field in schema], schema=schema)


def _column(values: Any, kind: Any) -> pa.Array:
    """A flat column; NaN and what is masked become null."""
    flat = np.ma.masked_array(values).ravel()
    mask = np.ma.getmaskarray(flat)
    if flat.dtype.kind == "f":
        mask = mask | np.isnan(flat.data)
    own = flat.data
    if pa.types.is_int32(kind):
        own = own.astype(np.int32)
    elif pa.types.is_float32(kind):
        own = own.astype(np.float32)
    return pa.array(own, type=kind, mask=mask)
