"""features.parquet: one row for each site, layer and feature."""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel, Field

from outliers.results.schema.arrow import Float32, Int32, arrow_schema, is_optional


class FeatureRecord(BaseModel):
    """The columns of features.parquet. The table is made as arrays, never row by row."""

    site: str = Field(description="`attn_in`, `mlp_in`, `o_in`, `down_in`, `resid` or `block`")
    layer: Int32 = Field(description="number of the layer, 0-based")
    feature: Int32 = Field(description="number of the feature, 0-based")
    tokens: int = Field(description="tokens whose value is finite; for `block` all tokens")
    hits: int = Field(description="tokens with abs(x) >= the deciding magnitude")
    ladder_hits: list[int] = Field(
        description="tokens, the same at each magnitude of summary.json's `criteria.ladder`, ascending"
    )
    first_token_hits: int = Field(description="those of `hits` that are the first token of their sequence")
    min: Float32 = Field(description="exact, over the finite values; null where there are none. No unit")
    max: Float32 = Field(description="the same")
    max_magnitude: Float32 = Field(description="the larger of abs(`min`) and abs(`max`)")
    mean: Float32 | None = Field(description="from float64 sums; null for `block`. No unit")
    std: Float32 | None = Field(description="standard deviation, from float64 sums; null for `block`. No unit")
    kurtosis: Float32 | None = Field(
        description="Pearson, of the feature's own values in that layer; null for `block` and for a constant"
    )
    max_sd: Float32 | None = Field(
        description="`max_magnitude` in standard deviations of its site and layer; null where all values of the layer are "
        "equal. Not in studies of analysis version 2 and before"
    )


FEATURES_SCHEMA: Any = arrow_schema(FeatureRecord)
"""Counts in tokens; values without a unit."""

EARLIER_FEATURES_SCHEMA: Any = FEATURES_SCHEMA.remove(FEATURES_SCHEMA.get_field_index("max_sd"))
"""Of studies that were published before max_sd was counted."""

MOMENT_COLUMNS = ("mean", "std", "kurtosis")
"""Float sums, equal to 1e-12 only; null at `block`, whose values are those of two tensors."""

NULLABLE_COLUMNS = tuple(
    name
    for name, hint in typing.get_type_hints(FeatureRecord, include_extras=True).items()
    if name in FeatureRecord.model_fields and is_optional(hint)
)
"""Columns that may hold nulls in a published row, which has a hit."""
