"""Parts of summary.json that are about features: the model and corpus they were found in, the criteria, the lists."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from outliers.results.schema.fields import (
    MAX_FEATURES,
    MAX_LAYERS,
    MAX_MAGNITUDES,
    Count,
    Ends,
    Feature,
    GivenName,
    Layer,
    Name,
    Number,
    PublicName,
    Share,
    Size,
    Strict,
    check_ascending,
)
from outliers.spec import AnySiteName, ReadingName, public_name


class ModelBlock(Strict):
    """The model that was read."""

    id: PublicName = Field(description="its name on the hub, or `local:` and a hash")
    revision: Name | None = Field(description="commit on the hub")
    architecture: Name = Field(description="its class in transformers")
    total_parameters: Count | None = Field(description="null: unknown")
    active_parameters: Count | None = Field(description="those that compute for one token; null: unknown")
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = Field(description="decoder layers, read or not")
    hidden_size: Annotated[int, Field(ge=1, le=MAX_FEATURES)] = Field(
        description="features at every site but `o_in` and `down_in`, which have widths of their own"
    )
    dtype: Name = Field(description="in which it computed")
    num_experts: Count | None = Field(description="of a layer; null: dense")
    quantization: Name | None = Field(
        None,
        description="in which the weights stayed while it computed; null: plain, also where the checkpoint is quantized, "
        "which `notes` says",
    )
    name: GivenName | None = Field(None, description="only with `--model-name`: what its owner calls it")

    @property
    def called(self) -> str:
        """What it is called in what is published."""
        return self.name or public_name(self.id)


class CorpusBlock(Strict):
    """The tokens that the model read."""

    source: PublicName = Field(description="a data set of the hub, `builtin:`, or `local:` and a hash")
    num_sequences: Count = Field(description="sequences")
    sequence_length: Count = Field(description="tokens of the longest sequence")
    num_tokens: Count = Field(description="tokens, without padding")
    token_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(description="of all token ids")
    num_documents: Count | None = Field(None, description="documents that the sequences were cut from")
    publish_text: Name | None = Field(None, description="`context`: text is shown around tokens; `none`: it is not")
    name: GivenName | None = Field(None, description="only with `--corpus-name`: what its owner calls it")

    @property
    def called(self) -> str:
        """What it is called in what is published."""
        return self.name or self.source


class CriteriaBlock(Strict):
    """What counts as a systematic feature."""

    magnitude: Number = Field(description="a hit is abs(x) >= this")
    layer_fraction: Share = Field(description="least share of layers")
    position_fraction: Share = Field(description="least share of tokens")
    reading: ReadingName = Field(description="the reading that decides")
    sites: Annotated[list[AnySiteName], Field(min_length=1, max_length=5)] = Field(description="captured sites")
    site: AnySiteName = Field(description="the site that decides")
    ladder: Annotated[list[Number], Field(max_length=MAX_MAGNITUDES)] = Field(
        description="all magnitudes at which hits are counted, ascending"
    )


class IntervalBlock(Strict):
    """The ends of one feature's share of tokens, and how often it passes in resamples."""

    layer_fraction: Ends | None = Field(
        None,
        description="percentiles over resamples, in studies of analysis version 2 and before; a share of layers has no "
        "interval, since it only grows with the corpus",
    )
    position_fraction: Ends | None = Field(
        description="the two ends of `position_fraction`; `intervals.shares` says what they are"
    )
    passes: Share = Field(description="share of the resamples in which the feature passes")


class FeatureRow(Strict):
    """One feature of one list."""

    feature: Feature = Field(description="its number, 0-based")
    layer_fraction: Share = Field(description="share of the captured layers that the layer rule counts")
    position_fraction: Share | None = Field(
        description="the left side of the token rule; null for `per_layer`, which has it inside the layer rule"
    )
    layers: Annotated[list[Layer], Field(max_length=MAX_LAYERS)] = Field(
        description="the layers that the layer rule counts, ascending"
    )
    hits: Count = Field(
        description="values with abs(x) >= magnitude over all layers; in `block` a cell with a hit in both sites is one"
    )
    max_magnitude: Number = Field(description="largest abs(x), over all layers and tokens")
    min: Number = Field(description="over all layers and tokens")
    max: Number = Field(description="over all layers and tokens")
    sequences: Count = Field(
        description="in how many sequences it passes this list's own reading on that sequence alone"
    )
    of_sequences: Count = Field(description="sequences of the corpus")
    first_token_hits: Count = Field(description="those of `hits` at the first token of a sequence")
    interval: IntervalBlock | None = Field(None, description="null for one sequence; absent in `legacy`")
    max_sd: Size | None = Field(
        None,
        description="the largest over the layers of abs(x) in standard deviations of its site and layer; null where all "
        "values of each layer are equal",
    )

    @model_validator(mode="after")
    def _sorted(self) -> FeatureRow:
        check_ascending(self.layers, f"the layers of feature {self.feature}")
        return self


FeatureList = Annotated[list[FeatureRow], Field(max_length=MAX_FEATURES)]


class Legacy(Strict):
    """The earlier pipeline's way of counting, at `block`."""

    feature_sequence_pairs: Count = Field(description="how often a feature passes in a sequence of its own")
    features: FeatureList = Field(
        description="features that pass in a sequence; their fractions are means over the sequences in which they pass"
    )


class Readings(Strict):
    """The lists of one site."""

    pooled: FeatureList = Field(description="features that pass by the reading `pooled`")
    union: FeatureList = Field(description="by `union`")
    per_layer: FeatureList = Field(description="by `per_layer`")
    affected: FeatureList = Field(description="by `affected`")
    legacy: Legacy | None = Field(None, description="at `block` alone")

    @property
    def lists(self) -> dict[ReadingName, list[FeatureRow]]:
        """The four lists by the name of their reading."""
        return {
            "pooled": self.pooled,
            "union": self.union,
            "per_layer": self.per_layer,
            "affected": self.affected,
        }
