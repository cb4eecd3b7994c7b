"""tokens.json: on which tokens the features and massive activations of a study sit, with text where it may be shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from outliers.results.schema.fields import (
    MAX_BINS,
    MAX_MASSIVE,
    MAX_TOKEN_FEATURES,
    MAX_TOP,
    Context,
    Count,
    Digest,
    Feature,
    Layer,
    Number,
    Share,
    Strict,
    check_unique,
)
from outliers.spec import AnySiteName


class Positions(Strict):
    """Tokens by their place in the sequence."""

    bin_tokens: Annotated[int, Field(ge=1)] = Field(description="positions of one bin")
    counts: Annotated[list[Count], Field(max_length=MAX_BINS)] = Field(description="tokens in each bin")


class TokenInText(Strict):
    """One value, and the text around its token; the three texts are null where text is not shown."""

    sequence: Count = Field(description="number of the sequence, 0-based")
    position: Count = Field(description="place in the sequence, 0-based")
    layer: Layer = Field(description="number of the layer, 0-based")
    value: Number = Field(description="signed value")
    token: Context | None = Field(
        description="text of the token, the name of a special one (`<s>`), or the bytes of a part of a character "
        "(`<0xE9 0xBE>`)"
    )
    before: Context | None = Field(description="text before it, in whole characters")
    after: Context | None = Field(
        description="text after it, in whole characters; it begins with the character that the bytes belong to"
    )


class TopToken(TokenInText):
    """One of the tokens at which a feature is largest."""

    site: AnySiteName = Field(description="captured site")


class MassiveToken(TokenInText):
    """One massive activation in its text."""

    feature: Feature = Field(description="number of the feature, 0-based")


class TokenFeature(Strict):
    """On which tokens a systematic feature has hits."""

    feature: Feature = Field(description="number of the feature, 0-based")
    tokens: Count = Field(description="tokens with a hit in any layer")
    first_token_share: Share | None = Field(description="share of these that are the first of their sequence")
    delimiter_share: Share | None = Field(
        description="share of these that are blanks or punctuation alone; neither special tokens, such as BOS or EOS, nor "
        "tokens that hold a part of a character"
    )
    special_share: Share | None = Field(
        None, description="share of these that are special tokens; null in results that were made before it was counted"
    )
    positions: Positions = Field(description="these tokens by position")
    top: Annotated[list[TopToken], Field(max_length=MAX_TOP)] = Field(description="the 16 tokens of largest magnitude")


class MassiveFeature(Strict):
    """On which tokens the listed massive activations of one feature sit."""

    feature: Feature = Field(description="number of the feature, 0-based")
    tokens: Count = Field(description="tokens with a listed massive activation of this feature")
    first_token_share: Share = Field(description="share of these that are the first of their sequence")
    delimiter_share: Share = Field(description="as above")
    special_share: Share | None = Field(None, description="as above")
    positions: Positions = Field(description="these tokens by position")


class Tokens(Strict):
    """tokens.json, schema_version 1."""

    schema_version: Literal[1] = Field(description="1")
    study_id: Digest = Field(description="as in summary.json")
    site: AnySiteName = Field(description="the deciding site")
    text: bool = Field(description="whether text is shown")
    features: Annotated[list[TokenFeature], Field(max_length=MAX_TOKEN_FEATURES)] = Field(
        description="the systematic features, at most 64"
    )
    massive: Annotated[list[MassiveToken], Field(max_length=MAX_MASSIVE)] | None = Field(
        description="the largest massive activations, at most 64"
    )
    massive_features: Annotated[list[MassiveFeature], Field(max_length=MAX_TOKEN_FEATURES)] = Field(
        [], description="the features of all massive activations that summary.json lists, at most 64"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Tokens:
        check_unique((row.feature for row in self.features), "feature")
        check_unique((row.feature for row in self.massive_features), "massive feature")
        shown: list[TokenInText] = [token for row in self.features for token in row.top]
        shown += self.massive or []
        if not self.text and any(t.token is not None or t.before is not None or t.after is not None for t in shown):
            raise ValueError("text is false, but there is text")
        return self
