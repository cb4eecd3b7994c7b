"""summary.json, tokens.json and the tables are described once: docs and Arrow schemas follow, old and newer files are read."""

from __future__ import annotations

import json
import re
import typing

import pyarrow as pa
import pytest
from pydantic import BaseModel, ValidationError

from outliers.atlas.row import AtlasFeature, AtlasRow
from outliers.counting.analyze import analyze
from outliers.publish.allowlist import read_numbers
from outliers.publish.manifest import digest_of
from outliers.results.schema import EARLIER_FEATURES_SCHEMA, FEATURES_SCHEMA, NULLABLE_COLUMNS, StudySummary, Tokens
from outliers.results.schema.arrow import Float32, Int32, arrow_schema
from outliers.results.schema.fields import Strict
from outliers.results.write import json_bytes, write_results
from tests.counting.test_counting import random_acts
from tests.support import results_folder, synthetic
from tests.support.result_tables import DOCUMENT, models, with_tables


def test_the_tables_of_the_docs_are_those_of_the_models():
    text = DOCUMENT.read_text("utf-8")
    assert with_tables(text) == text, "run `python -m tests.support.result_tables`"
    assert set(re.findall(r"<!-- (\w+) -->", text)) == set(models())


def parts(model: type[BaseModel]) -> set[type[BaseModel]]:
    """The models that a model is made of, itself included."""
    found = {model}
    for field in model.model_fields.values():
        waiting = [field.annotation]
        while waiting:
            kind = waiting.pop()
            waiting += typing.get_args(kind)
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= parts(kind)
    return found


def test_every_part_of_a_file_is_strict_and_described():
    for model in parts(StudySummary) | parts(Tokens):
        assert issubclass(model, Strict)
        assert model.__name__ in models()
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
    hints = typing.get_type_hints(AtlasFeature, include_extras=True)
    assert all(typing.get_args(hint)[-1].description for hint in hints.values())
    assert all(field.description for field in AtlasRow.model_fields.values())


def test_an_arrow_schema_follows_its_model():
    class Record(BaseModel):
        name: str
        count: int | None
        small: Int32
        size: Float32 | None
        share: float
        many: list[int]
        pair: tuple[str, ...]
        structs: list[AtlasFeature]

    found = arrow_schema(Record)
    assert found.names == ["name", "count", "small", "size", "share", "many", "pair", "structs"]
    types = [
        pa.string(),
        pa.int64(),
        pa.int32(),
        pa.float32(),
        pa.float64(),
        pa.list_(pa.int64()),
        pa.list_(pa.string()),
    ]
    assert found.types[:-1] == types
    assert found.field("structs").type.value_type.field("feature").type == pa.int32()

    class Nested(BaseModel):
        value: dict[str, int]

    with pytest.raises(TypeError, match="no column has the type"):
        arrow_schema(Nested)


def test_the_columns_of_features_parquet_are_the_published_ones():
    """As every published study has them: names, order, types, and which may be null."""
    counts = [("tokens", pa.int64()), ("hits", pa.int64()), ("ladder_hits", pa.list_(pa.int64()))]
    counts += [("first_token_hits", pa.int64())]
    numbers = ["min", "max", "max_magnitude", "mean", "std", "kurtosis", "max_sd"]
    keys = [("site", pa.string()), ("layer", pa.int32()), ("feature", pa.int32())]
    assert pa.schema(keys + counts + [(name, pa.float32()) for name in numbers]).equals(FEATURES_SCHEMA)
    assert EARLIER_FEATURES_SCHEMA.names == FEATURES_SCHEMA.names[:-1]
    assert NULLABLE_COLUMNS == ("mean", "std", "kurtosis", "max_sd")


def test_what_is_written_is_what_was_read():
    """A dump holds the keys that were set and no other: a study of before keeps its bytes."""
    whole = results_folder.summary()
    earlier = {key: value for key, value in whole.items() if key not in LATER}
    for content, model in ((whole, StudySummary), (earlier, StudySummary), (results_folder.tokens(), Tokens)):
        data = json_bytes(content)
        assert json_bytes(model.model_validate_json(data)) == data


LATER = (
    *(
        "perplexity",
        "reading_counts",
        "without_first_tokens",
        "intervals",
        "massive_by_token",
        "massive_by_token_count",
    ),
    *("massive_undecided", "sd_ladder", "quantile_levels", "quantization", "experts"),
)
"""Keys that the first versions did not write."""


def test_a_study_of_before_is_read_with_the_defaults():
    earlier = {key: value for key, value in results_folder.summary().items() if key not in LATER}
    found = StudySummary.model_validate_json(json.dumps(earlier))
    assert {key for key in StudySummary.model_fields if key not in found.model_fields_set} == set(LATER)
    assert (found.reading_counts, found.intervals, found.sd_ladder, found.quantile_levels) == ({}, None, None, [])


def test_a_newer_study_is_read_by_those_who_ask_for_it_and_not_published():
    newer = results_folder.summary() | {"novelty": 1}
    newer["model"] |= {"router": "new"}
    newer["readings"]["block"]["legacy"]["novelty"] = [1]
    newer["systematic"][0]["interval"]["novelty"] = 1
    data = json.dumps(newer)
    with pytest.raises(ValidationError):
        StudySummary.model_validate_json(data)
    found = StudySummary.model_validate_json(data, extra="ignore")
    assert json_bytes(found) == json_bytes(results_folder.summary())


DIGESTS = {
    "bfloat16": "6b93e753c46bad4db1b3648c431a204e8c41faf40e869131b3d6854dcdf423bd",
    "float16": "6494fd79d203826581bf4d7e3e69e1bf3af2ad5e0f28fc33460a6a4ac32b4abe",
    "float32": "d7b8a7d04547e30535b5ec1376433dd48cb60b97fb167b8be1c88eedf00f44e7",
}
"""results_digest by dtype of the study below, from the code that wrote dicts by hand."""


@pytest.mark.parametrize(("seed", "dtype"), [*enumerate(DIGESTS, 1)])
def test_a_study_has_the_digest_that_it_had(workspace, seed, dtype):
    acts, _ = random_acts(seed, dtype, shape=(4, 5, 25))
    prepared = synthetic.prepared_for(acts, dtype)
    synthetic.write_capture(prepared, workspace, acts)
    analyze(prepared, workspace, synthetic.Silent())
    assert digest_of(read_numbers(write_results(prepared, workspace)).files) == DIGESTS[dtype]
