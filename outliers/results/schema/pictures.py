"""pictures.json: what the pictures of a study show and no other file holds. Extremes and counts, no answer of the study.

It is a file of its own, outside of the results_digest, so that a study that was made before it keeps its numbers, its bytes and
its digest when it is written again.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from outliers.results.schema.fields import (
    MAX_LAYERS,
    Count,
    Digest,
    Feature,
    Layer,
    Number,
    Strict,
    check_unique,
)
from outliers.spec import AnySiteName

MAX_LARGEST = 3
MAX_SHOWN = 24
"""Features of a heat map."""
KindName = Literal["delimiter", "special", "digit", "word_start", "word_piece"]


class LargeFeature(Strict):
    """One of the features of largest magnitude in a layer."""

    feature: Feature = Field(description="number of the feature, 0-based")
    value: Number = Field(
        description="its signed value of largest magnitude; of two of the same magnitude the positive one"
    )


class LargestRow(Strict):
    """The features of largest magnitude in one layer of one captured site."""

    site: AnySiteName = Field(description="captured site")
    layer: Layer = Field(description="number of the layer, 0-based")
    largest: Annotated[list[LargeFeature], Field(max_length=MAX_LARGEST)] = Field(
        description="at most three, the largest first; of equal ones the lower number"
    )

    @model_validator(mode="after")
    def _unique(self) -> LargestRow:
        check_unique((item.feature for item in self.largest), f"feature at {self.site} of layer {self.layer}")
        return self


class ShownFeature(Strict):
    """One feature of the heat map, in every layer that was read, whether it is a hit or not."""

    feature: Feature = Field(description="number of the feature, 0-based")
    values: dict[AnySiteName, Annotated[list[Number | None], Field(max_length=MAX_LAYERS)]] = Field(
        description="its signed value of largest magnitude in each layer that was read, ascending, at each counted site "
        "that has the deciding site's features; null where no value is finite"
    )


class FeatureKinds(Strict):
    """On which kinds of tokens one systematic feature has hits."""

    feature: Feature = Field(description="number of the feature, 0-based")
    tokens: Count = Field(description="tokens with a hit in any layer of the deciding site")
    kinds: dict[KindName, Count] = Field(description="how many of these are of each kind; the rest is of none")


class TokenKinds(Strict):
    """Tokens by kind: a token is of one kind at most."""

    tokens: Count = Field(description="tokens of the corpus")
    kinds: dict[KindName, Count] = Field(description="how many of these are of each kind; the rest is of none")
    features: Annotated[list[FeatureKinds], Field(max_length=MAX_SHOWN)] = Field(
        description="the systematic features, at most 24"
    )

    @model_validator(mode="after")
    def _within(self) -> TokenKinds:
        check_unique((row.feature for row in self.features), "the kinds of feature")
        for tokens, kinds in ((self.tokens, self.kinds), *((row.tokens, row.kinds) for row in self.features)):
            if sum(kinds.values()) > tokens:
                raise ValueError(f"{sum(kinds.values())} tokens by kind of {tokens}")
        rest = self.tokens - sum(self.kinds.values())
        for row in self.features:
            of_none = row.tokens - sum(row.kinds.values())
            if of_none > rest or any(count > self.kinds.get(kind, 0) for kind, count in row.kinds.items()):
                raise ValueError(f"feature {row.feature} has more tokens of a kind than the corpus")
        return self


class Pictures(Strict):
    """pictures.json, schema_version 1."""

    schema_version: Literal[1] = Field(description="1")
    study_id: Digest = Field(description="as in summary.json")
    layers: Annotated[list[LargestRow], Field(max_length=5 * MAX_LAYERS)] = Field(
        description="one row for each captured site and layer, in the order of summary.json's `layers`"
    )
    features: Annotated[list[ShownFeature], Field(max_length=MAX_SHOWN)] = Field(
        description="the systematic features, then those of largest magnitude at the deciding site; 24 together at most"
    )
    kinds: TokenKinds | None = Field(
        description="null where some sequences were counted by a version that did not count them"
    )

    @model_validator(mode="after")
    def _unique(self) -> Pictures:
        check_unique(((row.site, row.layer) for row in self.layers), "layer")
        check_unique((row.feature for row in self.features), "feature")
        return self
