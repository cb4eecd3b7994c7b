"""summary.json as those read it who read many: only what a table of studies needs, from any program of version 1.

`schema` is strict about what may be published; a reader must not be, or a newer program's additions would take its studies
out of every atlas. What is read is held to the same types and limits. Before it: `published`. After it: `atlas`, `compare`.
"""

from __future__ import annotations

from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from outliers.errors import PublishRefused
from outliers.publish.shelf import Published
from outliers.results import schema
from outliers.untrusted.strict_json import strict_json


class _Lenient(BaseModel):
    # what a newer program adds to a summary of version 1 must not take its studies out of the atlas
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Interval(schema.IntervalBlock):
    model_config = _Lenient.model_config


class FoundFeature(schema.FeatureRow):
    model_config = _Lenient.model_config
    interval: _Interval | None = None


class _Model(schema.ModelBlock):
    model_config = _Lenient.model_config


class _Corpus(schema.CorpusBlock):
    model_config = _Lenient.model_config


class _Criteria(schema.CriteriaBlock):
    model_config = _Lenient.model_config


class _Counts(schema.IntervalCounts):
    model_config = _Lenient.model_config
    shares: str | None = None  # type: ignore[assignment]  # a newer program may have more kinds


class _Perplexity(schema.Perplexity):
    model_config = _Lenient.model_config


class _Sweep(schema.Sweep):
    model_config = _Lenient.model_config


class _Legacy(_Lenient):
    feature_sequence_pairs: schema.Count
    features: Annotated[list[FoundFeature], Field(max_length=schema.MAX_FEATURES)]


class _Readings(_Lenient):
    legacy: _Legacy | None = None


class _Layer(_Lenient):
    layer: schema.Layer


class FoundSummary(_Lenient):
    """What an atlas and a comparison read of summary.json."""

    study_id: schema.Digest
    capture_id: schema.Digest
    model: _Model
    corpus: _Corpus
    criteria: _Criteria
    readings: dict[str, _Readings]
    reading_counts: dict[str, dict[str, schema.Count]] = {}
    systematic: Annotated[list[FoundFeature], Field(max_length=schema.MAX_FEATURES)]
    intervals: _Counts | None = None
    layers: Annotated[list[_Layer], Field(max_length=5 * schema.MAX_LAYERS)]
    massive_count: schema.Count | None = None
    perplexity: _Perplexity | None = None
    sweep: _Sweep
    notes: Annotated[list[schema.Note], Field(max_length=100)] = []


class _Version(_Lenient):
    schema_version: int


def read_found(study: Published) -> FoundSummary:
    """summary.json of a study; PublishRefused, naming it, where it is of a newer format or not one."""
    data, url = study.summary or b"", study.url
    try:
        strict_json(data)  # the parser of the schema takes two equal keys, and any depth in what it passes over
        version = _Version.model_validate_json(data).schema_version
        if version != 1:
            raise PublishRefused(
                f"summary.json of {url} has schema_version {version}, this program reads 1; update outlier-features"
            )
        found = FoundSummary.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"]) or "it"
        raise PublishRefused(f"summary.json of {url} is malformed: {place}: {first['msg']}") from error
    except ValueError as error:
        raise PublishRefused(f"summary.json of {url} is malformed: {error}") from error
    if found.study_id != study.manifest["study_id"]:
        raise PublishRefused(f"summary.json of {url} is of the study {found.study_id}; remove it and publish again")
    return found


def check_columns(table: Any, found: FoundSummary) -> None:
    """ValueError where features.parquet has not the columns, with values, that are shown of it; newer ones are passed over."""
    for field in schema.EARLIER_FEATURES_SCHEMA:
        index = table.schema.get_field_index(field.name)
        kind: Any = None if index < 0 else table.schema.field(index).type
        is_list = pa.types.is_list(field.type) and kind is not None and pa.types.is_list(kind)
        if kind != field.type and not (is_list and kind.value_type == field.type.value_type):
            raise ValueError(f"features.parquet has {kind} in the column {field.name}, not {field.type}")
        column = table[field.name]
        nulls = column.null_count + (pc.list_flatten(column).null_count if is_list else 0)
        if nulls and field.name not in schema.NULLABLE_COLUMNS:
            raise ValueError(f"features.parquet has {nulls:,} nulls in the column {field.name}")
    strange = set(pc.unique(table["site"]).to_pylist()) - set(found.readings)
    if strange:
        raise ValueError(f"features.parquet has rows of the site {min(strange)[:40]!r}, its summary has none")
