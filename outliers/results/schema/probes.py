"""probes.json and sensitivity.parquet: what changes in the model did to its predictions, from one probe of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from outliers.files.parquet import parquet_bytes
from outliers.results.schema.advice import Span
from outliers.results.schema.arrow import arrow_schema
from outliers.results.schema.fields import (
    MAX_LAYERS,
    Count,
    Digest,
    Feature,
    FeatureNumbers,
    Layer,
    Name,
    Note,
    Number,
    PublicName,
    Share,
    Size,
    Strict,
)
from outliers.spec import SiteName

ChangeKind = Literal["zero", "mean", "quantize", "prefix", "weight", "map", "silence", "experts"]
Layers = Annotated[list[Layer], Field(max_length=MAX_LAYERS)]
MAX_EXPERTS = 4_096
"""Experts that one change silences, at most."""
Sites = Annotated[list[SiteName], Field(max_length=5)]


class Gate(Strict):
    """One check that every run makes of itself."""

    compared: bool = Field(description="whether it could be made")
    reason: Note | None = Field(description="why it was not; null where it was")
    value: Number | None = Field(description="what it gave; null where it was not made")


class Gates(Strict):
    """The three checks of a run. One that fails ends the run: numbers exist only of runs that passed."""

    reference: Gate = Field(
        description="largest difference of a sequence's loss from the capture's journal, in nats; 0 where the dtype and the "
        "batches are the same"
    )
    identity: Gate = Field(description="KL of an edit that changes nothing, through the same hooks; exactly 0")
    floor: Gate = Field(
        description="KL of one unit in the last place of one feature at layer 0, in nats a token: an effect of less than twice "
        "this can't be told from rounding"
    )
    prefix_sharing: bool = Field(description="whether layers before a change were skipped, their output being known")


class Reference(Strict):
    """The untouched model on the same tokens."""

    perplexity: Size = Field(description="exp of the mean negative log-likelihood")
    nll: Size = Field(description="mean negative log-likelihood, in nats a token")
    top1_probability: Share = Field(description="mean probability of the most likely token")


class Change(Strict):
    """One change of the model, over all sequences of the probe."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = Field(description="unique in the probe")
    kind: ChangeKind = Field(
        description="zero, mean: features are set to 0, or to their mean; quantize: a format at all sites; map: a format at one "
        "site of one layer, or at the input of one expert; prefix: tokens before each sequence; weight: one weight is 0; "
        "silence: the routing weight of experts is 0; experts: a format at the experts' inputs alone"
    )
    group: Name = Field(
        description="`systematic`, `matched`, `random`, `given`, `each` (one systematic feature alone), `control` (a weight), "
        "`super` and `load` (an expert, and one of equal load), or the format's name"
    )
    sites: Sites = Field(description="where it is made")
    layers: Layers = Field(description="in which layers")
    features: FeatureNumbers = Field(description="which features it changes; empty: all, or a weight")
    format: Name | None = Field(description="the number format; null where nothing is quantized")
    weights: Name | None = Field(description="format of the weights that read these sites; null: they stay as they are")
    held: FeatureNumbers = Field(description="features that stay unquantized")
    range: Literal["all", "without_first_tokens"] | None = Field(
        description="the tokens that a static scale is made of; null: each token has its own"
    )
    ranges_of: Literal["study", "probe"] | None = Field(
        None,
        description="whose tokens a static scale, a mean or SmoothQuant's scales are of: all of the study's, or those that the "
        "probe reads; null: there are none",
    )
    smooth: Number | None = Field(description="SmoothQuant's strength; null: none")
    prefix: Annotated[list[Count], Field(max_length=64)] = Field(description="ids of the tokens before each sequence")
    weight: Name | None = Field(description="name of the single weight, `LAYER.MODULE[ROW,COLUMN]`")
    value: Number | None = Field(description="what that weight was")
    control_of: Name | None = Field(
        None,
        description="name of the single weight, or of the expert, that this one is a control of, in the same matrix or layer; "
        "null: not a control",
    )
    experts: Annotated[list[Name], Field(max_length=MAX_EXPERTS)] = Field(
        [],
        description="experts that are silent, `LAYER.EXPERT`; of a map the one whose input alone is quantized; "
        "absent where there are none",
    )
    expert_tokens: Annotated[list[Count], Field(max_length=MAX_EXPERTS)] = Field(
        [], description="tokens of the probe that reach each of them; absent where there are none"
    )
    perplexity: Size = Field(description="exp of the mean negative log-likelihood with the change")
    perplexity_interval: Span | None = Field(
        description="ends of its middle 95% over resamples of the sequences, paired with the untouched model's; null under "
        "16 sequences"
    )
    kl: Number = Field(description="mean KL(untouched || changed) of the next-token distributions, in nats a token")
    kl_interval: Span | None = Field(description="its ends")
    top1_probability: Share = Field(description="mean probability of the most likely token")
    agreement: Share = Field(description="share of tokens with the same most likely next token")
    agreement_interval: Span | None = Field(description="its ends")
    distinguishable: bool = Field(description="whether the KL is at least twice the floor")
    predicted_kl: Number | None = Field(
        description="sum of the sensitivity map's predictions for this format over all places; null without a map"
    )

    @model_serializer(mode="wrap")
    def _without_experts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A change of no expert is written without the fields of experts."""
        content: dict[str, Any] = handler(self)
        return content if self.experts else {k: v for k, v in content.items() if k not in ("experts", "expert_tokens")}


class SuperWeight(Strict):
    """A candidate: the weight that makes the largest output of an MLP's second projection (Yu et al. 2024, arXiv 2411.07191)."""

    layer: Layer = Field(description="number of the layer, 0-based")
    module: Name = Field(description="path of the projection in the layer")
    row: Count = Field(description="output feature")
    column: Feature = Field(description="input feature")
    value: Number = Field(description="the weight")
    output: Number = Field(description="the projection's largest output in magnitude, signed")
    input: Number = Field(description="input at that column, of the token with that output")
    sequence: Count = Field(description="where: number of the sequence")
    position: Count = Field(description="where: place in the sequence")


class Probes(Strict):
    """probes.json."""

    probe_id: Digest = Field(description="id of the probe")
    study_id: Digest = Field(description="the study whose features and ranges it uses")
    capture_id: Digest = Field(description="the capture whose tokens and batches it uses")
    model: PublicName = Field(description="the model, as in summary.json")
    corpus: PublicName = Field(description="the corpus, as in summary.json")
    dtype: Name = Field(description="in which the probed model computed")
    sequences: Count = Field(description="sequences that were read, the first of the corpus")
    tokens: Count = Field(description="tokens that were predicted: all but the first of each sequence")
    sites: Sites = Field(description="captured sites at which formats are tried")
    gates: Gates = Field(description="what the run checked of itself")
    reference: Reference = Field(description="the untouched model")
    changes: Annotated[list[Change], Field(max_length=20_000)] = Field(
        description="the changes, in the order of the run"
    )
    super_weights: Annotated[list[SuperWeight], Field(max_length=64)] = Field(
        description="candidates, the largest output first; empty where none were asked for"
    )
    notes: Annotated[list[Note], Field(max_length=32)] = Field(description="what to know of these numbers")


class SensitivityRecord(Strict):
    """A row of sensitivity.parquet: one format at one site of one layer, alone."""

    site: SiteName = Field(description="the site")
    layer: Layer = Field(description="number of the layer, 0-based")
    format: Name = Field(description="the format")
    kl: Number | None = Field(description="measured KL, in nats a token; null: predicted only")
    squared_error: Size = Field(description="mean squared error a token at that place, summed over its features")
    relative_error: Size = Field(description="squared error over the sum of squares")
    predicted_kl: Number | None = Field(
        description="the map's KL there times this squared error over the map format's; null without a map"
    )


SENSITIVITY_SCHEMA: Any = arrow_schema(SensitivityRecord)
"""The columns of sensitivity.parquet. KL in nats a token; errors in the square of the activations' unit."""


def sensitivity_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """sensitivity.parquet from its rows."""
    return parquet_bytes(pa.Table.from_pylist([dict(row) for row in rows], schema=SENSITIVITY_SCHEMA))
