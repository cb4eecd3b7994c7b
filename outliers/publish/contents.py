"""Judges of content: whether bytes are what an allowed name promises, and nothing besides.

Each `check_` takes the bytes of one file and raises NotAllowedError with what is wrong and the limit. They trust
nothing: lengths before contents, contents before meaning. They know no paths and no targets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ValidationError

from outliers.files.parquet import numbers_of, open_parquet
from outliers.publish.expert_contents import check_agreement as check_agreement
from outliers.publish.expert_contents import check_experts as check_experts
from outliers.publish.expert_contents import check_router as check_router
from outliers.publish.format_contents import check_quantization as check_quantization
from outliers.publish.parquet_contents import MAX_ROWS as MAX_ROWS
from outliers.publish.parquet_contents import NotAllowedError as NotAllowedError
from outliers.publish.parquet_contents import check_columns, check_extras, check_nulls
from outliers.results.intervals import SHARE_SPANS
from outliers.results.schema import (
    EARLIER_FEATURES_SCHEMA,
    FEATURES_SCHEMA,
    MAX_MAGNITUDES,
    MOMENT_COLUMNS,
    NULLABLE_COLUMNS,
    SENSITIVITY_SCHEMA,
    Pictures,
    Probes,
    SensitivityRecord,
    StudySummary,
    Tokens,
    first_error,
)
from outliers.results.schema.fields import check_unique
from outliers.results.schema.pictures import MAX_SHOWN, LargestRow
from outliers.spec import BLOCK, BLOCK_SITES
from outliers.spec.formats import parse_format
from outliers.untrusted.visible import visible_values

MAX_LOG_BYTES = 1_000_000

_NOT_TEXT = re.compile(r"[^\t\n\r\x1b\x20-\x7e\x80-\U0010ffff]|[\x80-\x84\x86-\x9f]")
_ENCODED = re.compile(r"[A-Za-z0-9+/=_-]{4096,}")

_Model = TypeVar("_Model", bound=BaseModel)


def check_summary(data: bytes) -> StudySummary:
    """summary.json, parsed."""
    summary = _checked_json(data, StudySummary)
    try:
        summary.check_consistent()
    except ValueError as error:
        raise NotAllowedError(f"is not the JSON that is published: {error}") from error
    shares = None if summary.intervals is None else summary.intervals.shares
    if shares is not None and shares not in SHARE_SPANS:
        raise NotAllowedError(
            f"is not the JSON that is published: intervals.shares is {shares[:40]!r}, not one of {', '.join(SHARE_SPANS)}"
        )
    return summary


def check_tokens(data: bytes, summary: StudySummary) -> None:
    """tokens.json, of the same study as `summary`."""
    study_id = _checked_json(data, Tokens).study_id
    if study_id != summary.study_id:
        raise NotAllowedError(f"is of the study {study_id}, summary.json of {summary.study_id}")


def check_pictures(data: bytes | None, summary: StudySummary) -> None:
    """pictures.json, of the same study as `summary`, where a study has one."""
    if data is None:
        return
    found = _checked_json(data, Pictures)
    if found.study_id != summary.study_id:
        raise NotAllowedError(f"is of the study {found.study_id}, summary.json of {summary.study_id}")
    try:
        _check_pictures(found, summary)
    except ValueError as error:
        raise NotAllowedError(f"is not the JSON that is published: {error}") from error


def _check_pictures(found: Pictures, summary: StudySummary) -> None:
    """Raise ValueError where the extremes or kinds are not those of the summary's layers, sites and features."""
    most: dict[tuple[str, int], float | None] = {(row.site, row.layer): row.max_magnitude for row in summary.layers}
    own: dict[tuple[str, int], LargestRow] = {(row.site, row.layer): row for row in found.layers}
    if own.keys() != most.keys():
        raise ValueError("its layers are not those of summary.json")
    for (site, layer), limit in most.items():
        items = own[site, layer].largest
        sizes = [abs(item.value) for item in items]
        ordered = sorted(items, key=lambda item: (-abs(item.value), item.feature))
        if items != ordered or (sizes[0] if sizes else None) != limit:
            raise ValueError(f"the largest values at {site} of layer {layer} are {sizes}, summary.json has {limit}")
    width = summary.max_width
    numbers = [item.feature for row in found.layers for item in row.largest] + [row.feature for row in found.features]
    if any(number >= width for number in numbers):
        raise ValueError(f"feature {max(numbers)} of a model with at most {width} a site")
    passing = [row.feature for row in summary.systematic][:MAX_SHOWN]
    if [row.feature for row in found.features][: len(passing)] != passing:
        raise ValueError("its features do not begin with the systematic ones of summary.json")
    _check_shown(found, summary, most)
    if (kinds := found.kinds) is not None and (
        kinds.tokens != summary.corpus.num_tokens or [row.feature for row in kinds.features] != passing
    ):
        raise ValueError("its kinds of tokens are of other tokens or features than summary.json's")


def _check_shown(found: Pictures, summary: StudySummary, most: Mapping[tuple[str, int], float | None]) -> None:
    """Raise ValueError where a feature of the heat map has values that summary.json rules out.

    most: the largest magnitude of each captured site and layer, None where no value is finite.
    """
    layers, decides = sorted({layer for _, layer in most}), summary.criteria.site
    reach = {row.feature: row.max_magnitude for row in summary.systematic}
    for shown in found.features:
        sites = shown.values.keys()
        if decides not in sites or not sites <= summary.readings.keys():
            raise ValueError(f"feature {shown.feature} has other sites or layers than were read")
        for site, values in shown.values.items():
            if len(values) != len(layers):
                raise ValueError(f"feature {shown.feature} has other sites or layers than were read")
            parts = BLOCK_SITES if site == BLOCK else (site,)
            for layer, value in zip(layers, values, strict=True):
                limit = max((size for part in parts if (size := most.get((part, layer))) is not None), default=None)
                if value is not None and (limit is None or abs(value) > limit):
                    raise ValueError(
                        f"feature {shown.feature} is {value} at {site} of layer {layer}, more than any there"
                    )
        largest = max((abs(value) for value in shown.values[decides] if value is not None), default=None)
        if largest != reach.get(shown.feature, largest):
            raise ValueError(f"feature {shown.feature} is {largest} at most, summary.json has {reach[shown.feature]}")


def _checked_json(data: bytes, model: type[_Model]) -> _Model:
    try:
        # pydantic's own parser keeps the last of two equal keys: what the first one held would go unseen
        json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats)
        return model.model_validate_json(data)
    except ValidationError as error:
        raise NotAllowedError(f"is not the JSON that is published: {first_error(error)}") from error
    except (ValueError, RecursionError) as error:
        raise NotAllowedError(f"is not readable JSON: {str(error)[:200]}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def check_features(data: bytes, summary: StudySummary) -> None:
    """features.parquet: exactly FEATURES_SCHEMA, at most one row a (site, layer, feature) of `summary`'s model."""
    try:
        file = open_parquet(data)
        check_columns(file.schema_arrow, FEATURES_SCHEMA, (FEATURES_SCHEMA.names, EARLIER_FEATURES_SCHEMA.names))
        most_rows = min(summary.max_rows, MAX_ROWS)
        if file.metadata.num_rows > most_rows:
            raise NotAllowedError(f"has {file.metadata.num_rows:,} rows, its model can have {most_rows:,}")
        check_extras(file.metadata, len(data), MAX_MAGNITUDES)
        _check_rows(file.read(use_threads=False), summary)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise NotAllowedError(f"is not readable Parquet: {str(error)[:200]}") from error


def _check_rows(table: Any, summary: StudySummary) -> None:
    check_nulls(table, NULLABLE_COLUMNS)
    if not table.num_rows:
        return
    known = set(summary.readings)
    unknown = set(pc.unique(table["site"]).to_pylist()) - known
    if unknown:
        raise NotAllowedError(f"has rows of the site {sorted(unknown)[0]!r}, the summary has {sorted(known)}")
    for name, limit in (("layer", summary.model.num_layers), ("feature", summary.max_width)):
        low, high = pc.min(table[name]).as_py(), pc.max(table[name]).as_py()
        if low < 0 or high >= limit:
            raise NotAllowedError(f"has {name}s from {low} to {high}, its model has 0 to {limit - 1}")
    strange = set(pc.unique(table["layer"]).to_pylist()) - {row.layer for row in summary.layers}
    if strange:
        raise NotAllowedError(f"has rows of layer {min(strange)}, which the summary does not have")
    # counted, not compared: one row for each cell is what bounds the table. Layer and feature are in their ranges by now, so
    # that a cell has a number of its own
    sites = table["site"].combine_chunks().dictionary_encode()
    site, layer, feature = (
        numbers_of(column).astype(np.int64) for column in (sites.indices, table["layer"], table["feature"])
    )
    cells = np.unique((site * summary.model.num_layers + layer) * summary.max_width + feature).size
    if cells != table.num_rows:
        raise NotAllowedError(f"has {table.num_rows:,} rows for {cells:,} (site, layer, feature); one each is allowed")
    lengths = pc.unique(pc.list_value_length(table["ladder_hits"])).to_pylist()
    if len(lengths) != 1 or lengths[0] > MAX_MAGNITUDES:
        raise NotAllowedError(
            f"has ladder_hits of lengths {lengths[:5]}; one length of at most {MAX_MAGNITUDES} is allowed"
        )
    at_block = np.array([name == BLOCK for name in sites.dictionary.to_pylist()])[site]
    for name in MOMENT_COLUMNS:
        if not numbers_of(pc.is_null(table[name]))[at_block].all():
            raise NotAllowedError(f"has a {name} at the site block, which has none")


def check_probes(data: bytes) -> Probes:
    """probes.json, parsed: each change has a name of its own, formats are known ones, unprintable characters are shown."""
    probes = _checked_json(data, Probes)
    try:
        check_unique((change.name for change in probes.changes), "the change")
        for change in probes.changes:
            for name in (change.format, change.weights):
                if name is not None:
                    parse_format(name)
        return Probes.model_validate(visible_values(probes.model_dump(mode="json")))
    except ValidationError as error:
        raise NotAllowedError(f"is not the JSON that is published: {first_error(error)}") from error
    except ValueError as error:
        raise NotAllowedError(f"is not the JSON that is published: {str(error)[:200]}") from error


def check_sensitivity(data: bytes, probes: Probes) -> list[dict[str, Any]]:
    """The rows of sensitivity.parquet: exactly SENSITIVITY_SCHEMA, one row a (site, layer, format) of the probe's sites."""
    try:
        file = open_parquet(data)
        columns = {field.name: field.type for field in file.schema_arrow}
        if columns != dict(zip(SENSITIVITY_SCHEMA.names, SENSITIVITY_SCHEMA.types, strict=True)):
            raise NotAllowedError(f"has the columns {list(columns)[:20]}, not {SENSITIVITY_SCHEMA.names}")
        if file.metadata.num_rows > MAX_ROWS:
            raise NotAllowedError(f"has {file.metadata.num_rows:,} rows, at most {MAX_ROWS:,} are published")
        check_extras(file.metadata, len(data), 1)
        rows: list[dict[str, Any]] = file.read(use_threads=False).to_pylist()
        for row in rows:
            SensitivityRecord.model_validate(row)
            parse_format(row["format"])
        check_unique(((row["site"], row["layer"], row["format"]) for row in rows), "the row")
    except ValidationError as error:
        raise NotAllowedError(f"has a row that is not one: {first_error(error)}") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise NotAllowedError(f"is not readable Parquet: {str(error)[:200]}") from error
    if strange := {row["site"] for row in rows} - set(probes.sites):
        raise NotAllowedError(f"has rows of the site {min(strange)}, the probe has {', '.join(probes.sites)}")
    return rows


def check_log(data: bytes) -> None:
    """run.log: plain text."""
    if len(data) > MAX_LOG_BYTES:
        raise NotAllowedError(f"has {len(data):,} bytes, a log of at most {MAX_LOG_BYTES:,} is published")
    _check_text(data)


def _check_text(data: bytes) -> None:
    """Plain UTF-8 text: no control characters but line ends, tabs and colours, and no encoded binary."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotAllowedError(f"is not UTF-8 text: byte {data[error.start]:#04x} at {error.start:,}") from error
    strange = _NOT_TEXT.search(text)
    if strange:
        raise NotAllowedError(f"is not text: character {ord(strange[0]):#04x} at {strange.start():,}")
    encoded = _ENCODED.search(text)
    if encoded:
        raise NotAllowedError(
            f"holds {len(encoded[0]):,} characters without a space at {encoded.start():,}; 4,095 are allowed"
        )
