"""The judges of experts.parquet and router.parquet: whether their bytes are what the study's experts do, and nothing besides.

What follows from other numbers is computed anew: loads, counts of coverage, entropies, super experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from outliers.files.parquet import open_parquet
from outliers.publish.parquet_contents import MAX_ROWS, NotAllowedError, check_columns, check_extras, check_nulls
from outliers.results.schema import (
    EXPERTS_NULLABLE,
    EXPERTS_SCHEMA,
    ROUTER_NULLABLE,
    ROUTER_SCHEMA,
    ExpertsBlock,
    StudySummary,
    SuperReading,
)
from outliers.results.schema.experts import COVERED, MAX_SUPER

_CLOSE = 1e-9
_KINDS = ("first_tokens", "delimiter_tokens", "special_tokens")
_UNREACHED = ("layer", "expert", "tokens", *_KINDS, "super_expert_as_published")
"""Columns that an expert has that no token reached."""
_PLACES = {
    "down_in_max": ("down_in_column", "down_in_sequence", "down_in_position"),
    "output_max": ("output_channel", "output_sequence", "output_position", "output_first"),
}
MAX_COLUMN = 1 << 17
"""Columns of an expert's second projection; a summary does not say how many there are."""

Rows = list[dict[str, Any]]


def check_experts(data: bytes | None, summary: StudySummary) -> None:
    """experts.parquet: exactly EXPERTS_SCHEMA, a row for each expert; there where the summary has experts, and only there."""
    _judge(data, summary, EXPERTS_SCHEMA, EXPERTS_NULLABLE, _check_expert_rows)


def check_router(data: bytes | None, summary: StudySummary) -> None:
    """router.parquet: exactly ROUTER_SCHEMA, a row for each layer with experts; there where the summary has experts."""
    _judge(data, summary, ROUTER_SCHEMA, ROUTER_NULLABLE, _check_router_rows)


def check_agreement(experts: bytes | None, router: bytes | None) -> None:
    """Refuses a router.parquet whose counts are not those of experts.parquet. Both were judged before."""
    if experts is None or router is None:
        return
    rows: dict[int, list[int]] = {}
    for row in open_parquet(experts).read(columns=["layer", "expert", "tokens"], use_threads=False).to_pylist():
        if row["expert"] >= 0:
            rows.setdefault(row["layer"], []).append(row["tokens"])
    for row in open_parquet(router).read(use_threads=False).to_pylist():
        tokens = rows[row["layer"]]
        found = [row[f"at_most_{most}"] for most in COVERED]
        if found != [sum(count <= most for count in tokens) for most in COVERED]:
            raise NotAllowedError(f"has counts of layer {row['layer']} that are not those of experts.parquet")
        busiest = tokens.index(max(tokens))
        load = tokens[busiest] * len(tokens) / sum(tokens)
        if row["busiest_expert"] != busiest or not _close(row["busiest_load"], load):
            raise NotAllowedError(f"names another busiest expert of layer {row['layer']} than experts.parquet")
        if not _close(row["entropy"], _entropy(tokens)):
            raise NotAllowedError(f"has an entropy of layer {row['layer']} that its tokens do not give")


def _entropy(tokens: Sequence[int]) -> float | None:
    if len(tokens) < 2:
        return None
    whole = sum(tokens)
    return -math.fsum(n / whole * math.log(n / whole) for n in tokens if n) / math.log(len(tokens))


def _judge(
    data: bytes | None,
    summary: StudySummary,
    schema: Any,
    nullable: Sequence[str],
    check: Callable[[Rows, StudySummary, ExpertsBlock], None],
) -> None:
    block = summary.experts
    if block is None:
        if data is not None:
            raise NotAllowedError("is there, and summary.json says nothing of it")
        return
    if data is None:
        raise NotAllowedError("is missing")
    try:
        file = open_parquet(data)
        check_columns(file.schema_arrow, schema, (schema.names,))
        wanted = len(block.layers) * (block.experts + block.shared if schema is EXPERTS_SCHEMA else 1)
        if (rows_there := file.metadata.num_rows) != wanted or wanted > MAX_ROWS:
            raise NotAllowedError(f"has {rows_there:,} rows, {wanted:,} are due and at most {MAX_ROWS:,} are published")
        check_extras(file.metadata, len(data), 1)
        table = file.read(use_threads=False)
        check_nulls(table, nullable)
        rows: Rows = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise NotAllowedError(f"is not readable Parquet: {str(error)[:200]}") from error
    for row in rows:
        if any(isinstance(value, float) and not math.isfinite(value) for value in row.values()):
            raise NotAllowedError(f"has a number that is not finite in layer {row['layer']}")
    check(rows, summary, block)


def _check_expert_rows(rows: Rows, summary: StudySummary, block: ExpertsBlock) -> None:
    numbers = [*range(block.experts), *range(-1, -block.shared - 1, -1)]
    for at, layer in enumerate(block.layers):
        own = rows[at * len(numbers) : (at + 1) * len(numbers)]
        if [(row["layer"], row["expert"]) for row in own] != [(layer, number) for number in numbers]:
            raise NotAllowedError(f"has rows of other experts than those of layer {layer}, or in another order")
        for row in own:
            _check_expert(row, summary, block)
        routed = sum(row["tokens"] for row in own[: block.experts])
        if not routed or routed != summary.corpus.num_tokens * block.slots:
            raise NotAllowedError(
                f"has {routed:,} routed tokens in layer {layer}, {summary.corpus.num_tokens:,} x {block.slots} are due"
            )
    _check_coverage(rows, block)
    for name, reading in (
        ("super_expert", block.super_experts),
        ("super_expert_as_published", block.super_experts_as_published),
    ):
        _check_super(rows, name, reading)


def _check_expert(row: dict[str, Any], summary: StudySummary, block: ExpertsBlock) -> None:
    what, corpus = f"of expert {row['expert']} of layer {row['layer']}", summary.corpus
    tokens, shared = row["tokens"], row["expert"] < 0
    most = corpus.num_tokens
    if not 0 <= tokens <= most or any(not 0 <= row[name] <= tokens for name in _KINDS):
        raise NotAllowedError(f"has {tokens:,} tokens, or more of a kind, {what}; the corpus has {most:,}")
    if tokens == 0 and any(value is not None for name, value in row.items() if name not in _UNREACHED):
        raise NotAllowedError(f"has a value {what}, which no token reached")
    load = None if shared or not tokens else tokens * block.experts / (most * block.slots)
    if not _close(row["load"], load):
        raise NotAllowedError(f"has a load {what} that its tokens do not give")
    drawn = block.resamples is not None and load is not None
    low, high = row["load_low"], row["load_high"]
    if (low is not None) != drawn or (high is not None) != drawn or (drawn and not 0 <= low <= high <= block.experts):
        raise NotAllowedError(f"has a load {what} whose ends are not valid")
    if block.read == "routing" and any(row[name] is not None for name in (*_PLACES, "hits")):
        raise NotAllowedError(f"has inputs or outputs {what}, and the study read routing alone")
    if row["hits"] is not None and row["hits"] < 0:
        raise NotAllowedError(f"has {row['hits']} hits {what}")
    limits = (MAX_COLUMN, summary.model.hidden_size)
    for (name, places), width in zip(_PLACES.items(), limits, strict=True):
        _check_largest(row, name, places, (width, corpus.num_sequences, corpus.sequence_length), what)


def _check_largest(
    row: dict[str, Any], name: str, places: tuple[str, ...], limits: tuple[int, int, int], what: str
) -> None:
    """A magnitude with its channel, sequence and position, all known or none."""
    largest, where = row[name], [row[place] for place in places[:3]]
    if any((value is None) != (largest is None) for value in where):
        raise NotAllowedError(f"has {name} without its place, or a place without it, {what}")
    if largest is None:
        if len(places) > 3 and row[places[3]] is not None:
            raise NotAllowedError(f"has {places[3]} without {name} {what}")
        return
    if largest < 0 or any(not 0 <= value < limit for value, limit in zip(where, limits, strict=True)):
        raise NotAllowedError(f"has {name} {largest:g} at {where} {what}: not a place of this model and corpus")
    if len(places) > 3 and row[places[3]] is not None and not 0 <= row[places[3]] <= largest:
        raise NotAllowedError(f"has {places[3]} above {name} {what}")


def _check_coverage(rows: Rows, block: ExpertsBlock) -> None:
    tokens = [row["tokens"] for row in rows if row["expert"] >= 0]
    if [one.experts for one in block.coverage] != [sum(n <= most for n in tokens) for most in COVERED]:
        raise NotAllowedError("has tokens that do not give the coverage in summary.json")
    if not _close(block.never_reached, sum(n == 0 for n in tokens) / len(tokens)):
        raise NotAllowedError("has tokens that do not give never_reached in summary.json")


def _check_super(rows: Rows, name: str, reading: SuperReading | None) -> None:
    """The marks are those of the bounds in the summary, and its list has them."""
    published = name != "super_expert"
    column = "output_first" if published else "output_max"
    marked, due = [], []
    for row in rows:
        value, mark = row[column], row[name]
        judged = reading is not None and (published or (row["expert"] >= 0 and value is not None))
        if (mark is not None) != judged:
            raise NotAllowedError(f"has {name} {mark} for expert {row['expert']} of layer {row['layer']}")
        if reading is None:
            continue
        inside = reading.layers_below is None or row["layer"] < reading.layers_below
        over = value is not None and value > (reading.percentile or 0) and value > (reading.bound or 0)
        due += [(row["layer"], row["expert"])] if judged and inside and over else []
        marked += [(row["layer"], row["expert"])] if mark else []
    if reading is None:
        return
    if marked != due or len(marked) != reading.count:
        raise NotAllowedError(f"has {name} at {len(marked)} experts, the bounds in summary.json give {len(due)}")
    listed = {(row.layer, row.expert) for row in reading.experts}
    if not listed <= set(marked) or (len(marked) <= MAX_SUPER and len(listed) != len(marked)):
        raise NotAllowedError(f"has {name} at other experts than summary.json")


def _check_router_rows(rows: Rows, summary: StudySummary, block: ExpertsBlock) -> None:
    if [row["layer"] for row in rows] != block.layers:
        raise NotAllowedError("has rows of other layers than those with experts, or in another order")
    drawn = block.resamples is not None and block.experts > 1
    for row in rows:
        what = f"of layer {row['layer']}"
        if row["tokens"] != summary.corpus.num_tokens or not 0 <= row["margin_tokens"] <= row["tokens"]:
            raise NotAllowedError(f"has {row['tokens']:,} tokens {what}, the corpus has {summary.corpus.num_tokens:,}")
        low, high = row["entropy_low"], row["entropy_high"]
        if (low is not None) != drawn or (high is not None) != drawn or (drawn and not 0 <= low <= high <= 1):
            raise NotAllowedError(f"has an entropy {what} whose ends are not valid")
        margins = [value for name, value in row.items() if name.startswith("margin_p") and value is not None]
        if margins != sorted(margins) or (margins and not row["margin_tokens"]):
            raise NotAllowedError(f"has router margins {what} that are not in order")
        if row["outputs_floor"] is not None and (row["outputs_floor"] < 0 or block.read == "routing"):
            raise NotAllowedError(f"has an outputs_floor {what} that no outputs give")


def _close(found: float | None, due: float | None) -> bool:
    if found is None or due is None:
        return found is due
    return abs(found - due) <= 1e-8 + _CLOSE * abs(due)
