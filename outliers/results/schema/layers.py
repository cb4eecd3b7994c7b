"""Parts of summary.json that are about layers and magnitudes: what each layer has, ladders, histograms, single values."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from outliers.results.schema.fields import (
    MAX_BINS,
    MAX_MAGNITUDES,
    MAX_QUANTILES,
    Context,
    Count,
    Counts,
    Feature,
    Layer,
    Name,
    Number,
    Share,
    Size,
    Strict,
    check_ascending,
)
from outliers.spec import AnySiteName, ReadingName


class LayerRow(Strict):
    """One layer of one captured site; values have no unit."""

    site: AnySiteName = Field(description="captured site")
    layer: Layer = Field(description="number of the layer, 0-based")
    max_magnitude: Number | None = Field(description="largest abs(x); null where no value is finite")
    hits: Count = Field(description="values with abs(x) >= the deciding magnitude")
    nonfinite: Count = Field(description="values that are NaN or infinite")
    kurtosis: Number | None = Field(
        description="Pearson, of all values; a normal distribution has 3; null where all values are equal"
    )
    median_magnitude: Number | None = Field(description="median of abs(x)")
    quantiles: Annotated[list[Number], Field(max_length=MAX_QUANTILES)] | None = Field(
        None, description="of abs(x) at `quantile_levels`, nearest rank"
    )
    mean_inf_norm: Number | None = Field(
        None,
        description="mean over the sequences of the largest abs(x) in each, as Bondarenko et al. 2023 average theirs",
    )
    standard_deviation: Size | None = Field(
        None, description="of all finite values, about their mean; null where all are equal"
    )
    sd_hits: Counts | None = Field(None, description="values that reach each multiple of `sd_ladder`")
    sd_features: Counts | None = Field(None, description="features that reach each multiple of `sd_ladder`")


class MassiveRow(Strict):
    """One massive activation, at `resid`."""

    layer: Layer = Field(description="number of the layer, 0-based")
    sequence: Count = Field(description="number of the sequence, 0-based")
    position: Count = Field(description="place in the sequence, 0-based")
    token: Context | None = Field(description="its text; null where text is not shown")
    feature: Feature = Field(description="number of the feature, 0-based")
    value: Number = Field(description="signed value")
    ratio: Number | None = Field(
        description="abs(value) over the median magnitude of its layer over the whole corpus; null for a zero median"
    )
    token_median: Number = Field(description="median magnitude of its own token")
    token_ratio: Number | None = Field(description="abs(value) over `token_median`; null for a zero median")


class Sweep(Strict):
    """How many features each reading finds at each magnitude."""

    magnitudes: Annotated[list[Number], Field(max_length=MAX_MAGNITUDES)] = Field(
        description="the magnitudes of the ladder, ascending"
    )
    counts: dict[AnySiteName, dict[ReadingName, Counts]] = Field(
        description="number of features by site and reading, one count for each magnitude"
    )
    counts_without_first_tokens: dict[AnySiteName, dict[ReadingName, Counts]] = Field(
        {}, description="the same where the first token of every sequence is left out"
    )

    @model_validator(mode="after")
    def _same_length(self) -> Sweep:
        check_ascending(self.magnitudes, "the magnitudes of the sweep")
        for lines in (*self.counts.items(), *self.counts_without_first_tokens.items()):
            for reading, counts in lines[1].items():
                if len(counts) != len(self.magnitudes):
                    raise ValueError(
                        f"{lines[0]} {reading} has {len(counts)} counts for {len(self.magnitudes)} magnitudes"
                    )
        return self


class DeviationLadder(Strict):
    """How many features reach each multiple of their layer's standard deviation."""

    multiples: Annotated[list[Size], Field(max_length=MAX_MAGNITUDES)] = Field(description="3, 6, 10, 20 and 50")
    features: dict[AnySiteName, Counts] = Field(description="features of a site that reach it in any layer")
    features_in_layers: dict[AnySiteName, Counts] = Field(
        description="features that reach it in at least `criteria.layer_fraction` of the layers"
    )

    @model_validator(mode="after")
    def _same_length(self) -> DeviationLadder:
        check_ascending(self.multiples, "the multiples of sd_ladder")
        for site, counts in (*self.features.items(), *self.features_in_layers.items()):
            if len(counts) != len(self.multiples):
                raise ValueError(f"sd_ladder of {site} has {len(counts)} counts for {len(self.multiples)} multiples")
        return self


class IntervalCounts(Strict):
    """The range of how many features pass, over resamples of whole sequences; it is not a confidence interval."""

    level: Share = Field(description="share of the resamples between the two ends: 0.95")
    resamples: Count = Field(description="number of resamples")
    seed: Count = Field(description="of the resamples: always 0")
    counts: dict[AnySiteName, dict[ReadingName, Annotated[list[Count], Field(min_length=2, max_length=2)]]] = Field(
        description="low and high number of features by site and reading"
    )
    shares: Name | None = Field(
        None,
        description="what the ends of a share of tokens are: `95% interval` or `range over sequences` (below); null or "
        "absent in studies of analysis version 2 and before: percentiles of resamples",
    )


class Histogram(Strict):
    """Finite values of a site by magnitude, four bins an octave."""

    lower_edges: Annotated[list[Number], Field(max_length=MAX_BINS)] = Field(
        description="least abs(x) of each bin, ascending"
    )
    counts: Annotated[list[Count], Field(max_length=MAX_BINS)] = Field(description="values in each bin")

    @model_validator(mode="after")
    def _same_length(self) -> Histogram:
        check_ascending(self.lower_edges, "lower_edges")
        if len(self.lower_edges) != len(self.counts):
            raise ValueError(f"{len(self.counts)} counts for {len(self.lower_edges)} lower_edges")
        return self


class Perplexity(Strict):
    """Perplexity over the corpus."""

    value: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        description="exp of `loss`; null where that is beyond float64 (700 nats)"
    )
    loss: Number | None = Field(
        description="mean negative log-likelihood of a token, in nats; null where the logits are not finite"
    )
    tokens: Count = Field(description="tokens that were predicted: all but the first of each sequence")
