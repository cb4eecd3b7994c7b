"""advice.json: the verdict on each format, from a study's probe: what was measured, and what is predicted from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from outliers.results.schema.fields import (
    Count,
    Digest,
    FeatureNumbers,
    Layer,
    Name,
    Note,
    Number,
    PublicName,
    Size,
    Strict,
)
from outliers.spec import AnySiteName

Span = Annotated[list[Number], Field(min_length=2, max_length=2)]
"""The low and the high end of an interval."""
Verdict = Literal["within", "beyond", "unclear", "indistinguishable"]
"""Against the budget: the whole interval is within, or beyond; the interval holds the budget; no effect above the noise."""


class Place(Strict):
    """One site of one layer that a format should leave alone."""

    site: AnySiteName = Field(description="the site")
    layer: Layer = Field(description="number of the layer, 0-based")
    predicted_kl: Size = Field(description="what quantizing this place alone is predicted to cost, in nats a token")


class Repair(Strict):
    """One way to lower what a format costs, as it was tried."""

    kind: Literal["hold", "rotate", "smooth", "prefix", "range"] = Field(
        description="hold: features stay unquantized; rotate: a Hadamard rotation before; smooth: SmoothQuant; prefix: a token "
        "before each sequence; range: a static scale is made without first tokens, and clips them"
    )
    what: Note = Field(description="which features, format, strength or token")
    kl: Number = Field(description="KL with it, in nats a token")
    kl_interval: Span | None = Field(
        description="its ends over resamples of the sequences; null where there are too few"
    )
    perplexity: Size = Field(description="perplexity with it")
    verdict: Verdict = Field(description="against the budget")
    helps: bool | None = Field(description="whether it lowers the KL beyond both intervals; null: they overlap")


class FormatVerdict(Strict):
    """What one format costs on this model and corpus."""

    format: Name = Field(description="name of the format, which carries its rule")
    weights: Name | None = Field(
        description="format of the weights in the same probe; null: the weights stayed as they are"
    )
    predicted_kl: Number | None = Field(description="sum over all places of the sensitivity map; null: no map was made")
    confirmed_kl: Number | None = Field(description="KL of all places at once, in nats a token; null: not probed")
    confirmed_interval: Span | None = Field(description="its ends over resamples of the sequences")
    perplexity: Size | None = Field(description="perplexity with it; null: not probed")
    verdict: Verdict | None = Field(description="against the budget; null: not probed")
    leave_alone: Annotated[list[Place], Field(max_length=4096)] | None = Field(
        description="places without which the predicted KL of the rest is within the budget, the costliest first; null: no map"
    )
    repairs: Annotated[list[Repair], Field(max_length=256)] = Field(description="what was tried to lower it")


class Cause(Strict):
    """What the model loses without some features, or without single weights."""

    kind: Literal["zero", "mean", "weight", "silence"] = Field(
        description="zeroed, replaced by their mean, a weight zeroed, or experts silenced"
    )
    what: Name = Field(
        description="`systematic`, `matched`, `random`, a number, or the name of the weight or of the change of experts"
    )
    features: FeatureNumbers = Field(description="the features; empty for a weight and for experts")
    kl: Number = Field(description="KL, in nats a token")
    perplexity: Size = Field(description="perplexity")
    distinguishable: bool = Field(description="whether the KL is at least twice the floor")


class Advice(Strict):
    """advice.json."""

    study_id: Digest = Field(description="the study")
    probe_id: Digest = Field(description="the probe that it rests on")
    model: PublicName = Field(description="the model")
    corpus: PublicName = Field(description="the corpus")
    dtype: Name = Field(description="in which the probed model computed")
    sequences: Count = Field(description="sequences that were read")
    tokens: Count = Field(description="tokens of them that were predicted")
    budget: Size = Field(description="most KL that is accepted, in nats a token")
    floor: Size = Field(
        description="KL of a change of one unit in the last place: less than twice this says nothing; 0 where it is not known"
    )
    perplexity: Size = Field(description="of the untouched model")
    formats: Annotated[list[FormatVerdict], Field(max_length=256)] = Field(
        description="the formats, the cheapest first"
    )
    causes: Annotated[list[Cause], Field(max_length=1024)] = Field(
        description="what depends on which features and weights"
    )
    sites: Annotated[list[AnySiteName], Field(max_length=5)] = Field(description="sites that the formats were tried at")
    not_tried: Annotated[list[Note], Field(max_length=16)] = Field(
        description="what could repair it and was not tried, with the command that does"
    )
    paragraph: Annotated[str, Field(max_length=4_000)] = Field(description="the verdict in words")
