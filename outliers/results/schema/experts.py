"""What a study of a mixture of experts says of its experts: experts.parquet, router.parquet, and a part of summary.json.

An expert that no token reached is unknown: null in every column but the counts of its tokens.
"""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from outliers.results.schema.arrow import Float32, Int32, arrow_schema, is_optional
from outliers.results.schema.fields import (
    MAX_LAYERS,
    Context,
    Count,
    Ends,
    Feature,
    Layer,
    Number,
    Share,
    Size,
    Strict,
    check_ascending,
    check_unique,
)

MAX_EXPERTS = 65_535
"""Routed and shared experts of a layer: numbers of 16 bits, one of which stands for no expert."""
MAX_SUPER = 256
"""Super experts that summary.json lists, by their largest output; experts.parquet marks all."""
MAX_SHARES = 4
"""Experts that are named for one feature in one layer, by their share."""
MAX_FOUND = 64
"""Features and places of massive activations that are attributed."""
MAX_GIVERS = 8
"""Experts that are named for one place of massive activations."""
MAX_BY_KIND = 16
"""Experts that are named for one kind of token."""
COVERED = (0, 10, 50, 100)
"""Tokens that an expert has at most, for the counts of coverage."""
MARGIN_LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75)
"""Levels of the quantiles of router margins."""

ExpertNumber = Annotated[int, Field(gt=-MAX_EXPERTS, lt=MAX_EXPERTS)]
TokenKind = Literal["first", "delimiter", "special"]
NoneBecause = Literal["tie", "zero", "nothing known"]


class ExpertRecord(BaseModel):
    """The columns of experts.parquet: a row for each layer with experts and each of its experts, the shared ones last."""

    layer: Int32 = Field(description="number of the layer, 0-based")
    expert: Int32 = Field(description="number of a routed expert, 0-based; -1, -2... for shared ones")
    tokens: int = Field(description="tokens that reached it; 0 makes the columns below null, but for its counts")
    load: float | None = Field(
        description="`tokens` over their mean over the layer's routed experts; null for a shared expert"
    )
    load_low: float | None = Field(
        description="low end over resamples of the sequences (`experts.resamples` of summary.json); null for one sequence"
    )
    load_high: float | None = Field(description="high end")
    weight_sum: float | None = Field(
        description="sum over its tokens of what its output is multiplied by; no unit; exact to 2^-40 a token; null too where "
        "one of these weights is not finite"
    )
    first_tokens: int = Field(description="those of `tokens` that are the first of their sequence")
    delimiter_tokens: int = Field(description="that are blanks or punctuation alone")
    special_tokens: int = Field(description="that are special tokens, such as BOS or EOS")
    down_in_max: Float32 | None = Field(
        description="largest abs(x) of the input of its second projection; null too where routing alone is read"
    )
    down_in_column: Int32 | None = Field(description="its column, 0-based")
    down_in_sequence: Int32 | None = Field(description="sequence of its token, 0-based; the first of equals")
    down_in_position: Int32 | None = Field(description="place of the token in the sequence, 0-based")
    output_max: Float32 | None = Field(
        description="largest abs(x) of its output, its bias included, before the routing weight; with the weight where "
        "`experts.weights_inside` of summary.json is true; null too where routing alone is read"
    )
    output_channel: Int32 | None = Field(description="its channel, 0-based: a feature of `resid`")
    output_sequence: Int32 | None = Field(description="sequence of its token, 0-based; the first of equals")
    output_position: Int32 | None = Field(description="place of the token in the sequence, 0-based")
    output_first: Float32 | None = Field(
        description="`output_max` of the first token alone of each sequence that reached the expert"
    )
    hits: int | None = Field(
        description="values of the input of its second projection with abs(x) >= the deciding magnitude; null too where "
        "that is not one of 3, 4.5, 6, 8, 12, 20, 50, 100"
    )
    super_expert: bool | None = Field(
        description="whether it is a super expert over all of its tokens; null for a shared expert, which is not judged"
    )
    super_expert_as_published: bool | None = Field(
        description="whether it is one as the published program counts ([experts.md](experts.md)); an expert that no "
        "token reached counts as 0 there; null where routing alone is read"
    )


class RouterRecord(BaseModel):
    """The columns of router.parquet: a row for each layer with experts."""

    layer: Int32 = Field(description="number of the layer, 0-based")
    tokens: int = Field(description="tokens that were routed")
    entropy: float | None = Field(
        description="entropy of the routed experts' shares of tokens over ln E: 1 where all are equal; null for one expert"
    )
    entropy_low: float | None = Field(description="low end over resamples of the sequences; null for one sequence")
    entropy_high: float | None = Field(description="high end")
    at_most_0: Int32 = Field(description="routed experts that no token reached")
    at_most_10: Int32 = Field(description="that at most 10 tokens reached")
    at_most_50: Int32 = Field(description="at most 50")
    at_most_100: Int32 = Field(description="at most 100")
    busiest_expert: Int32 = Field(description="routed expert with the most tokens; of equals the first")
    busiest_load: float = Field(description="its tokens over the layer's mean")
    mean_weight_sum: float | None = Field(
        description="mean over the tokens of the sum of the weights of their routed experts; it need not be 1; null where a "
        "weight is not finite"
    )
    margin_tokens: int = Field(description="tokens whose router margin is known: not where every expert is chosen")
    margin_p01: float | None = Field(
        description="quantile of the router margin (smallest score of a chosen expert less the largest of another), nearest "
        "rank; margins are known to 16 bits: each is up to 2^-7 (0.8%) of itself farther from 0 than stated"
    )
    margin_p05: float | None = Field(description="the same at 5%")
    margin_p25: float | None = Field(description="at 25%")
    margin_p50: float | None = Field(description="the median")
    margin_p75: float | None = Field(description="at 75%")
    outputs_floor: Float32 | None = Field(
        description="only outputs of at least this are searched for massive activations; null where all are"
    )


EXPERTS_SCHEMA: Any = arrow_schema(ExpertRecord)
"""Tokens; values without a unit."""
ROUTER_SCHEMA: Any = arrow_schema(RouterRecord)
"""Tokens; values without a unit."""


def _nullable(model: type[BaseModel]) -> tuple[str, ...]:
    hints = typing.get_type_hints(model, include_extras=True)
    return tuple(name for name in model.model_fields if is_optional(hints[name]))


EXPERTS_NULLABLE = _nullable(ExpertRecord)
ROUTER_NULLABLE = _nullable(RouterRecord)
"""Columns that may hold nulls."""


class Coverage(Strict):
    """How many experts have few tokens."""

    at_most: Count = Field(description="tokens: 0, 10, 50 and 100")
    experts: Count = Field(description="routed experts of all layers with at most that many")


class Reach(Strict):
    """How many tokens it takes until every expert has some."""

    times: Count = Field(description="tokens that every routed expert of every layer is to have: 1 and 100")
    tokens: Count | None = Field(
        description="tokens of a corpus with this routing, rounded up to three digits; null where an expert was never reached"
    )


class SuperExpert(Strict):
    """One super expert."""

    layer: Layer = Field(description="number of the layer, 0-based")
    expert: ExpertNumber = Field(description="its number; -1, -2... for shared ones")
    output: Size = Field(description="the largest abs(x) of its output by this reading")
    channel: Feature | None = Field(description="its channel; null in the published reading, which keeps none")
    sequence: Count | None = Field(description="sequence of its token; null as above")
    position: Count | None = Field(description="place of the token; null as above")
    token: Context | None = Field(description="its text; null as above and where text is not shown")
    massive: bool | None = Field(
        description="whether a listed massive activation sits at that token and channel, in its layer or above; null as "
        "above and where `resid` was not captured"
    )


class SuperReading(Strict):
    """The super experts by one reading, and what decided."""

    layers_below: Count | None = Field(description="layers below this are considered; null: all that were read")
    population: Count = Field(description="experts whose outputs make the percentile")
    unknown: Count = Field(
        description="experts of these layers without a known output; left out, or 0 in the published reading"
    )
    percentile: Size | None = Field(description="P99.5 of the population, linear; an output must be above it")
    largest: Size | None = Field(description="largest output of the population")
    bound: Size | None = Field(
        description="a tenth of `largest`, rounded down to a whole number in the published reading; an output must be above it"
    )
    at_most: Count = Field(description="how many experts of this population can be above P99.5")
    count: Count = Field(description="super experts")
    none_because: NoneBecause | None = Field(
        description="why no expert is a super expert: `tie`, the largest output is that of several, and none is above P99.5; "
        "`zero`, no output is above 0; `nothing known`"
    )
    experts: Annotated[list[SuperExpert], Field(max_length=MAX_SUPER)] = Field(
        description="the largest 256, by `output`"
    )

    @model_validator(mode="after")
    def _consistent(self) -> SuperReading:
        check_unique(((row.layer, row.expert) for row in self.experts), "the super expert")
        if len(self.experts) != min(self.count, MAX_SUPER):
            raise ValueError(f"{len(self.experts)} of {self.count} super experts are listed")
        if (self.none_because is None) != (self.count > 0):
            raise ValueError(f"{self.count} super experts, and none_because is {self.none_because}")
        if self.count > self.at_most or self.at_most > self.population:
            raise ValueError(f"{self.count} super experts of {self.population}, of which {self.at_most} can be")
        bounds = (self.percentile, self.largest, self.bound)
        if any((bound is None) != (self.population == 0) for bound in bounds):
            raise ValueError("bounds of a population that is empty, or none of one that is not")
        if any(row.output <= (self.percentile or 0) or row.output <= (self.bound or 0) for row in self.experts):
            raise ValueError("a super expert is not above both bounds")
        return self


class FeatureLayer(Strict):
    """Which experts give one feature in one layer."""

    layer: Layer = Field(description="number of the layer, 0-based")
    experts: Annotated[list[ExpertNumber], Field(max_length=MAX_SHARES)] = Field(
        description="the 4 experts of the largest shares, the largest first"
    )
    shares: Annotated[list[Share], Field(max_length=MAX_SHARES)] = Field(
        description="their shares: sum over tokens of (weight x output)^2 at this channel over the sum of the same over all "
        "experts, shared ones included"
    )
    experts_squares: Size | None = Field(description="that sum over all experts; null where it is not finite")
    block_squares: Size | None = Field(
        description="sum over tokens of the square of what the layer of experts adds to the residual stream at this channel; "
        "it differs from `experts_squares` by the cross terms between experts"
    )

    @model_validator(mode="after")
    def _same_length(self) -> FeatureLayer:
        check_unique(self.experts, "the expert")
        if len(self.experts) != len(self.shares):
            raise ValueError(f"{len(self.experts)} experts, {len(self.shares)} shares")
        return self


class FeatureExperts(Strict):
    """Which experts give one systematic feature."""

    feature: Feature = Field(description="number of the feature, which is the channel")
    layers: Annotated[list[FeatureLayer], Field(max_length=MAX_LAYERS)] = Field(
        description="a row for each layer with experts"
    )

    @model_validator(mode="after")
    def _sorted(self) -> FeatureExperts:
        check_ascending([row.layer for row in self.layers], f"the layers of feature {self.feature}")
        return self


class Giver(Strict):
    """One expert whose largest output sits at the place of a massive activation."""

    layer: Layer = Field(description="number of the layer, 0-based")
    expert: ExpertNumber = Field(description="its number; -1, -2... for shared ones")
    output: Size = Field(description="the largest abs(x) of its output for that token")
    weight: Number | None = Field(description="what the output is multiplied by; null where that is not finite")


class MassiveExperts(Strict):
    """Which experts give the massive activations at one token and feature."""

    sequence: Count = Field(description="number of the sequence, 0-based")
    position: Count = Field(description="place in the sequence, 0-based")
    feature: Feature = Field(description="number of the feature, which is the channel")
    first_layer: Layer = Field(description="lowest layer of the listed massive activations there")
    last_layer: Layer = Field(description="highest")
    value: Number = Field(description="the signed value of the largest of them")
    experts: Annotated[list[Giver], Field(max_length=MAX_GIVERS)] = Field(
        description="experts in layers up to `last_layer` whose largest output for that token is at that channel, by "
        "`output`; at most 8, of the 256 largest outputs of each layer"
    )


class KindExpert(Strict):
    """One expert that one kind of token reaches more often than others do."""

    layer: Layer = Field(description="number of the layer, 0-based")
    expert: ExpertNumber = Field(description="number of a routed expert")
    tokens: Count = Field(description="tokens of the kind that reached it")
    share: Share = Field(description="that over all tokens of the kind")
    share_of_all: Share = Field(description="share of all tokens that reached it")


class KindBlock(Strict):
    """Where one kind of token goes."""

    kind: TokenKind = Field(
        description="`first` of its sequence; `delimiter`, blanks or punctuation alone; `special`, such as BOS or EOS"
    )
    tokens: Count = Field(description="tokens of the kind")
    experts: Annotated[list[KindExpert], Field(max_length=MAX_BY_KIND)] = Field(
        description="the 16 routed experts with the largest `share` less `share_of_all`, where that is above 0"
    )


class ExpertsBlock(Strict):
    """The part `experts` of summary.json."""

    read: Literal["all", "routing"] = Field(
        description="what was read of the experts; `routing` alone leaves outputs unknown"
    )
    layers: Annotated[list[Layer], Field(min_length=1, max_length=MAX_LAYERS)] = Field(
        description="layers that were read and have experts"
    )
    experts: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] = Field(description="routed experts of a layer")
    slots: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] = Field(description="experts that a token is routed to")
    shared: Annotated[int, Field(ge=0, le=MAX_EXPERTS)] = Field(description="shared experts of a layer")
    weights_inside: bool = Field(description="whether outputs hold their routing weight (Llama 4)")
    coverage: Annotated[list[Coverage], Field(max_length=len(COVERED))] = Field(
        description="routed experts with few tokens"
    )
    never_reached: Share = Field(description="share of the routed experts of all layers that no token reached")
    never_reached_ends: Ends | None = Field(
        description="its ends over resamples of the sequences, which can only lose experts; null for one sequence"
    )
    entropy: Share | None = Field(description="mean over the layers of router.parquet's `entropy`; null for one expert")
    entropy_ends: Ends | None = Field(description="its ends over resamples of the sequences; null for one sequence")
    resamples: Count | None = Field(
        description="resamples of whole sequences, seed 0; ends hold the middle 95%; null for one sequence"
    )
    reach_probability: Share = Field(description="with which `reach` holds")
    reach: Annotated[list[Reach], Field(max_length=4)] = Field(
        description="tokens that reach every expert; tokens count as independent, so it is a lower bound in practice"
    )
    largest_output: SuperExpert | None = Field(
        description="the routed expert with the largest output of all; null where no output is known"
    )
    super_experts: SuperReading | None = Field(
        description="over all tokens of the routed experts of all layers; null where routing alone is read"
    )
    super_experts_as_published: SuperReading | None = Field(
        description="as the published program counts; null where routing alone is read"
    )
    attribution: Annotated[list[FeatureExperts], Field(max_length=MAX_FOUND)] | None = Field(
        description="the first 64 systematic features; null where routing alone is read, or the deciding site's features "
        "are not hidden dimensions"
    )
    massive: Annotated[list[MassiveExperts], Field(max_length=MAX_FOUND)] | None = Field(
        description="the 64 tokens and features of the largest massive activations; null where routing alone is read, or "
        "`resid` was not captured"
    )
    kinds: Annotated[list[KindBlock], Field(max_length=3)] = Field(description="kinds of tokens of which there are any")

    @model_validator(mode="after")
    def _consistent(self) -> ExpertsBlock:
        check_ascending(self.layers, "the layers with experts")
        check_unique((one.kind for one in self.kinds), "the kind of token")
        check_unique((one.feature for one in self.attribution or ()), "the attributed feature")
        if [one.at_most for one in self.coverage] != list(COVERED):
            raise ValueError(f"coverage is not of {COVERED} tokens")
        counts = [one.experts for one in self.coverage]
        if counts != sorted(counts) or counts[-1] > len(self.layers) * self.experts:
            raise ValueError(f"coverage counts {counts} of {len(self.layers)} x {self.experts} experts")
        known = set(self.layers)
        for layer, expert in self._named():
            if layer not in known or not -self.shared <= expert < self.experts:
                raise ValueError(f"expert {expert} of layer {layer} was not read")
        return self

    def _named(self) -> list[tuple[int, int]]:
        """Every (layer, expert) that stands in a list."""
        rows: list[Any] = [giver for one in self.massive or () for giver in one.experts]
        rows += [expert for one in self.kinds for expert in one.experts]
        for reading in (self.super_experts, self.super_experts_as_published):
            rows += reading.experts if reading else []
        rows += [self.largest_output] if self.largest_output else []
        named = [(row.layer, row.expert) for row in rows]
        for feature in self.attribution or ():
            named += [(row.layer, expert) for row in feature.layers for expert in row.experts]
            named += [(row.layer, 0) for row in feature.layers]
        return named
