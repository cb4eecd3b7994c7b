"""quantization.parquet: one row for each site, layer, number format, number of held-out features and range."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from outliers.results.schema.arrow import Int32, arrow_schema, is_optional
from outliers.results.schema.fields import Count, Name, Strict

RANGES = ("all", "without_first_tokens")
"""Of what tokens a static scale knows the largest magnitude."""
MAX_FORMATS = 64
"""Formats of a study: those asked for, and the rotated ones that are measured with them."""


class QuantizationRecord(BaseModel):
    """The columns of quantization.parquet. The error of a token is a sum over all features of the site."""

    site: str = Field(description="`attn_in`, `mlp_in`, `o_in`, `down_in` or `resid`")
    layer: Int32 = Field(description="number of the layer, 0-based")
    format: str = Field(description="name of the format, which carries its rule ([quantization.md](quantization.md))")
    held_out: Int32 = Field(
        description="features that are kept as they are: 0, or the number of the site's systematic features"
    )
    range: str | None = Field(
        description="of static formats, what the largest magnitude is of: `all` tokens of the corpus, or "
        "`without_first_tokens`; null for a format that measures every token"
    )
    tokens: int = Field(
        description="tokens of the sample that are measured; those with a value that is not finite are not"
    )
    squared_norm: float = Field(description="sum of x^2 over these tokens and all features, from float64 sums. No unit")
    squared_error: float = Field(description="sum of (quantized x - x)^2, the same way; a held-out feature has none")
    relative_error: float | None = Field(description="`squared_error` over `squared_norm`; null where that is 0")
    relative_error_low: float | None = Field(
        description="low end of `relative_error`; summary.json's `quantization.ends` says what ends are; null for one sequence"
    )
    relative_error_high: float | None = Field(description="high end")
    sqnr_db: float | None = Field(
        description="signal to quantization noise: -10 log10 of `relative_error`, in dB; null where that is 0 or null"
    )
    sqnr_db_low: float | None = Field(description="of `relative_error_high`")
    sqnr_db_high: float | None = Field(description="of `relative_error_low`")


QUANTIZATION_SCHEMA: Any = arrow_schema(QuantizationRecord)
"""Tokens; values and errors without a unit; dB."""

QUANTIZATION_NULLABLE = tuple(
    name
    for name, hint in typing.get_type_hints(QuantizationRecord, include_extras=True).items()
    if name in QuantizationRecord.model_fields and is_optional(hint)
)
"""Columns that may hold nulls."""


class QuantizationBlock(Strict):
    """What the errors of number formats are measured on."""

    formats: Annotated[list[Name], Field(max_length=MAX_FORMATS)] = Field(
        description="the formats that were asked for, in that order; a rotated one beside a 4-bit format is not among them"
    )
    sequences: Count = Field(description="sequences of the sample, spread evenly over the corpus")
    tokens: Count = Field(description="tokens in them")
    ends: Literal["95% interval", "range over sequences"] | None = Field(
        description="what the two ends of an error are; null for one sequence"
    )
